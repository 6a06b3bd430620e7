"""Scores of single counterfactuals that no set distance shows: how little changes, where, and whether it decides.

Maps are signed float arrays [H, W] in [-1, 1]; images and counterfactuals grey float32 [H, W] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffva_ray.metrics.manifold import squared_distances

CHANGED = 0.05  # of the grey range: a pixel that differs by more is changed (phantoms call a lesion visible from there)


def changed_share(m: NDArray[np.floating], threshold: float = CHANGED) -> float:
    """Minimality: share of pixels with |M| above ``threshold``, in [0, 1]. On healthy images under a healthy prompt it
    is the false attribution.

        >>> changed_share(np.array([[0.0, 0.1], [-0.1, 0.01]]))
        0.5
    """
    return float((np.abs(m) > threshold).mean())


def collateral_change(before: NDArray[np.floating], after: NDArray[np.floating], own: int, healthy: int) -> float:
    """Change of what nobody asked to change: sum of |p' - p| over all classes but the image's ``own`` and the
    ``healthy`` one, of a judge's class probabilities [classes] before and after, in [0, 1]; NaN with no other class.

    Healing may move probability from the image's own class to the healthy one; what arrives elsewhere is another
    disease that the counterfactual now shows (or one that the image showed and that went along)."""
    others = [n for n in range(len(before)) if n not in (own, healthy)]
    return float(np.abs(np.asarray(after)[others] - np.asarray(before)[others]).sum()) if others else float("nan")


@dataclass(frozen=True)
class Outside:
    """``change``: mean |M| outside the lesion (hallucination); ``inside``: mean |M| in it; ``share``: of the map's
    energy that lies outside, in [0, 1], NaN for a map of zeros."""

    change: float
    inside: float
    share: float


def outside_lesion(m: NDArray[np.floating], lesion: NDArray[np.bool_]) -> Outside | None:
    """Where a map [H, W] changes the image, against the lesion mask [H, W]; None when the mask is empty or everything.
    Raises ValueError for unequal shapes."""
    if m.shape != lesion.shape:
        raise ValueError(f"map and lesion are [H, W] of one shape, got {m.shape} and {lesion.shape}")
    lesion = lesion.astype(bool)
    if not lesion.any() or lesion.all():
        return None
    energy = np.abs(m.astype(np.float64))
    total = energy.sum()
    share = float(energy[~lesion].sum() / total) if total > 0 else float("nan")
    return Outside(float(energy[~lesion].mean()), float(energy[lesion].mean()), share)


def side_share(m: NDArray[np.floating]) -> float:
    """Share of |M| of a map [H, W] on the patient's left, which is the right half of the image, in [0, 1]; NaN for a
    map of zeros. A measure of our own, of whether a prompt's "left" and "right" are obeyed; of an odd width the middle
    column counts half."""
    energy = np.abs(m.astype(np.float64))
    total = energy.sum()
    width = m.shape[1]
    right_half = energy[:, (width + 1) // 2 :].sum() + (energy[:, width // 2].sum() / 2 if width % 2 else 0.0)
    return float(right_half / total) if total > 0 else float("nan")


def cout(
    healthy: Callable[[NDArray[np.float32]], NDArray[np.floating]],
    image: NDArray[np.float32],
    counterfactual: NDArray[np.float32],
    steps: int = 50,
) -> tuple[float, NDArray[np.float64]]:
    """COUT (Khorram & Fuxin 2022) in [-1, 1], and its curve [steps + 1].

    Pixels of the counterfactual replace the image's in the order of |image - counterfactual|, largest first; after each
    step ``healthy(images [n, H, W])`` gives the probabilities [n] of the target. The score is the area under the
    target's curve less that under the rest's (1 - p): near 1 when few, decisive pixels turn the verdict. Ties are in
    raster order. Raises ValueError for unequal shapes or no step.
    """
    if image.shape != counterfactual.shape or image.ndim != 2 or steps < 1:
        raise ValueError(
            f"image and counterfactual are [H, W] of one shape and steps >= 1, got {image.shape}, "
            f"{counterfactual.shape}, {steps}"
        )
    order = np.argsort(-np.abs(image.astype(np.float64) - counterfactual), axis=None, kind="stable")
    stages = np.repeat(image[None], steps + 1, axis=0).reshape(steps + 1, -1)
    for step in range(1, steps + 1):
        taken = order[: round(step * image.size / steps)]
        stages[step, taken] = counterfactual.ravel()[taken]
    curve = np.asarray(healthy(stages.reshape(steps + 1, *image.shape)), dtype=np.float64)
    area = float((curve[1:] + curve[:-1]).sum() / 2 / steps)
    return 2 * area - 1, curve


@dataclass(frozen=True)
class Memorisation:
    """``nearer``: share of counterfactuals nearer to a training image than to any held-out image, sets drawn to equal
    size; one half when training images are not special. ``without_memory``: where 95 % of that share lie when images
    are dealt to the two sets at random; ``p_value``: how often it is then at least as large. ``train``, ``held_out``:
    median distances to the nearest."""

    nearer: float
    without_memory: tuple[float, float]
    p_value: float
    train: float
    held_out: float
    n: int
    set_size: int


def memorisation(
    counterfactuals: NDArray[np.floating],
    train: NDArray[np.floating],
    held_out: NDArray[np.floating],
    deals: int = 999,
    seed: int = 0,
) -> Memorisation:
    """Audit of counterfactuals [N, d] against features (or pixels) of training images [N1, d] and images that the model
    never saw [N2, d], which should be of one source and class.

    All counterfactuals share the two sets, so the share scatters with the sets and not with N: a permutation test deals
    the images of both anew. Equal distances count half. Raises ValueError below two rows in a set.
    """
    size = min(len(train), len(held_out))
    if size < 2 or len(counterfactuals) < 2:
        raise ValueError(
            f"an audit needs two images in each set, got {len(counterfactuals)}, {len(train)} and {len(held_out)}"
        )
    random = np.random.default_rng(seed)
    images = [z[random.choice(len(z), size, replace=False)].astype(np.float64) for z in (train, held_out)]
    distances = np.sqrt(squared_distances(counterfactuals.astype(np.float64), np.concatenate(images)))

    def share(order: NDArray[np.intp]) -> float:
        first, second = (distances[:, order[part]].min(axis=1) for part in (slice(size), slice(size, None)))
        return float(np.mean((first < second) + 0.5 * (first == second)))

    observed = np.arange(2 * size)
    nearer = share(observed)
    dealt = np.array([share(random.permutation(2 * size)) for _ in range(deals)])
    low, high = np.quantile(dealt, [0.025, 0.975])
    return Memorisation(
        nearer,
        (float(low), float(high)),
        float((1 + np.sum(dealt >= nearer)) / (1 + deals)),
        float(np.median(distances[:, :size].min(axis=1))),
        float(np.median(distances[:, size:].min(axis=1))),
        len(counterfactuals),
        size,
    )


def flip_rate(
    before: Sequence[float] | NDArray[np.floating], after: Sequence[float] | NDArray[np.floating]
) -> tuple[float, int]:
    """Share, in [0, 1], of images that turn healthy (probability above one half) among those the judge called abnormal
    before, and the number of these, from probabilities of healthy [n] before and after. NaN without any. Raises
    ValueError for sequences of unequal length."""
    old, new = np.asarray(before, float), np.asarray(after, float)
    if old.shape != new.shape:
        raise ValueError(f"one probability before and one after is needed, got {old.shape} and {new.shape}")
    turned = new[old <= 0.5] > 0.5
    return (float(turned.mean()) if len(turned) else float("nan")), len(turned)
