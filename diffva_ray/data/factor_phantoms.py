"""Phantoms with factors (phantom v2): age, sex, view, one or two findings with side, zone, size and severity.

A patient's anatomy, distractors, exposure and the shape of each lesion have random streams that no factor changes. So
the same patient with one factor replaced is the ground truth of an edit: what it should change and what it should keep.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np

from diffva_ray.data.encoding import encode_grey, quantise
from diffva_ray.data.factors import OF_A_CLASS, Factors, Finding, sample_factors, single_changes, with_factors
from diffva_ray.data.lesions import Lesion, blob, crescent, displacing, reticular, tissue
from diffva_ray.data.phantoms import CLASSES, MIN_SIDE, Phantom, exposed, write_image
from diffva_ray.data.places import ZONES
from diffva_ray.data.thorax import Array, Thorax, grid
from diffva_ray.storage.store import Store

VERSION = "phantom v2"
MANIFEST = "factors.csv"  # the images with their factors
CHANGES = "changes.csv"  # each image with one factor replaced


def factor_phantom(factors: Factors, patient: int, seed: int = 0, size: int = 64) -> Phantom:
    """Generate a synthetic chest X-ray with these factors; equal arguments give equal images.

        >>> from dataclasses import replace
        >>> mass = Factors(60, "F", "PA", (Finding("Mass", "left", "upper", size=0.5),))
        >>> before, older = factor_phantom(mass, patient=7), factor_phantom(replace(mass, age=80), patient=7)
        >>> before.label, bool((before.image == older.image).all())
        ('Mass', False)

    Args:
        factors: Age, sex, view and findings.
        patient: Number of the patient; the patient's own anatomy depends on patient and seed only.
        seed: Random seed of the set.
        size: Side of the image in pixels, 16 or more.

    Returns:
        The image, the same patient without any finding as its ground-truth counterfactual, and masks.

    Raises:
        ValueError: A finding has no factors, or ``size`` is below 16.
    """
    if size < MIN_SIDE:
        raise ValueError(f"the side of a phantom is at least {MIN_SIDE} pixels, got {size}")
    if unknown := [finding.label for finding in factors.findings if finding.label not in OF_A_CLASS]:
        raise ValueError(f"no factors for class {unknown[0]!r}; there are Normal, {', '.join(OF_A_CLASS)}")
    anatomy, foreign, exposure, *shapes = _streams(seed, patient)[:5]
    thorax = with_factors(Thorax.sample(np.random.default_rng(anatomy)), factors)
    u, v = thorax.coordinates(*grid(size))
    lesions = [
        _lesion(finding, np.random.default_rng(shape), thorax, u, v)
        for finding, shape in zip(factors.findings, shapes, strict=False)
    ]
    columns: dict[str, object] = {**factors.columns()}
    return exposed(thorax, lesions, factors.label, columns, foreign, exposure, size)


def _streams(seed: int, patient: int) -> list[np.random.SeedSequence]:
    """Seeds of anatomy, distractors, exposure, the shapes of two lesions, and the factors; the first three are those of
    phantom v1."""
    return np.random.SeedSequence([seed, patient]).spawn(6)


def _lesion(finding: Finding, rng: np.random.Generator, thorax: Thorax, u: Array, v: Array) -> Lesion:
    """The finding in a patient; its shape depends on ``rng`` alone, its place also on the anatomy."""
    across, along = rng.random(2)
    size, severity = (0.5 if value is None else value for value in (finding.size, finding.severity))
    side = -1 if finding.side == "right" else 1
    if finding.label == "Cardiomegaly":
        return Lesion(np.zeros_like(u), tissue(u), heart_scale=1.18 + 0.24 * severity)
    if finding.label == "Pneumothorax":
        return crescent(thorax, side, 0.08 + 0.14 * size, u, v)
    if finding.label == "Viral Pneumonia":
        return reticular(rng, 0.7 + 0.75 * severity, u, v)
    if finding.label == "COVID":
        return _patches(rng, 0.42 + 0.38 * severity, thorax, u, v)
    at = point_in_zone(thorax, side, finding.zone, across, along)
    if finding.label == "Mass":
        return displacing(rng, at, 0.09 + 0.10 * size, u, v)
    return Lesion((0.42 + 0.42 * severity) * blob(rng, u, v, at, 0.09 + 0.11 * size, 0.45), tissue(u))


def _patches(rng: np.random.Generator, severity: float, thorax: Thorax, u: Array, v: Array) -> Lesion:
    """Three peripheral patches in each lung, one in each zone."""
    opacity = np.zeros_like(u)
    for side in (-1, 1):
        for zone in ZONES:
            at = point_in_zone(thorax, side, zone, rng.uniform(0.85, 1.0), rng.random())
            opacity = np.maximum(opacity, severity * blob(rng, u, v, at, rng.uniform(0.068, 0.102), 0.45))
    return Lesion(opacity, tissue(u))


def point_in_zone(thorax: Thorax, side: int, zone: str, across: float, along: float) -> tuple[float, float]:
    """A point of a lung (side -1: image left) in a third of its height, in patient coordinates.

    ``across`` and ``along`` in [0, 1] choose it: from the heart to the chest wall, and in the middle of the third from
    top to bottom."""
    base, apex = thorax.lung_base[(side + 1) // 2], thorax.lung_apex
    v = apex + (ZONES.index(zone) + 0.25 + 0.4 * along) / len(ZONES) * (base - apex)
    candidates = np.linspace(0.12, 0.75, 64)
    lung = thorax.lung(side * candidates, np.full_like(candidates, v), side)
    free = np.minimum(lung - 0.05, -thorax.heart(side * candidates, np.full_like(candidates, v)) - 0.03)
    possible = np.flatnonzero(free > 0)
    chosen = possible[int(across * (len(possible) - 1))] if possible.size else int(free.argmax())
    return side * float(candidates[chosen]), float(v)


def factor_set(
    store: Store, patients: int, size: int = 64, seed: int = 0, classes: Sequence[str] = CLASSES, changes: bool = False
) -> Iterator[str]:
    """Write a set of phantoms with factors in the layout of ``phantom_set``.

    Also writes ``factors.csv``, a manifest of the images with their factors as columns, and last ``phantoms.json``,
    with the numbers behind the words.

    Args:
        store: Where to write.
        patients: Number of images; patient k has the k-th class, modulo the number of classes.
        size: Side of the images in pixels, 16 or more.
        seed: Random seed of the set.
        classes: Classes of the images: Normal and keys of OF_A_CLASS.
        changes: Also write each image with one factor replaced, for each factor, and ``changes.csv``, which lists them.

    Yields:
        The path of each image after it was written.

    Raises:
        ValueError: A class has no factors, or ``size`` is below 16.
    """
    if unknown := [label for label in classes if label not in ("Normal", *OF_A_CLASS)]:
        raise ValueError(f"no factors for class {unknown[0]!r}; there are Normal, {', '.join(OF_A_CLASS)}")
    rows, images, changed = [], [], []
    for patient in range(patients):
        factors = sample_factors(classes[patient % len(classes)], np.random.default_rng(_streams(seed, patient)[5]))
        made = factor_phantom(factors, patient, seed, size)
        image, ground_truth = quantise(made.image), quantise(made.ground_truth)
        path = write_image(store, made.label, patient, image, made.lungs, made.lesion, ground_truth)
        rows.append({"path": path, "label": made.label, "patient": patient, **factors.columns()})
        images.append({"file": path, "label": made.label, "patient": patient, **asdict(factors)})
        if changes:
            changed += _write_changes(store, path, factors, patient, seed, size)
        yield path
    store.put(MANIFEST, _csv(rows))
    if changes:
        store.put(CHANGES, _csv(changed))
    metadata = {"version": VERSION, "seed": seed, "size": size, "classes": list(classes), "images": images}
    store.put("phantoms.json", json.dumps(metadata, indent=1).encode())


def _write_changes(
    store: Store, path: str, factors: Factors, patient: int, seed: int, size: int
) -> list[dict[str, object]]:
    """Write an image's single changes; returns their rows of CHANGES."""
    label, _, name = path.split("/")
    rows: list[dict[str, object]] = []
    for factor, new in single_changes(factors).items():
        file = f"{label}/changes/{name.removesuffix('.png')}.{factor}.png"
        store.put(file, encode_grey(quantise(factor_phantom(new, patient, seed, size).image)))
        before, after = factors.columns()[factor], new.columns()[factor]
        rows.append({"path": path, "factor": factor, "before": before, "after": after, "changed": file})
    return rows


def _csv(rows: Sequence[dict[str, object]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
