"""Whether the data set that a run reads is the one it was planned from, and whether it is there at all.

A sample of images, by content, is written down with the plan. A missing image is a row of the run; a data set of which
nothing is left is a lost mount, a lost permission or a wrong folder, and no row says that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.generate.run import Run
from diffva_ray.progress import LOG
from diffva_ray.schema import digest
from diffva_ray.storage.store import Store, StoreError, absolute

SAMPLE = 8  # images whose content is remembered


def content_sample(dataset: Dataset) -> dict[str, str]:
    """The sha256 of up to SAMPLE readable images by path, spread over the data set by the digest of their paths."""
    paths = sorted({image.path for image in dataset.images if image.size >= 0}, key=digest)
    sample: dict[str, str] = {}
    for path in paths[: 2 * SAMPLE]:  # some of them may be unreadable
        if len(sample) < SAMPLE and (found := _sha256(dataset.store, path)):
            sample[path] = found
    return sample


def check_there(about: Mapping[str, Any], data: Store) -> None:
    """Raises StoreError when no image of the sample in ``run.json`` (``about``) can be read any more."""
    sample = about.get("data_sample", {})
    if sample and not any(readable(data, path) for path in sample):
        raise StoreError(
            f"{data.uri}: none of the {len(sample)} sampled images of the run can be read there; mount the data set "
            "again or restore the permission, then give the same command, or name its new place with --data"
        )


def check_same(run: Run, data: Store) -> None:
    """Raises StoreError when the data set is not there, UnusableData when most of its sample has other content."""
    sample = run.about.get("data_sample", {})
    check_there(run.about, data)
    other = [path for path, expected in sample.items() if _sha256(data, path) not in (expected, None)]
    if len(other) > len(sample) / 2:
        raise UnusableData(
            f"--data {data.uri}: not the images that {run.store.uri} was planned from ({len(other)} of "
            f"{len(sample)} sampled ones have other content, {other[0]} for one); give their place, or another --out"
        )


def check_listing(run: Run, dataset: Dataset) -> None:
    """Raises UnusableData when ``dataset`` lacks more of the planned images, by path and size, than
    ``max_quarantined_fraction`` allows."""
    listed = {image.path: image.size for image in dataset.images}
    plan = run.plan(["image_path", "image_size"])
    planned = dict(zip(plan["image_path"].to_pylist(), plan["image_size"].to_pylist(), strict=True))
    wrong = [path for path, size in planned.items() if size >= 0 and listed.get(path) != size]
    if len(wrong) > run.recipe.evaluate.max_quarantined_fraction * len(planned):
        raise UnusableData(
            f"--data {dataset.store.uri}: {len(wrong)} of the {len(planned)} images that {run.store.uri} was planned "
            f"from are not there, or have another size ({wrong[0]} for one); they were in {run.about['data_root']}"
        )


def moved(run: Run, data: str) -> Run:
    """The run with its images at ``data``, where they are now. Raises UnusableData where they are not those that it
    was planned from."""
    if absolute(data) == run.about["data"]:
        return run
    dataset = open_dataset(data, run.recipe.data)
    root = dataset.store.uri
    if root == run.about["data_root"]:
        return run
    check_listing(run, dataset)
    check_same(run, dataset.store)
    LOG.info("%s: images are read from %s now, not from %s", run.store.uri, root, run.about["data_root"])
    return replace(run, about={**run.about, "data": absolute(data), "data_root": root})


def _sha256(data: Store, path: str) -> str | None:
    try:
        return hashlib.sha256(data.read(path)).hexdigest()
    except OSError:
        return None


def readable(data: Store, path: str) -> bool:
    """Whether a byte of the file can be read. Raises StoreError when the store fails."""
    try:
        return bool(data.read_range(path, 0, 1))
    except OSError:
        return False
