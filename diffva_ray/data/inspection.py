"""What is in a data set: classes, sizes, bit depths, unreadable files and near-duplicates, as plain values."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffva_ray.data.bit_depth import bit_depth_note
from diffva_ray.data.dataset import Dataset, LabelledImage
from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import BadImage, check_contrast, decode, describe
from diffva_ray.progress import one_line
from diffva_ray.schema import Status

HASH_SIDE = 16
NEAR = 8  # of 256 bits; measured: one image in two resolutions 0 to 8 apart, different images at least 20
THREADS = 8


class Finding(NamedTuple):
    """One file: its size, how it is stored and its difference hash; or why it cannot be used."""

    path: str
    size: str = ""
    mode: str = ""
    hash: int = 0
    status: Status = Status.OK
    reason: str = ""


def inspect(dataset: Dataset, healthy_class: str = "Normal") -> dict[str, Any]:
    """A JSON-able summary; every file is decoded once."""
    files = list({image.path: image for image in dataset.images}.values())
    with ThreadPoolExecutor(THREADS) as pool:
        findings = list(pool.map(lambda image: _examine(dataset, image), files))
    usable = [finding for finding in findings if finding.status is Status.OK]
    return {
        "uri": dataset.store.uri,
        "kind": dataset.kind,
        "notes": [*dataset.notes, *filter(None, [bit_depth_note(dataset)])],
        "classes": dataset.classes,
        "healthy_class": healthy_class,
        "images": len(dataset.images),
        "files": len(files),
        "with_lung_mask": sum(bool(image.lung_mask) for image in files),
        "with_lesion_mask": sum(bool(image.lesion_mask) for image in files),
        "with_ground_truth": sum(bool(image.ground_truth) for image in files),
        "with_boxes": sum(image.path in dataset.boxes for image in files),
        "examined": len(files),
        "sizes": dict(Counter(finding.size for finding in usable).most_common(10)),
        "modes": dict(Counter(finding.mode for finding in usable).most_common()),
        "unreadable": [
            {"path": finding.path, "status": finding.status.value, "reason": finding.reason}
            for finding in findings
            if finding.status is not Status.OK
        ],
        "near_duplicates": {
            "method": f"difference hash {HASH_SIDE}x{HASH_SIDE}, at most {NEAR} of {HASH_SIDE**2} bits apart",
            "groups": near_duplicates({finding.path: finding.hash for finding in usable}),
        },
    }


def _examine(dataset: Dataset, image: LabelledImage) -> Finding:
    if image.size < 0:
        return Finding(image.path, status=Status.MISSING, reason="no such file")
    try:
        data = dataset.store.read(image.path)
        pixels = decode(data, bits=dataset.bits)
        check_contrast(pixels)
        height, width = pixels.shape
        return Finding(image.path, f"{width}x{height}", describe(data), difference_hash(pixels))
    except BadImage as error:
        return Finding(image.path, status=error.status, reason=str(error))
    except FileNotFoundError:
        return Finding(image.path, status=Status.MISSING, reason="no such file")
    except OSError as error:
        return Finding(image.path, status=Status.ERROR, reason=one_line(error))


def difference_hash(image: np.ndarray) -> int:
    """256 bits of float grey [H, W]: on a 17 x 16 grid of 8-bit means, is each cell darker than its right neighbour?"""
    grid = Image.fromarray(quantise(image)).resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    cells = np.asarray(grid, np.int16)
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


def near_duplicates(hashes: dict[str, int]) -> list[list[str]]:
    """Groups of two or more paths that are linked by hashes at most NEAR bits apart, sorted.

    NEAR + 1 disjoint sets of bits: two hashes that differ in NEAR bits agree on one of the sets, so only those that
    share a bucket need comparing. The sets are interleaved, as black borders make neighbouring bits equal everywhere.
    """
    paths: dict[int, list[str]] = {}
    for path, value in hashes.items():
        paths.setdefault(value, []).append(path)
    parent = {value: value for value in paths}

    def root(value: int) -> int:
        while parent[value] != value:
            parent[value] = value = parent[parent[value]]
        return value

    for part in range(NEAR + 1):
        mask = sum(1 << bit for bit in range(part, HASH_SIDE**2, NEAR + 1))
        buckets: dict[int, list[int]] = {}
        for value in paths:
            buckets.setdefault(value & mask, []).append(value)
        for bucket in buckets.values():
            for index, one in enumerate(bucket):
                for other in bucket[:index]:
                    if (one ^ other).bit_count() <= NEAR:
                        parent[root(one)] = root(other)
    groups: dict[int, list[str]] = {}
    for value, same in paths.items():
        groups.setdefault(root(value), []).extend(same)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def describe_findings(found: dict[str, Any]) -> str:
    """The findings in a few lines for people."""
    lines = [f"{found['uri']}: {found['kind']}, {found['images']} images in {found['files']} files"]
    lines += [f"  {label}: {count}" for label, count in found["classes"].items()]
    healthy = found["healthy_class"]
    there = "" if healthy in found["classes"] else ", of which there is no image (--set data.healthy_class=NAME)"
    lines.append(f"healthy class: {healthy}{there}")
    truth = {key: found[f"with_{key}"] for key in ("lung_mask", "lesion_mask", "ground_truth", "boxes")}
    lines.append("with " + ", ".join(f"{key.replace('_', ' ')}: {count}" for key, count in truth.items()))
    lines.append("sizes: " + ", ".join(f"{size} ({count})" for size, count in found["sizes"].items()))
    lines.append("modes: " + ", ".join(f"{mode} ({count})" for mode, count in found["modes"].items()))
    lines += [
        f"{'missing' if bad['status'] == Status.MISSING.value else 'unreadable'}: {bad['path']!r}: {bad['reason']}"
        for bad in found["unreadable"]
    ]
    groups = found["near_duplicates"]["groups"]
    lines += [f"near-duplicates: {', '.join(map(repr, group))}" for group in groups[:10]]
    lines += [f"near-duplicates: {len(groups) - 10} more groups (--json has all)"] if len(groups) > 10 else []
    return "\n".join([*lines, *(f"note: {note}" for note in found["notes"])])
