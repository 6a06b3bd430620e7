"""Scores single images against ground truth, shard by shard, and merges the scores.

Tables are means over these scores, so records can be grouped in any way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffva_ray.data.images import BadImage
from diffva_ray.evaluate.baselines import Baselines
from diffva_ray.evaluate.records import (
    Lesions,
    RecordImages,
    Truth,
    check_own_images,
    read_images,
    read_truth,
    under,
)
from diffva_ray.generate.run import Run
from diffva_ray.metrics.localization import SALIENCY, iou_curves, score
from diffva_ray.metrics.ssim import psnr, ssim
from diffva_ray.schema import Record, TableRow

SIMPLE = ("auroc", "auprc", "dice_best", "iou_best", "pointing_game", "energy_in_truth")  # numbers of an ImageScore
CATEGORIES = ("label", "map", "region", "setting")  # columns stored as categories
Curve = tuple[NDArray[np.float64], int]  # sum of images' Dice and IoU curves [2, T], number of images


@dataclass
class LocalizationScores:
    """Localisation scores of images."""

    images: pd.DataFrame = field(default_factory=pd.DataFrame)  # one row per image and map, without its Dice curve
    curves: dict[tuple[str, str], Curve] = field(default_factory=dict)  # by (map and setting, class)
    unread: set[str] = field(default_factory=set)  # images with an unreadable image, mask or ground truth file

    @classmethod
    def of(cls, rows: Sequence[TableRow], unread: Iterable[str] = ()) -> LocalizationScores:
        """Collect rows of ``score_records`` or ``score_image`` with ``label``, ``image_path`` and, if swept,
        ``setting``."""
        curves: dict[tuple[str, str], Curve] = {}
        for row in rows:
            key = under(row["map"], row.get("setting", "")), row["label"]
            dice = row["dice_curve"].astype(np.float64)
            before, n = curves.get(key, (0.0, 0))
            curves[key] = before + np.stack([dice, iou_curves(dice)]), n + 1
        images = [{key: value for key, value in row.items() if key != "dice_curve"} for row in rows]
        return cls(narrow(pd.DataFrame(images)), curves, set(unread))

    @classmethod
    def merged(cls, parts: Iterable[LocalizationScores]) -> LocalizationScores:
        """Merge parts: concatenate their images and add up their curves."""
        frames, curves, unread = list[pd.DataFrame](), dict[tuple[str, str], Curve](), set[str]()
        for part in parts:
            frames.append(part.images)
            unread |= part.unread
            for key, (total, n) in part.curves.items():
                before, count = curves.get(key, (0.0, 0))
                curves[key] = before + total, count + n
        return cls(stacked(frames), curves, unread)

    def mean_curve(self, map_name: str, label: str | None = None, iou: bool = False) -> NDArray[np.float64]:
        """Mean curve [1, T] of Dice, or of IoU, of a map over one class; ``label`` None: over all classes."""
        curves = [curve for (name, of), curve in self.curves.items() if name == map_name and label in (None, of)]
        total: NDArray[np.float64] = np.sum([curve for curve, _ in curves], axis=0)
        mean: NDArray[np.float64] = total[[int(iou)]] / sum(n for _, n in curves)
        return mean


def narrow(frame: pd.DataFrame) -> pd.DataFrame:
    """Store the columns CATEGORIES as categories, to save memory."""
    return frame.astype({name: "category" for name in CATEGORIES if name in frame})


def stacked(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Concatenate frames of ``narrow``; empty ones are left out."""
    frames = [frame for frame in frames if len(frame)]
    if not frames:
        return pd.DataFrame()
    plain = [frame.astype({name: object for name in CATEGORIES if name in frame}) for frame in frames]
    return narrow(pd.concat(plain, ignore_index=True))


