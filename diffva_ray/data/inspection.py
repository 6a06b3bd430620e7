"""Inspects a data set: classes, sizes, bit depths, unreadable files and near-duplicates."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffva_ray.data.bit_depth import bit_depth_note
from diffva_ray.data.dataset import Dataset, LabelledImage
from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import BadImage, check_contrast, decode, describe
from diffva_ray.progress import one_line
from diffva_ray.schema import Status

HASH_SIDE = 16  # cells; a hash has 16 x 16 bits
NEAR = 8  # maximum distance in bits; measured: 0 to 8 for one image in two resolutions, 20 or more for different images
THREADS = 8  # files decoded at the same time


class Finding(NamedTuple):
    """The result for one file."""

    path: str  # relative to the data root
    size: str = ""  # "WIDTHxHEIGHT" in pixels; empty for an unusable file, like mode
    mode: str = ""  # format, colour mode and bit depth; see ``describe``
    hash: int = 0  # difference hash
    status: Status = Status.OK
    reason: str = ""  # why the file is unusable


def inspect(dataset: Dataset, healthy_class: str = "Normal") -> dict[str, Any]:
    """Decodes every file once and returns a summary that JSON can store."""
    # examine the files in threads
    files = list({image.path: image for image in dataset.images}.values())
    with ThreadPoolExecutor(THREADS) as pool:
        findings = list(pool.map(lambda image: _examine(dataset, image), files))
    usable = [finding for finding in findings if finding.status is Status.OK]
    # summarise
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
    """The result for one file; never raises for a bad or missing file."""
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
    """256-bit hash of float grey [H, W]: whether each cell of a 17 x 16 grid of means is darker than its right one."""
    grid = Image.fromarray(quantise(image)).resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    cells = np.asarray(grid, np.int16)
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


def near_duplicates(hashes: dict[str, int]) -> list[list[str]]:
    """Sorted groups of two or more paths whose hashes are connected by distances of at most NEAR bits.

    The bits are divided into NEAR + 1 sets. Two hashes that differ in at most NEAR bits agree on at least one set, so
    only hashes with equal bits in one set are compared. The sets are interleaved, because black borders make
    neighbouring bits equal in all images.
    """
    # union-find over the different hashes
    paths: dict[int, list[str]] = {}
    for path, value in hashes.items():
        paths.setdefault(value, []).append(path)
    parent = {value: value for value in paths}

    def root(value: int) -> int:
        while parent[value] != value:
            parent[value] = value = parent[parent[value]]
        return value

    # compare the hashes that agree on one set of bits
    for part in range(NEAR + 1):
        mask = sum(1 << bit for bit in range(part, HASH_SIDE**2, NEAR + 1))
        buckets: dict[int, list[int]] = {}
        for value in paths:
            buckets.setdefault(value & mask, []).append(value)
        for bucket in buckets.values():
            for first, second in combinations(bucket, 2):
                if (first ^ second).bit_count() <= NEAR:
                    parent[root(second)] = root(first)
    # collect the paths of each group
    groups: dict[int, list[str]] = {}
    for value, same in paths.items():
        groups.setdefault(root(value), []).extend(same)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def describe_findings(summary: dict[str, Any]) -> str:
    """The result of ``inspect`` as text."""
    # classes and files
    lines = [f"{summary['uri']}: {summary['kind']}, {summary['images']} images in {summary['files']} files"]
    lines += [f"  {label}: {count}" for label, count in summary["classes"].items()]
    healthy = summary["healthy_class"]
    hint = "" if healthy in summary["classes"] else ", which has no images (use --set data.healthy_class=NAME)"
    lines.append(f"healthy class: {healthy}{hint}")
    counts = {key: summary[f"with_{key}"] for key in ("lung_mask", "lesion_mask", "ground_truth", "boxes")}
    lines.append("with " + ", ".join(f"{key.replace('_', ' ')}: {count}" for key, count in counts.items()))
    lines.append("sizes: " + ", ".join(f"{size} ({count})" for size, count in summary["sizes"].items()))
    lines.append("modes: " + ", ".join(f"{mode} ({count})" for mode, count in summary["modes"].items()))
    # problems
    lines += [
        f"{'missing' if bad['status'] == Status.MISSING.value else 'unreadable'}: {bad['path']!r}: {bad['reason']}"
        for bad in summary["unreadable"]
    ]
    groups = summary["near_duplicates"]["groups"]
    lines += [f"near-duplicates: {', '.join(map(repr, group))}" for group in groups[:10]]
    lines += [f"near-duplicates: {len(groups) - 10} more groups (--json has all)"] if len(groups) > 10 else []
    return "\n".join([*lines, *(f"note: {note}" for note in summary["notes"])])
