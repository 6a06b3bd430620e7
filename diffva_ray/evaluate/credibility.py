"""Why the numbers of a run must not be stated: the model learned nothing, or it was trained on these images.

A judge that guesses is ``judge_quality``'s matter: only its flip rates mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffva_ray.evaluate.tables import finite_mean
from diffva_ray.generate.run import Run
from diffva_ray.model.card import UnusableModel, read_card
from diffva_ray.schema import TableRow
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import StoreError

MIN_PSNR = 20.0  # dB of a reconstruction; the demo's autoencoder has 32 dB, the mean of all phantoms 19 dB
MIN_STEPS = 50  # of the stages that learn to generate; the recipes have 200 to 20 000
# kinds of stages that learn to generate
GENERATORS = ("denoiser", "va-gan", "vant-gan", "ant-gan", "singla", "charachon")


def problems(run: Run, pairs: Sequence[TableRow], trained_on: int, records: int) -> list[str]:
    """The reasons, one sentence each, the most serious first.

    ``pairs``: rows of ``score_pairs``; ``trained_on``: number of the ``records`` with images that the model was trained
    on."""
    found = untrained(run)
    psnr = finite_mean(row["psnr_reconstruction"] for row in pairs)
    if psnr is not None and psnr < MIN_PSNR:
        broken = (
            f"the autoencoder is broken, its reconstructions have a mean PSNR of {psnr:.1f} dB to the images "
            f"({MIN_PSNR:.0f} dB is the least that can be used)"
        )
        found.append(f"T{broken[1:]}" if found else f"Nothing was learned: {broken}")
    if trained_on:
        found.append(f"{trained_on} of {records} records are of images in the model's training list: this is no test")
    return found


def stated(run: Run, metrics: Mapping[str, Any] | None) -> list[str]:
    """The reasons in ``metrics`` (tables/metrics.json); without any, what the model's card says."""
    found: list[str] = (metrics or {}).get("problems", [])
    return found or untrained(run)


def untrained(run: Run) -> list[str]:
    """One sentence if the model's card says that it was hardly trained; empty otherwise, and without a card."""
    steps = _steps(run)
    if steps is None or steps >= MIN_STEPS:
        return []
    return [f"Nothing was learned: the model was trained for {steps} {'step' if steps == 1 else 'steps'}"]


def _steps(run: Run) -> int | None:
    """Steps of the stages that taught the run's model to generate; None where that is unknown."""
    try:
        card: dict[str, Any] | None = read_card(open_store(str(run.about["model"])))
        if card is None or card["digest"] != run.keys["model_digest"]:
            return None
        stages = card["recipe"]["train"]["stages"]
        steps = [int(stage["steps"]) for stage in stages if stage["trains"] in GENERATORS]
    except (KeyError, TypeError, OSError, StoreError, UnusableModel, ValueError):
        return None
    return max(steps) if steps else None
