"""The table of ``real_images.py``: images with boxes, candidates of a map, and the choice among them by halves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from real_rivals import Maps

from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.images import decode, decode_mask, to_square
from diffva_ray.data.shapes import lesion_mask
from diffva_ray.metrics.intervals import group_bootstrap, paired_difference
from diffva_ray.metrics.localization import absolute, positive, score, smooth
from diffva_ray.progress import LOG

GRID, SIZE = 64, 128  # of the scores, of the model
SMOOTHINGS = (0.0, 0.016, 0.03, 0.05, 0.08, 0.12)  # fractions of the width
SIGNS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "positive": positive,
    "negative": lambda m: positive(-m),
    "absolute": absolute,
}
EXPONENTS, FLOORS = (0.5, 1.0, 1.5), (0.02, 0.1, 0.3)  # of the blend (map / max + floor) * prior ** exponent
PRIOR_BLURS = (0.0, 0.03, 0.05, 0.08)
CARDIOMEGALY = "Cardiomegaly"
METRICS = ("auroc", "auprc", "pointing", "dice", "iou")


@dataclass(frozen=True)
class Images:
    """Boxed images: pixels at the model's and at the scoring grid's size, truth, finding, patient and half."""

    large: Maps
    small: Maps
    truth: NDArray[np.bool_]
    finding: NDArray[Any]
    patient: NDArray[Any]
    half: NDArray[np.int64]


def read(folder: str, size: int) -> Images:
    """Read the images that have a box or a mask."""
    dataset = open_dataset(folder)
    patients = pd.read_csv(Path(folder) / "manifest.csv").set_index("file")["patient"]
    polygons, rows = Path(folder) / "pathology_masks", []
    for image in dataset.images:
        pixels = decode(dataset.store.read(image.path))
        lesion = lesion_mask(dataset.shapes.get(image.path, ()), pixels.shape[1], pixels.shape[0], GRID)
        parts = [] if lesion is None else [lesion]
        stem = Path(image.path).stem
        parts += [decode_mask(file.read_bytes(), GRID) for file in sorted(polygons.glob(f"{stem}__*.png"))]
        if not parts or not np.any(parts):
            continue
        row = to_square(pixels, size), to_square(pixels, GRID), np.any(parts, axis=0), image.label, patients[image.path]
        rows.append(row)
    large, small, lesions, finding, patient = (np.array(column) for column in zip(*rows, strict=True))
    names = np.unique(patient)
    first = set(np.random.default_rng(0).permutation(names)[: len(names) // 2])
    half = np.array([0 if name in first else 1 for name in patient])
    return Images(large, small, lesions, finding, patient, half)


def normals(folder: str, count: int) -> Maps:
    """``count`` normal images of the training set at the scoring grid's size."""
    dataset = open_dataset(folder)
    chosen = [image for image in dataset.images if image.label == "Normal"]
    order = np.random.default_rng(0).permutation(len(chosen))[:count]
    return np.stack([to_square(decode(dataset.store.read(chosen[k].path)), GRID) for k in order])


def on_grid(maps: Maps) -> Maps:
    """Maps [n, size, size] as means over the cells of the scoring grid, [n, GRID, GRID]."""
    factor = maps.shape[1] // GRID
    return maps.reshape(len(maps), GRID, factor, GRID, factor).mean(axis=(2, 4))


@dataclass(frozen=True)
class Candidate:
    """A map with one setting, sign and smoothing, and the scores of all images."""

    setting: str
    maps: Maps  # [n, GRID, GRID], not negative


def candidates(settings: list[tuple[str, Maps]], signs: tuple[str, ...]) -> list[Candidate]:
    return [
        Candidate(f"{setting}; {sign}; smoothing {fraction:g}".removeprefix("; "), SIGNS[sign](smoothed))
        for setting, maps in settings
        for fraction in SMOOTHINGS
        for smoothed in [np.stack([smooth(one, fraction) for one in maps])]
        for sign in signs
    ]


