"""Scores of single counterfactuals: how much changes, where, and whether the change decides a judge's answer.

Maps are signed float arrays [H, W] in [-1, 1]; images and counterfactuals grey float32 [H, W] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffva_ray.metrics.manifold import squared_distances

CHANGED = 0.05  # of the grey range: a pixel that differs by more is changed (the limit for visible phantom lesions)


def changed_share(m: NDArray[np.floating], threshold: float = CHANGED) -> float:
    """Minimality: share of changed pixels. On healthy images under a healthy prompt it is the false attribution.

    Args:
        m: Attribution map [H, W] in [-1, 1].
        threshold: A pixel is changed if |M| is above.

    Returns:
        Share of pixels, in [0, 1].

    Examples:
        >>> changed_share(np.array([[0.0, 0.1], [-0.1, 0.01]]))
        0.5
    """
    return float((np.abs(m) > threshold).mean())


def collateral_change(before: NDArray[np.floating], after: NDArray[np.floating], own: int, healthy: int) -> float:
    """Unwanted change: sum of |p' - p| over all classes but the image's own and the healthy one.

    A counterfactual may move probability from the image's class to the healthy one. Probability that moves to another
    class is a disease that the counterfactual now shows; from another class, one that it lost besides.

    Args:
        before: A judge's probabilities [classes] of the image.
        after: The same of the counterfactual.
        own: Index of the image's class.
        healthy: Index of the healthy class.

    Returns:
        The sum, between 0 and 2; NaN without another class.
    """
    others = [n for n in range(len(before)) if n not in (own, healthy)]
    return float(np.abs(np.asarray(after)[others] - np.asarray(before)[others]).sum()) if others else float("nan")


@dataclass(frozen=True)
class Outside:
    """Change of an image outside and inside its lesion."""

    change: float  # mean |M| outside the lesion (hallucination)
    inside: float  # mean |M| inside
    share: float  # share of the map's energy that is outside, in [0, 1]; NaN for a map of zeros


def outside_lesion(m: NDArray[np.floating], lesion: NDArray[np.bool_]) -> Outside | None:
    """Compare a map with the lesion.

    Args:
        m: Attribution map [H, W] in [-1, 1].
        lesion: Lesion mask [H, W].

    Returns:
        Change outside and inside; None if the mask is empty or covers the image.

    Raises:
        ValueError: If the shapes differ.
    """
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
    """Share of |M| on the patient's left, which is the right half of the image: does an edit follow "left" and "right"?

    A measure of this project, not of the literature. In an odd width the middle column counts half.

    Args:
        m: Attribution map [H, W] in [-1, 1].

    Returns:
        The share, in [0, 1]; NaN for a map of zeros.
    """
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
    """COUT (Khorram & Fuxin 2022): whether few pixels of the counterfactual decide the judge's answer.

    Pixels of the counterfactual replace the image's in the order of |image - counterfactual|, largest first (ties in
    raster order). The score is the area under the target's curve minus that under the rest's (1 - p).

    Args:
        healthy: Function from images [n, H, W] to probabilities [n] of the target class.
        image: Grey image [H, W] in [0, 1].
        counterfactual: Its counterfactual [H, W] in [0, 1].
        steps: Number of replacements of equal size.

    Returns:
        COUT in [-1, 1], near 1 when few pixels suffice, and the target's curve [steps + 1].

    Raises:
        ValueError: If the shapes differ or there is no step.
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


