"""Checks that a run's data set is readable and is the one that the run was planned from.

``run.json`` stores the content digests of a sample of images. A single missing image becomes a row of the run. If the
whole sample is missing, the cause is a lost mount, a lost permission or a wrong folder, and the run stops.
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
from diffva_ray.storage.store import Store, StoreError, absolute

SAMPLE_SIZE = 8  # images


def content_sample(dataset: Dataset) -> dict[str, str]:
    """sha256 by path of up to SAMPLE_SIZE readable images, spread over the data set.

    Raises StoreError when images were listed, but none can be read in the end: the data set was lost meanwhile, and a
    sample of the few that were read before would recognise nothing."""
    sample: dict[str, str] = {}
    paths = dataset.sample_paths(2 * SAMPLE_SIZE)  # some of them may be unreadable
    for path in paths:
        if len(sample) < SAMPLE_SIZE and (sha256 := _sha256(dataset.store, path)):
            sample[path] = sha256
    if paths and not any(readable(dataset.store, path) for path in sample):
        raise StoreError(
            f"{dataset.store.uri}: none of {len(paths)} listed images can be read; mount the data set again or restore "
            "the permission and give the same command"
        )
    return sample


def check_there(about: Mapping[str, Any], data: Store) -> None:
    """Raises StoreError when no sampled image can be read any more. ``about``: the content of ``run.json``."""
    sample = about.get("data_sample", {})
    if sample and not any(readable(data, path) for path in sample):
        raise StoreError(
            f"{data.uri}: none of the {len(sample)} sampled images of the run can be read there; mount the data set "
            "again or restore the permission and give the same command, or name its new folder with --data"
        )


def check_same(run: Run, data: Store) -> None:
    """Raises StoreError when the data set is missing, UnusableData when most sampled images have other content."""
    sample = run.about.get("data_sample", {})
    check_there(run.about, data)
    other = [path for path, expected in sample.items() if _sha256(data, path) not in (expected, None)]
    if len(other) > len(sample) / 2:
        raise UnusableData(
            f"--data {data.uri}: not the images that {run.store.uri} was planned from ({len(other)} of "
            f"{len(sample)} sampled ones have other content, first: {other[0]}); name their folder, or another --out"
        )


def check_listing(run: Run, dataset: Dataset) -> None:
    """Raises UnusableData when more than ``max_quarantined_fraction`` of the planned images are missing in ``dataset``
    or have another size."""
    listed = {image.path: image.size for image in dataset.images}
    plan = run.plan(["image_path", "image_size"])
    planned = dict(zip(plan["image_path"].to_pylist(), plan["image_size"].to_pylist(), strict=True))
    wrong = [path for path, size in planned.items() if size >= 0 and listed.get(path) != size]
    if len(wrong) > run.recipe.evaluate.max_quarantined_fraction * len(planned):
        raise UnusableData(
            f"--data {dataset.store.uri}: {len(wrong)} of the {len(planned)} images that {run.store.uri} was planned "
            f"from are missing or have another size (first: {wrong[0]}); they were in {run.about['data_root']}"
        )


def moved(run: Run, data: str) -> Run:
    """The run with its images at the address ``data``, which replaces the one in ``run.json``. Raises UnusableData when
    these are not the images that the run was planned from."""
    if absolute(data) == run.about["data"]:
        return run
    dataset = open_dataset(data, run.recipe.data)
    root = dataset.store.uri
    if root == run.about["data_root"]:
        return run
    check_listing(run, dataset)
    check_same(run, dataset.store)
    LOG.info("%s: images are read from %s now, no longer from %s", run.store.uri, root, run.about["data_root"])
    return replace(run, about={**run.about, "data": absolute(data), "data_root": root})


def _sha256(data: Store, path: str) -> str | None:
    try:
        return hashlib.sha256(data.read(path)).hexdigest()
    except OSError:
        return None


def readable(data: Store, path: str) -> bool:
    """Whether the file's first byte can be read. Raises StoreError when the store fails."""
    try:
        return bool(data.read_range(path, 0, 1))
    except OSError:
        return False
