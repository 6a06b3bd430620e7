"""The keys of a run's fingerprint: everything that changes a pixel or the set of records, by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from diffva_ray.config.recipe import Recipe
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import DEVICE_FILE, DEVICE_NAME, FingerprintDiffers, Run, find_run, record_change
from diffva_ray.generate.run_json import base_uri
from diffva_ray.schema import ENGINE, SCHEMA_VERSION
from diffva_ray.storage.opening import open_store

SPACED_ANEW = {"dpmsolver++", "unipc"}  # samplers whose timesteps earlier versions spaced differently


def pixel_keys(
    recipe: Recipe, request: Request, model_digest: str, torch_version: str, device: str, planned_on: str | None = None
) -> dict[str, Any]:
    """The keys of a run that is planned now, or was ``planned_on`` another kind of device, as JSON values."""
    prompt = request.prompt if request.prompt is not None else recipe.data.healthy_prompt
    keys: dict[str, Any] = json.loads(
        json.dumps(
            {
                **recipe.generate.model_dump(mode="json"),
                "compile": recipe.generate.compiles_on(planned_on or device),
                "model_digest": model_digest,
                "bits": recipe.data.bits,
                "resolution": recipe.model.resolution,
                "aspect": "squash",
                "seed": recipe.seed,
                "prompt": prompt,
                "classes": request.classes,
                "limit": request.limit,
                "sweep": request.sweep,
                "schema_version": SCHEMA_VERSION,
                "timestep_spacing": _spacing(recipe.generate.scheduler, request.sweep),
                "engine": ENGINE,
                "torch": torch_version,
                "device": device,
            }
        )
    )
    return keys


def keys_now(run: Run, torch_version: str, device: str) -> dict[str, Any]:
    """The run's keys with the environment of this version and machine."""
    spacing = _spacing(run.keys["scheduler"], run.keys["sweep"])
    return {**run.keys, "torch": torch_version, "device": device, "engine": ENGINE, "timestep_spacing": spacing}


def check_device_name(run: Run, name: str, allow_environment_change: bool = False) -> None:
    """Compare the device of a worker with the one of the run's first worker, which is stored in DEVICE_FILE.

    GPU models, and CPUs with other vector instructions, round differently. A permitted change is recorded in
    ``run.json``. Raises FingerprintDiffers."""
    store, content = open_store(base_uri(run.store)), json.dumps({DEVICE_NAME: name}).encode()
    if store.put_if_absent(DEVICE_FILE, content):
        return
    try:
        first = json.loads(store.read(DEVICE_FILE))[DEVICE_NAME]
    except (OSError, ValueError, LookupError, TypeError):  # damaged
        return store.put(DEVICE_FILE, content)
    if first == name:
        return
    if not allow_environment_change:
        raise FingerprintDiffers(store.uri, [DEVICE_NAME], {DEVICE_NAME: first}, {DEVICE_NAME: name})
    if (base := find_run(store)) is not None:  # a retry's changes are recorded in its run
        record_change(base, {DEVICE_NAME: name})


def _spacing(scheduler: str, sweep: Iterable[tuple[str, Sequence[Any]]]) -> str:
    """Spacing of the sampler's timesteps: "trailing" if any of the run's samplers is in SPACED_ANEW, else "leading"."""
    return "trailing" if SPACED_ANEW & {scheduler, *dict(sweep).get("scheduler", ())} else "leading"
