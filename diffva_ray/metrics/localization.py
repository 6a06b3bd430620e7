"""Localization of lesions by attribution maps: scores per image inside a region, and thresholds.

The caller chooses the map, its sign and its smoothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

Real = TypeVar("Real", np.float32, np.float64)

# Fixed, so that curves of images and runs can be averaged and a threshold of one set can be applied to another.
# Geometric (steps of 1.7%), because maps of faint lesions peak at a few hundredths and brightness near 1.
THRESHOLDS = np.geomspace(1e-3, 1.0, 400)


@dataclass(frozen=True, eq=False)
class ImageScore:
    """Scores of one image, all in [0, 1], over the pixels of the region."""

    auroc: float  # ties share one threshold, as in scikit-learn
    auprc: float  # average precision; ties likewise
    dice_best: float  # at the image's own best threshold: an upper bound that no reader of a map reaches
    iou_best: float  # likewise
    pointing_game: float  # 1 if the highest pixel is in the truth, else 0; of several highest pixels, the share that is
    energy_in_truth: float  # share of the positive saliency in the truth; NaN where no saliency is positive
    dice_curve: NDArray[np.float32]  # Dice of ``saliency >= t`` for each t of ``THRESHOLDS``


def score(
    saliency: NDArray[np.floating], truth: NDArray[np.bool_], region: NDArray[np.bool_] | None = None
) -> ImageScore | None:
    """Score a saliency map against a lesion mask.

    Args:
        saliency: Map [H, W] of any finite range; higher is more lesion.
        truth: Lesion mask [H, W]; pixels outside the region do not count.
        region: Pixels to score, bool [H, W]; None for the whole image.

    Returns:
        The scores. None if the truth inside the region is empty or fills it: such an image belongs in no mean.

    Raises:
        ValueError: If the shapes differ, or the saliency is not finite.

    Examples:
        >>> truth = np.zeros((8, 8), bool)
        >>> truth[2:4, 2:4] = True
        >>> result = score(truth + 0.0, truth)
        >>> result.auroc, result.dice_best, result.pointing_game
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

    # ROC and precision-recall: lower the threshold through the runs of equal values.
    order = np.argsort(-values, kind="stable")
    values = values[order]
    hits = np.cumsum(lesion[order])  # hits[k - 1]: lesion pixels among the k highest
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)  # last pixel of each run of equal values
    taken = ends + 1
    true_positives = hits[ends]
    sensitivity = np.concatenate([[0.0], true_positives / positives])
    false_alarms = np.concatenate([[0.0], (taken - true_positives) / negatives])

    # Energy in the truth, and Dice at the fixed thresholds.
    positive_values = np.clip(values, 0, None)
    energy = positive_values.sum()
    above = np.searchsorted(-values, -THRESHOLDS, side="right")  # pixels with saliency >= t
    hits_above = np.concatenate([[0], hits])[above]
    return ImageScore(
        auroc=float(np.sum(np.diff(false_alarms) * (sensitivity[1:] + sensitivity[:-1])) / 2),
        auprc=float(np.sum(np.diff(sensitivity) * true_positives / taken)),
        dice_best=float(np.max(2 * true_positives / (taken + positives))),
        iou_best=float(np.max(true_positives / (taken - true_positives + positives))),
        pointing_game=float(true_positives[0] / taken[0]),
        energy_in_truth=float(positive_values[lesion[order]].sum() / energy) if energy > 0 else float("nan"),
        dice_curve=(2 * hits_above / (above + positives)).astype(np.float32),
    )


def positive(m: NDArray[Real]) -> NDArray[Real]:
    """max(M, 0) of a signed map [H, W] in [-1, 1]: what the edit darkened, the sign of opacities; in [0, 1]."""
    return np.maximum(m, 0)


def absolute(m: NDArray[Real]) -> NDArray[Real]:
    """|M| of a signed map [H, W] in [-1, 1]: any change; in [0, 1]."""
    return np.abs(m)


SALIENCY: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {"positive": positive, "absolute": absolute}


def smooth(m: NDArray[Real], fraction: float) -> NDArray[Real]:
    """``m`` [H, W] smoothed by a Gaussian of sigma ``fraction`` x width, reflected at the border; range and type stay,
    and a ``fraction`` of 0 changes nothing."""
    return gaussian_filter(m, fraction * m.shape[1], mode="reflect") if fraction else m


def on_grid(m: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """``m`` [H, W] resized to [size, size], bilinear and antialiased, which keeps zero, sign and range."""
    if m.shape == (size, size):
        return m
    return np.asarray(Image.fromarray(m).resize((size, size), Image.Resampling.BILINEAR), np.float32)


def fixed_threshold(curves: NDArray[np.floating]) -> tuple[float, float]:
    """Threshold with the best mean Dice over images, or IoU with ``iou_curves``; the lowest of equals.

    Chosen on one set and applied to another (``dice_at``), it gives a Dice that a reader can reach.

    Args:
        curves: Dice curves [N, T] on THRESHOLDS.

    Returns:
        The threshold, and its mean Dice.

    Raises:
        ValueError: If there is no curve, or the curves are on another grid.
    """
    _check_grid(curves)
    if not len(curves):
        raise ValueError("no image to choose a threshold on")
    mean = curves.mean(axis=0, dtype=np.float64)
    best = int(np.argmax(mean))
    return float(THRESHOLDS[best]), float(mean[best])


def dice_at(curves: NDArray[Real], threshold: float) -> NDArray[Real]:
    """Dice of each image at the grid's threshold nearest to a given one.

    Args:
        curves: Dice curves [N, T] on THRESHOLDS.
        threshold: A threshold within the grid.

    Returns:
        Dice [N], in [0, 1].

    Raises:
        ValueError: If the threshold is off the grid, or the curves are on another grid.
    """
    _check_grid(curves)
    step = THRESHOLDS[1] / THRESHOLDS[0]
    if not THRESHOLDS[0] / step < threshold < THRESHOLDS[-1] * step:
        raise ValueError(f"threshold {threshold:g} lies outside {THRESHOLDS[0]:g} to {THRESHOLDS[-1]:g}")
    return curves[:, int(np.argmin(np.abs(np.log(THRESHOLDS / threshold))))]


def iou_curves(curves: NDArray[Real]) -> NDArray[Real]:
    """Intersection over union of the same masks as in Dice curves of any shape: IoU = Dice / (2 - Dice)."""
    return curves / (2 - curves)


def _check_grid(curves: NDArray[np.floating]) -> None:
    if curves.ndim != 2 or curves.shape[1] != len(THRESHOLDS):
        raise ValueError(f"Dice curves are [N, {len(THRESHOLDS)}], got {curves.shape}")