def scores(maps: Maps, truth: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    found = [score(one, lesion) for one, lesion in zip(maps, truth, strict=True)]
    return {
        "auroc": np.array([one.auroc for one in found]),
        "auprc": np.array([one.auprc for one in found]),
        "pointing": np.array([one.pointing_game for one in found]),
    }


RANKS = np.linspace(0.5, 0.995, 60)


def overlaps(maps: Maps, truth: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    """Dice and IoU [n, thresholds] at thresholds on the values, and on their ranks within the image."""
    tables = []
    for scaled, thresholds in ((maps / max(float(np.quantile(maps, 0.999)), 1e-9), np.geomspace(0.01, 1, 60)),
                               (_ranks(maps), RANKS)):  # fmt: skip
        above = scaled[:, None] >= thresholds[None, :, None, None]
        hit = (above & truth[:, None]).sum((2, 3))
        both = above.sum((2, 3)) + truth.sum((1, 2))[:, None]
        tables.append((2 * hit / both, hit / (both - hit)))
    return {"dice": np.concatenate([t[0] for t in tables], 1), "iou": np.concatenate([t[1] for t in tables], 1)}


def _ranks(maps: Maps) -> Maps:
    flat = maps.reshape(len(maps), -1)
    ranks = flat.argsort(1).argsort(1) / flat.shape[1]
    return ranks.reshape(maps.shape).astype(np.float32)


def prior_of(data: Images, chosen: NDArray[np.bool_], blur: float) -> NDArray[np.float32]:
    """The mean lesion mask of some images, blurred; peak 1."""
    mean = smooth(data.truth[chosen].mean(axis=0).astype(np.float32), blur)
    return mean / mean.max()


def blended(maps: Maps, prior: NDArray[np.float32], exponent: float, floor: float) -> Maps:
    peak = np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-9)
    return (maps / peak + floor) * prior[None] ** exponent


def reported(data: Images, by_half: list[tuple[str, Maps]]) -> tuple[dict[str, Any], list[str]]:
    """Scores of all images, each by the candidate and threshold that the other half chose."""
    found = {metric: np.full(len(data.finding), np.nan) for metric in METRICS}
    for half, (_, maps) in enumerate(by_half):
        test, choose = data.half == half, (data.half != half) & (data.finding != CARDIOMEGALY)
        for metric, values in scores(maps[test], data.truth[test]).items():
            found[metric][test] = values
        curves = overlaps(maps, data.truth)
        for metric in ("dice", "iou"):
            best = int(curves[metric][choose].mean(axis=0).argmax())
            found[metric][test] = curves[metric][test, best]
    return found, [setting for setting, _ in by_half]


class Table:
    """The scores of every map."""

    def __init__(self, data: Images) -> None:
        self.data, self.rows, self.chosen = data, {}, {}
        self.counted = data.finding != CARDIOMEGALY
        self.priors = [self._best_prior(half) for half in (0, 1)]

    def _best_prior(self, half: int) -> NDArray[np.float32]:
        """The learned prior for a half: the boxes of the other, with the blur that is best within the other by a
        further split, without cardiomegaly."""
        others = (self.data.half != half) & self.counted
        inner = np.random.default_rng(1).random(len(others)) < 0.5
        values = []
        for blur in PRIOR_BLURS:
            parts = []
            for fit, use in ((others & inner, others & ~inner), (others & ~inner, others & inner)):
                prior = prior_of(self.data, fit, blur)
                parts.append(scores(np.repeat(prior[None], use.sum(), 0), self.data.truth[use])["auprc"].mean())
            values.append(np.mean(parts))
        return prior_of(self.data, others, PRIOR_BLURS[int(np.argmax(values))])

    def add(self, name: str, by_half: list[tuple[str, Maps]]) -> None:
        self.rows[name], self.chosen[name] = reported(self.data, by_half)
        LOG.info("%-32s AUPRC %.3f", name, self.rows[name]["auprc"][self.counted].mean())

    def add_chosen(self, name: str, options: list[Candidate], with_prior: bool = True) -> None:
        """Add a map by the setting that the other half chooses, and its blend with the prior."""
        auprc = [scores(option.maps, self.data.truth)["auprc"] for option in options]
        picks = []
        for half in (0, 1):
            choose = (self.data.half != half) & self.counted
            picks.append(int(np.argmax([values[choose].mean() for values in auprc])))
        self.add(name, [(options[pick].setting, options[pick].maps) for pick in picks])
        if with_prior:
            self.add(f"{name} x prior", [self._with_prior(options[pick], half) for half, pick in enumerate(picks)])

    def _with_prior(self, option: Candidate, half: int) -> tuple[str, Maps]:
        choose = (self.data.half != half) & self.counted
        best: tuple[float, str, tuple[float, float]] = (-1.0, "", (1.0, 0.1))
        for exponent in EXPONENTS:
            for floor in FLOORS:
                # the prior of the half on which is chosen comes from its boxes, too: from the other half's here
                maps = blended(option.maps[choose], self.priors[1 - half], exponent, floor)
                value = float(scores(maps, self.data.truth[choose])["auprc"].mean())
                if value > best[0]:
                    best = value, f"{option.setting}; exponent {exponent:g}, floor {floor:g}", (exponent, floor)
        return best[1], blended(option.maps, self.priors[half], *best[2])

    def summary(self, reference: str) -> list[dict[str, Any]]:
        """A row per map: means and intervals, the difference to the reference, and AUPRC by finding."""
        out = []
        patients = self.data.patient
        for name, values in self.rows.items():
            row: dict[str, Any] = {"map": name, "chosen": self.chosen[name]}
            for metric in METRICS:
                low, high = group_bootstrap(values[metric][self.counted], patients[self.counted], within=(0, 1))
                row[metric] = [float(values[metric][self.counted].mean()), low, high]
            row["auprc_minus_reference"] = self.difference(reference, name, self.counted)
            row["by_finding"] = {}
            for finding in sorted(set(self.data.finding)):
                of = self.data.finding == finding
                row["by_finding"][finding] = {
                    "images": int(of.sum()),
                    "auprc": float(values["auprc"][of].mean()),
                    "pointing": float(values["pointing"][of].mean()),
                    "iou": float(values["iou"][of].mean()),
                    "auprc_minus_reference": self.difference(reference, name, of),
                }
            out.append(row)
        return out

    def difference(self, first: str, second: str, of: NDArray[np.bool_], metric: str = "auprc") -> list[float]:
        """The second's mean minus the first's, and its paired interval."""
        values = np.stack([self.rows[first][metric][of], self.rows[second][metric][of]], axis=1)
        a, b, (low, high) = paired_difference(values, np.ones_like(values), list(self.data.patient[of]))
        return [b - a, low, high]