def score_records(
    run: Run,
    rows: Sequence[Record],
    lesions: Lesions,
    baselines: Baselines | None = None,
    unread: set[str] | None = None,
) -> tuple[list[TableRow], list[TableRow]]:
    """Score ``ok`` records: localisation rows (one per image and map) and ground truth rows (one per image with a
    ground-truth counterfactual).

    A localisation row holds the scores of ``metrics.localization.ImageScore`` with its Dice curve. Without
    ``baselines`` only the run's own maps are scored. The paths of images with an unreadable or changed image, mask or
    ground truth file are added to ``unread``; without its planned lung mask an image has no localisation row, because
    the region would be another one.
    """
    unread = set() if unread is None else unread
    localization, ground_truth = [], []
    rows = [row for row in rows if row["lesion_mask_path"] or row["image_path"] in lesions or row["ground_truth_path"]]
    for row in rows:
        try:
            truth = read_truth(run, row, lesions)
            images = read_images(run, row)
        except (OSError, BadImage):  # report it: verify checks only the run's own files
            check_own_images(run, row)
            unread.add(row["image_path"])
            continue
        if lost(row, truth):
            unread.add(row["image_path"])
        names = names_of(row)
        if truth.lesion is not None and (truth.lungs is not None or not row["lung_mask_path"]):
            maps = maps_of(images, baselines, row["image_path"])
            localization += [{**names, **scores} for scores in score_image(maps, truth)]
        if truth.counterfactual is not None:
            ground_truth.append({**names, **ground_truth_scores(images, truth)})
    return localization, ground_truth


def names_of(record: Record) -> TableRow:
    """What identifies a record in a table of scores; ``group``: the patient, or the image where it is unknown."""
    group = record["patient"] or record["image_path"]
    return {
        "record_id": record["record_id"],
        "image_path": record["image_path"],
        "label": record["label"],
        "group": group,
    }


def lost(record: Record, truth: Truth) -> bool:
    """Whether a mask or ground-truth counterfactual that the record names is None in ``read_truth``."""
    named = (
        (record["lesion_mask_path"], truth.lesion),
        (record["lung_mask_path"], truth.lungs),
        (record["ground_truth_path"], truth.counterfactual),
    )
    return any(path and array is None for path, array in named)


def maps_of(images: RecordImages, baselines: Baselines | None, path: str) -> dict[str, NDArray[np.float32]]:
    """The saliency maps [size, size] of the image at ``path`` and of the baselines, by name."""
    maps = {name: transform(images.signed_map) for name, transform in SALIENCY.items()}
    if baselines is None:
        return maps
    return maps | baselines.beside(maps["positive"], path) | baselines.maps(images.image, images.reconstruction)


def score_image(maps: Mapping[str, NDArray[np.float32]], truth: Truth) -> list[TableRow]:
    """Score each map [size, size] of an image with a known lesion; no row where there is nothing to find."""
    assert truth.lesion is not None
    region = "image" if truth.region is None else "lungs"
    inside = 1.0 if truth.region is None else float(truth.region[truth.lesion].mean()) if truth.lesion.any() else 0.0
    rows = []
    for name, saliency in maps.items():
        result = score(saliency, truth.lesion, truth.region)
        if result is not None:
            scores = {key: getattr(result, key) for key in SIMPLE}
            rows.append(
                {"map": name, "region": region, "lesion_in_region": inside, "dice_curve": result.dice_curve, **scores}
            )
    return rows


def ground_truth_scores(images: RecordImages, truth: Truth) -> TableRow:
    """Compare counterfactual, input and reconstruction with the ground-truth counterfactual; ``lesion_error`` is the
    mean absolute error inside the lesion."""
    ground_truth = truth.counterfactual
    assert ground_truth is not None
    inside = truth.lesion if truth.lesion is not None and truth.lesion.any() else np.ones_like(ground_truth, bool)
    return {
        "psnr": psnr(images.counterfactual, ground_truth),
        "ssim": ssim(images.counterfactual, ground_truth),
        "psnr_input": psnr(images.image, ground_truth),
        "psnr_reconstruction": psnr(images.reconstruction, ground_truth),
        "lesion_error": float(np.abs(images.counterfactual - ground_truth)[inside].mean()),
        "lesion_error_input": float(np.abs(images.image - ground_truth)[inside].mean()),
    }
