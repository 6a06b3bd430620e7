"""Inspects a data set: what it was recognised as, classes, patients, sizes, unreadable files, suspects, duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from diffva_ray.data.bit_depth import bit_depth_note
from diffva_ray.data.dataset import NO_COLUMNS, Dataset, LabelledImage
from diffva_ray.data.images import BadImage, decode_with_columns, describe
from diffva_ray.data.near_duplicates import METHOD, difference_hash, near_duplicates
from diffva_ray.data.suspects import Traits, coloured_share, suspects, traits
from diffva_ray.progress import one_line
from diffva_ray.schema import Status

THREADS = 8  # files decoded at the same time
COLOURED = 0.01  # share of clearly coloured pixels from which an image is a suspect
SHOWN = 10  # items of a long list in the text; --json has all
COUNTED = ("view", "laterality", "sex", "split")  # columns whose values are counted


class Finding(NamedTuple):
    """The result for one file."""

    path: str  # relative to the data root
    size: str = ""  # "WIDTHxHEIGHT" in pixels; empty for an unusable file, like the rest
    mode: str = ""  # format, colour mode and bit depth; see ``describe``
    hash: int = 0  # difference hash
    sha256: str = ""  # of the file
    traits: Traits | None = None
    coloured: float = 0  # share of clearly coloured pixels
    columns: Mapping[str, str] = NO_COLUMNS  # those of the data set, else of the file's header
    status: Status = Status.OK
    reason: str = ""  # why the file is unusable


class Inspected(NamedTuple):
    """A data set and the results for its files."""

    dataset: Dataset
    findings: list[Finding]  # in the order of the images' paths


def examine(dataset: Dataset) -> Inspected:
    """Decodes every file of a data set once."""
    files = list({image.path: image for image in dataset.images}.values())
    with ThreadPoolExecutor(THREADS) as pool:
        return Inspected(dataset, list(pool.map(lambda image: _examine(dataset, image), files)))


def inspect(dataset: Dataset, healthy_class: str = "Normal") -> dict[str, Any]:
    """Decodes every file once and returns a summary that JSON can store."""
    return summary(examine(dataset), healthy_class)


def summary(inspected: Inspected, healthy_class: str) -> dict[str, Any]:
    """What ``inspect`` prints, as JSON values."""
    dataset, findings = inspected
    files = list({image.path: image for image in dataset.images}.values())
    usable = [finding for finding in findings if finding.status is Status.OK]
    columns = [finding.columns for finding in findings]
    return {
        "uri": dataset.store.uri,
        "kind": dataset.kind,
        "recognised_by": dataset.why,
        "left_out": dataset.left_out,
        "notes": [*dataset.notes, *filter(None, [bit_depth_note(dataset)])],
        "classes": dataset.classes,
        "healthy_class": healthy_class,
        "images": len(dataset.images),
        "files": len(files),
        "patients": len(patients(inspected)),
        "without_patient": sum("patient" not in row for row in columns),
        "columns": {name: _counts(row[name] for row in columns if name in row) for name in COUNTED},
        "with_lung_mask": sum(bool(image.lung_mask) for image in files),
        "with_lesion_mask": sum(bool(image.lesion_mask) for image in files),
        "with_ground_truth": sum(bool(image.ground_truth) for image in files),
        "with_outlined_lesion": sum(image.path in dataset.shapes for image in files),
        "examined": len(files),
        "sizes": dict(Counter(finding.size for finding in usable).most_common(10)),
        "modes": _counts(finding.mode for finding in usable),
        "unreadable": [
            {"path": finding.path, "status": finding.status.value, "reason": finding.reason}
            for finding in findings
            if finding.status is not Status.OK
        ],
        "suspects": _suspects(usable),
        "near_duplicates": {"method": METHOD, "pairs": near_duplicates(_hashes(usable))},
    }


def overlap(first: Inspected, second: Inspected) -> dict[str, Any]:
    """What two data sets have in common, as JSON values: patients, equal files, and near-duplicates across them."""
    common = sorted(patients(first) & patients(second))
    digests = {finding.sha256: finding.path for finding in first.findings if finding.sha256}
    equal = [(digests[finding.sha256], finding.path) for finding in second.findings if finding.sha256 in digests]
    sides = [{f"{side}\0{path}": value for path, value in _hashes(inspected.findings).items()}
             for side, inspected in enumerate((first, second))]  # fmt: skip
    pairs = [(one[2:], two[2:], bits) for one, two, bits in near_duplicates(sides[0] | sides[1]) if one[0] != two[0]]
    return {
        "uris": [first.dataset.store.uri, second.dataset.store.uri],
        "patients": common,
        "patients_known": [len(patients(first)), len(patients(second))],
        "patients_comparable": bool(common) or first.dataset.issuer == second.dataset.issuer,
        "equal_files": equal,
        "near_duplicates": {"method": METHOD, "pairs": [pair for pair in pairs if pair[:2] not in set(equal)]},
    }


def patients(inspected: Inspected) -> set[str]:
    """Hashes of the patients that a data set knows, by its table or by the headers of its files."""
    return {finding.columns["patient"] for finding in inspected.findings if "patient" in finding.columns}


def _examine(dataset: Dataset, image: LabelledImage) -> Finding:
    """The result for one file; never raises for a bad or missing file."""
    columns = {**image.columns, "patient": image.patient} if image.patient else dict(image.columns)
    if image.size < 0:
        return Finding(image.path, columns=columns, status=Status.MISSING, reason="no such file")
    try:
        data = dataset.store.read(image.path)
        pixels, (height, width), header = decode_with_columns(data, bits=dataset.bits)
        return Finding(
            image.path, f"{width}x{height}", describe(data), difference_hash(pixels), hashlib.sha256(data).hexdigest(),
            traits(pixels), coloured_share(data), {**header, **columns},
        )  # fmt: skip
    except BadImage as error:
        return Finding(image.path, columns=columns, status=error.status, reason=str(error))
    except FileNotFoundError:
        return Finding(image.path, columns=columns, status=Status.MISSING, reason="no such file")
    except OSError as error:
        return Finding(image.path, columns=columns, status=Status.ERROR, reason=one_line(error))


def _hashes(findings: Iterable[Finding]) -> dict[str, int]:
    return {finding.path: finding.hash for finding in findings if finding.status is Status.OK}


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _suspects(usable: Iterable[Finding]) -> list[dict[str, Any]]:
    """Path and reasons of the suspects, in the order of paths."""
    findings = list(usable)
    reasons = suspects({finding.path: finding.traits for finding in findings if finding.traits is not None})
    for finding in findings:
        if finding.coloured > COLOURED:
            reasons.setdefault(finding.path, []).append(f"coloured: {finding.coloured:.0%} of the pixels")
        if finding.columns.get("view") == "LATERAL":
            reasons.setdefault(finding.path, []).append("not frontal: its view is LATERAL")
    return [{"path": path, "reasons": reasons[path]} for path in sorted(reasons)]


def describe_findings(summary: dict[str, Any]) -> str:
    """The result of ``inspect`` as text."""
    # classes and files
    lines = [
        f"{summary['uri']}: {summary['kind']}, {summary['images']} images in {summary['files']} files",
        f"recognised by: {summary['recognised_by']}",
    ]
    lines += [f"  {label}: {count}" for label, count in summary["classes"].items()]
    healthy = summary["healthy_class"]
    hint = "" if healthy in summary["classes"] else ", which has no images (use --healthy-class NAME)"
    if summary["kind"] != "image":
        lines.append(f"healthy class: {healthy}{hint}")
    unknown = f" ({summary['without_patient']} images of unknown patients)" if summary["without_patient"] else ""
    lines.append(f"patients: {summary['patients'] or 'unknown'}{unknown if summary['patients'] else ''}")
    lines += [f"{name}: {_listed(counts)}" for name, counts in summary["columns"].items() if counts]
    kinds = ("lung_mask", "lesion_mask", "ground_truth", "outlined_lesion")
    lines.append("with " + ", ".join(f"{kind.replace('_', ' ')}: {summary[f'with_{kind}']}" for kind in kinds))
    lines.append(f"sizes: {_listed(summary['sizes'])}")
    lines.append(f"modes: {_listed(summary['modes'])}")
    # problems
    lines += [
        f"{'missing' if bad['status'] == Status.MISSING.value else 'unreadable'}: {bad['path']!r}: {bad['reason']}"
        for bad in summary["unreadable"]
    ]
    lines += _shown("suspect", [f"{row['path']!r}: {'; '.join(row['reasons'])}" for row in summary["suspects"]])
    lines += _shown("near-duplicates", _pairs(summary["near_duplicates"]["pairs"]))
    return "\n".join([*lines, *(f"note: {note}" for note in summary["notes"])])


def describe_overlap(common: dict[str, Any]) -> str:
    """The result of ``overlap`` as text."""
    known = common["patients_known"]
    lines = [f"{common['uris'][0]} and {common['uris'][1]}:"]
    if not all(known):
        lines.append("patients in both: unknown, as the patients of one of them are not known")
    elif not common["patients_comparable"]:
        lines.append("patients in both: unknown, as each data set numbers its patients itself")
    else:
        lines.append(f"patients in both: {len(common['patients'])} (of {known[0]} and {known[1]})")
    lines += _shown("patient in both", common["patients"])
    lines += _shown("equal files", [f"{one!r}, {two!r}" for one, two in common["equal_files"]])
    lines += _shown("near-duplicates", _pairs(common["near_duplicates"]["pairs"]))
    found = common["patients"] or common["equal_files"] or common["near_duplicates"]["pairs"]
    nothing = "nothing in common" if all(known) and common["patients_comparable"] else "no images in common"
    return "\n".join([*lines, "split them by patient before training and testing" if found else nothing])


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _pairs(pairs: Iterable[tuple[str, str, int]]) -> list[str]:
    return [f"{one!r}, {two!r} ({bits} bits apart)" for one, two, bits in pairs]


def _shown(what: str, items: list[str]) -> list[str]:
    more = [f"{what}: {len(items) - SHOWN} more (--json has all)"] if len(items) > SHOWN else []
    return [*(f"{what}: {item}" for item in items[:SHOWN]), *more]
