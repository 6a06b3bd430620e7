"""How well a map finds a lesion: scores per image inside a region, trivial competitors, thresholds, an interval.

The map, its sign and its smoothing are the caller's to state; competitors are given the same (``baselines``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.stats import norm

Real = TypeVar("Real", np.float32, np.float64)

# Fixed, so that curves of different images and runs can be averaged and a threshold found on one set applied to
# another. Geometric (steps of 1.7%), because maps of faint lesions peak at a few hundredths and brightness near 1.
THRESHOLDS = np.geomspace(1e-3, 1.0, 400)
MANY = 20_000  # number of groups from which the normal interval replaces the bootstrap


@dataclass(frozen=True, eq=False)
class ImageScore:
    """Scores of one image; all in [0, 1], over the pixels of the region.

    ``auroc``, ``auprc`` (average precision): ties share one threshold, as in scikit-learn. ``dice_best``, ``iou_best``:
    at the image's own best threshold, an upper bound no reader of a map has. ``pointing_game``: 1 when the highest
    pixel lies in the truth, else 0; of several highest pixels, the share that does. ``energy_in_truth``: share of the
    positive saliency that lies in the truth, NaN where no saliency is positive. ``dice_curve``: float32, Dice of
    ``saliency >= t`` for each t of ``THRESHOLDS``.
    """

    auroc: float
    auprc: float
    dice_best: float
    iou_best: float
    pointing_game: float
    energy_in_truth: float
    dice_curve: NDArray[np.float32]


def score(
    saliency: NDArray[np.floating], truth: NDArray[np.bool_], region: NDArray[np.bool_] | None = None
) -> ImageScore | None:
    """Scores of ``saliency`` [H, W] (higher is more lesion; any finite range) against ``truth`` [H, W] inside
    ``region`` [H, W] (None: the whole image).

    Truth outside the region does not count. None when the truth inside the region is empty or fills it: there is
    nothing to find, or nothing to tell it from, and the image belongs in no mean. Raises ValueError for shapes that
    differ and for saliency that is not finite.

        >>> truth = np.zeros((8, 8), bool)
        >>> truth[2:4, 2:4] = True
        >>> found = score(truth + 0.0, truth)
        >>> found.auroc, found.dice_best, found.pointing_game
        (1.0, 1.0, 1.0)
        >>> score(truth + 0.0, np.zeros((8, 8), bool)) is None
        True
    """
    if saliency.ndim != 2 or any(mask.shape != saliency.shape for mask in (truth, region) if mask is not None):
        shapes = ", ".join(str(array.shape) for array in (saliency, truth, region) if array is not None)
        raise ValueError(f"saliency, truth and region are [H, W] of one shape, got {shapes}")
    inside = np.ones(saliency.shape, bool) if region is None else region.astype(bool)
    values = saliency[inside].astype(np.float64)
    lesion = truth[inside].astype(bool)
    if not np.isfinite(values).all():
        raise ValueError("saliency has values that are not finite")
    positives, negatives = int(lesion.sum()), int((~lesion).sum())
    if not positives or not negatives:
        return None

    order = np.argsort(-values, kind="stable")
    values = values[order]
    hits = np.cumsum(lesion[order])  # hits[k - 1]: lesion pixels among the k highest
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)  # last pixel of each run of equal values
    taken = ends + 1
    found = hits[ends]
    sensitivity = np.concatenate([[0.0], found / positives])
    false_alarms = np.concatenate([[0.0], (taken - found) / negatives])
    positive_values = np.clip(values, 0, None)
    energy = positive_values.sum()

    above = np.searchsorted(-values, -THRESHOLDS, side="right")  # pixels with saliency >= t
    found_above = np.concatenate([[0], hits])[above]
    return ImageScore(
        auroc=float(np.sum(np.diff(false_alarms) * (sensitivity[1:] + sensitivity[:-1])) / 2),
        auprc=float(np.sum(np.diff(sensitivity) * found / taken)),
        dice_best=float(np.max(2 * found / (taken + positives))),
        iou_best=float(np.max(found / (taken - found + positives))),
        pointing_game=float(found[0] / taken[0]),
        energy_in_truth=float(positive_values[lesion[order]].sum() / energy) if energy > 0 else float("nan"),
        dice_curve=(2 * found_above / (above + positives)).astype(np.float32),
    )


def boxes_mask(
    boxes: Iterable[tuple[float, float, float, float]], width: int, height: int, size: int
) -> NDArray[np.bool_]:
    """Boxes (x, y, w, h in pixels of the ``width`` x ``height`` original) as a mask bool [size, size] of the squashed
    square.

    A pixel belongs to a box that holds its centre; a box too thin to hold one gets the pixel its own centre lies in.
    What lies outside the image is cut off. Raises ValueError for a box without area.
    """
    mask = np.zeros((size, size), dtype=bool)
    for x, y, w, h in boxes:
        if not (w > 0 and h > 0):
            raise ValueError(f"box {(x, y, w, h)} has no area")
        mask[_span(y, h, size / height), _span(x, w, size / width)] = True
    return mask


def _span(start: float, length: float, scale: float) -> slice:
    first, last = int(np.ceil(start * scale - 0.5)), int(np.ceil((start + length) * scale - 0.5))
    if first == last:
        first = int(np.floor((start + length / 2) * scale))
        last = first + 1
    return slice(max(first, 0), max(last, 0))


def positive(m: NDArray[Real]) -> NDArray[Real]:
    """max(M, 0) of a signed map [H, W] in [-1, 1], in [0, 1]: what generating darkened, the sign of opacities."""
    return np.maximum(m, 0)


def absolute(m: NDArray[Real]) -> NDArray[Real]:
    """|M| of a signed map [H, W] in [-1, 1], in [0, 1]: any change."""
    return np.abs(m)


SALIENCY: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {"positive": positive, "absolute": absolute}


def smooth(m: NDArray[Real], fraction: float) -> NDArray[Real]:
    """``m`` [H, W] under a Gaussian of sigma ``fraction`` x width, reflected at the border, in the range and type of
    ``m``; 0 leaves it as it is."""
    return gaussian_filter(m, fraction * m.shape[1], mode="reflect") if fraction else m


def brightness(source: NDArray[np.float32]) -> NDArray[np.float32]:
    """The image [H, W] in [0, 1] itself: opacities are bright, so this is the score any opacity map has to beat."""
    return source


def autoencoder_difference(source: NDArray[np.float32], reconstruction: NDArray[np.float32]) -> NDArray[np.float32]:
    """I - D(E(I)) of two images [H, W] in [0, 1], in [-1, 1]: what the autoencoder alone changes, without any
    prompt."""
    return source - reconstruction


def centre_prior(size: int) -> NDArray[np.float32]:
    """A Gaussian [size, size] at the image's centre, peak 1: it has not seen the image. Its sigma of a quarter of the
    width is chosen, not fitted: within one sigma lies the middle half of the image."""
    offset = (np.arange(size) + 0.5) / size - 0.5
    profile = np.exp(-0.5 * (offset / 0.25) ** 2)
    return np.outer(profile, profile).astype(np.float32)


def baselines(
    source: NDArray[np.float32], reconstruction: NDArray[np.float32] | None, smoothing: float
) -> dict[str, NDArray[np.float32]]:
    """The trivial competitors of a map on a square image [size, size] in [0, 1], by name: their positive parts, with
    the map's own smoothing.

    Without a reconstruction there is no ``autoencoder_difference``.
    """
    signed = {"brightness": brightness(source), "centre_prior": centre_prior(source.shape[1])}
    if reconstruction is not None:
        signed["autoencoder_difference"] = autoencoder_difference(source, reconstruction)
    return {name: positive(smooth(m, smoothing)) for name, m in signed.items()}


def fixed_threshold(curves: NDArray[np.floating]) -> tuple[float, float]:
    """The threshold with the best mean Dice over images' curves [N, T], and that mean; the lowest of equals.

    Found on one set and applied to another (``dice_at``), it is a number a reader can have. Raises ValueError for
    curves of another grid and for none.
    """
    _on_grid(curves)
    if not len(curves):
        raise ValueError("no image to find a threshold on")
    mean = curves.mean(axis=0, dtype=np.float64)
    best = int(np.argmax(mean))
    return float(THRESHOLDS[best]), float(mean[best])


def dice_at(curves: NDArray[Real], threshold: float) -> NDArray[Real]:
    """Each image's Dice [N] in [0, 1], from curves [N, T], at the grid's threshold nearest to ``threshold``. Raises
    ValueError when that lies off the grid, and for curves of another grid."""
    _on_grid(curves)
    step = THRESHOLDS[1] / THRESHOLDS[0]
    if not THRESHOLDS[0] / step < threshold < THRESHOLDS[-1] * step:
        raise ValueError(f"threshold {threshold:g} lies outside {THRESHOLDS[0]:g} to {THRESHOLDS[-1]:g}")
    return curves[:, int(np.argmin(np.abs(np.log(THRESHOLDS / threshold))))]


def _on_grid(curves: NDArray[np.floating]) -> None:
    if curves.ndim != 2 or curves.shape[1] != len(THRESHOLDS):
        raise ValueError(f"Dice curves are [N, {len(THRESHOLDS)}], got {curves.shape}")


def group_bootstrap(
    values: Sequence[float] | NDArray[np.floating],
    groups: Sequence[Hashable] | NDArray[Any],
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95% percentile interval (low, high) of the mean of ``values``, drawing whole groups (patients) anew.

    Images of one patient are alike, so drawing images would give too narrow an interval. NaNs are left out. (nan, nan)
    when fewer than two groups have a value. From MANY groups on it is the normal interval of a ratio of sums, which the
    bootstrap's then equals to within the noise of its own draws. Raises ValueError when values and groups differ in
    length.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.shape != (len(groups),):
        raise ValueError(f"one group per value is needed, got {numbers.shape} values and {len(groups)} groups")
    index, names = pd.factorize(
        groups if isinstance(groups, np.ndarray) else np.array([*groups, None], object)[:-1],
        use_na_sentinel=False,
    )
    kept = ~np.isnan(numbers)
    counts = np.bincount(index[kept], minlength=len(names))
    sums = np.bincount(index[kept], weights=numbers[kept], minlength=len(names))[counts > 0]
    counts = counts[counts > 0]
    if len(counts) < 2:
        return float("nan"), float("nan")
    if len(counts) >= MANY:
        mean = sums.sum() / counts.sum()
        reach = norm.ppf(0.975) * np.sqrt(np.square(sums - mean * counts).sum()) / counts.sum()
        return float(mean - reach), float(mean + reach)
    random = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        chosen = random.integers(len(counts), size=len(counts))
        means[draw] = sums[chosen].sum() / counts[chosen].sum()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