def causal_pair(
    healthy: Callable[[NDArray[np.float32]], NDArray[np.floating]],
    image: NDArray[np.float32],
    counterfactual: NDArray[np.float32],
    region: NDArray[np.bool_],
) -> bool | None:
    """Whether a region decides a judge's answer: the counterfactual inside it makes the image healthy, outside it not.

    A map is right when its changed pixels are such a region; a counterfactual whose other changes already convince the
    judge is not explained by its map. The same region mirrored left to right is the level of chance.

    Args:
        healthy: Function from images [n, H, W] to probabilities [n] of healthy.
        image: Grey image [H, W] in [0, 1].
        counterfactual: Its counterfactual [H, W] in [0, 1].
        region: The region, bool [H, W].

    Returns:
        The answer; None where the judge calls the image itself healthy.

    Raises:
        ValueError: If the shapes differ.
    """
    if not image.shape == counterfactual.shape == region.shape:
        raise ValueError(
            f"image, counterfactual and region are [H, W] of one shape, got {image.shape}, {counterfactual.shape}, "
            f"{region.shape}"
        )
    inside, outside = np.where(region, counterfactual, image), np.where(region, image, counterfactual)
    before, with_inside, with_outside = healthy(np.stack([image, inside, outside]))
    return None if before > 0.5 else bool(with_inside > 0.5 >= with_outside)


@dataclass(frozen=True)
class Memorisation:
    """Audit of memorised training images; sets are sampled to equal size."""

    nearer: float  # share of counterfactuals nearer to a training image than to any held-out one; 1/2 without memory
    without_memory: tuple[float, float]  # 95 % interval of that share when images are dealt to the sets at random
    p_value: float  # how often a random deal gives at least that share
    train: float  # median distance to the nearest training image
    held_out: float  # median distance to the nearest held-out image
    n: int  # counterfactuals
    set_size: int  # images in each set


def memorisation(
    counterfactuals: NDArray[np.floating],
    train: NDArray[np.floating],
    held_out: NDArray[np.floating],
    deals: int = 999,
    seed: int = 0,
) -> Memorisation:
    """Test whether counterfactuals are nearer to training images than to unseen ones.

    All counterfactuals share the two sets, so the share scatters with the sets and not with N; hence the permutation
    test, which deals the images of both sets anew. Equal distances count half.

    Args:
        counterfactuals: Features (or pixels) of counterfactuals [N, d].
        train: Features of training images [N1, d].
        held_out: Features of images that the model never saw [N2, d], of the same source and class.
        deals: Number of permutations.
        seed: Seed of the sampling and the permutations.

    Returns:
        The share of counterfactuals nearer to a training image, its interval without memory, and distances.

    Raises:
        ValueError: If there are fewer than two rows in a set.
    """
    size = min(len(train), len(held_out))
    if size < 2 or len(counterfactuals) < 2:
        raise ValueError(
            f"an audit needs two images in each set, got {len(counterfactuals)}, {len(train)} and {len(held_out)}"
        )
    random = np.random.default_rng(seed)
    # Distances of every counterfactual to both sets, sampled to equal size.
    images = [z[random.choice(len(z), size, replace=False)].astype(np.float64) for z in (train, held_out)]
    distances = np.sqrt(squared_distances(counterfactuals.astype(np.float64), np.concatenate(images)))

    def share(order: NDArray[np.intp]) -> float:
        first, second = (distances[:, order[part]].min(axis=1) for part in (slice(size), slice(size, None)))
        return float(np.mean((first < second) + 0.5 * (first == second)))

    # The observed share, and that of random deals.
    nearer = share(np.arange(2 * size))
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
    """Flip rate: share of images called abnormal whose counterfactual the judge calls healthy (probability above 1/2).

    Args:
        before: Probabilities of healthy [n] of the images.
        after: The same of their counterfactuals.

    Returns:
        The share, in [0, 1] (NaN without any abnormal image), and the number of images called abnormal.

    Raises:
        ValueError: If the lengths differ.
    """
    old, new = np.asarray(before, float), np.asarray(after, float)
    if old.shape != new.shape:
        raise ValueError(f"one probability before and one after is needed, got {old.shape} and {new.shape}")
    flipped = new[old <= 0.5] > 0.5
    return (float(flipped.mean()) if len(flipped) else float("nan")), len(flipped)
