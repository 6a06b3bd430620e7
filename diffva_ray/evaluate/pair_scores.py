"""Scores of single images and their counterfactuals that no set distance shows, on a sample of a run's images, and maps
against the readers' scores of lung zones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffva_ray.data.images import BadImage
from diffva_ray.data.lungs import find_lungs
from diffva_ray.evaluate.records import Boxes, RecordImages, Truth, read_images, read_truth, under
from diffva_ray.evaluate.scores import lost
from diffva_ray.evaluate.tables import by_label, finite_mean, known
from diffva_ray.generate.run import Run
from diffva_ray.metrics.cardiothoracic import cardiothoracic_ratio
from diffva_ray.metrics.counterfactual import flip_rate
from diffva_ray.metrics.localization import SALIENCY, group_bootstrap
from diffva_ray.metrics.pair_metrics import PAIR_METRICS, Pair
from diffva_ray.metrics.zones import zone_agreement, zone_energy, zone_masks
from diffva_ray.model.card import read_card
from diffva_ray.schema import Row
from diffva_ray.storage.store import StoreError, open_store

if TYPE_CHECKING:  # they load torch
    from diffva_ray.metrics.external_judges import ExternalJudge
    from diffva_ray.metrics.perceptual import Lpips
    from diffva_ray.metrics.validity import Judge

HEART = "cardiomegaly"


def run_judge(run: Run) -> Judge | None:
    """The judge of the model that made the run; None where there is none, or another model stands there now."""
    from diffva_ray.metrics.validity import load_judge

    try:
        store = open_store(str(run.about["model"]))
        card = read_card(store)
        same = card is not None and card["digest"] == run.keys["model_digest"]
        return load_judge(store) if same else None
    except (OSError, ValueError, StoreError):
        return None


def score_pairs(
    run: Run,
    rows: Sequence[Row],
    boxes: Boxes,
    judge: Judge | None,
    lpips: Lpips | None,
    unread: set[str] | None = None,
) -> list[Row]:
    """One row for each record whose pictures can be read: PAIR_METRICS, ``lpips``, and the cardiothoracic ratio before
    and after where the heart is the matter; None for what is not known. Images that cannot be read, whole or in part,
    are added to ``unread``."""
    found = []
    for row, images, truth in _pictures(run, rows, boxes, unread):
        pair = Pair(
            images.image, images.counterfactual, images.signed_map, row["label"], row, truth.lesion, truth.lungs, judge
        )
        scores = {metric.key: metric.of(pair) for metric in PAIR_METRICS}
        scores["lpips"] = None if lpips is None else lpips(images.image, images.counterfactual)
        if HEART in f"{row['label']} {row['prompt']}".casefold():
            scores |= {"heart_before": _heart(images.image), "heart_after": _heart(images.counterfactual)}
        about = {key: row[key] for key in ("record_id", "image_path", "label", "setting") if key in row}
        found.append(about | {key: value if known(value) else None for key, value in scores.items()})
    return found


def _heart(image: NDArray[np.float32]) -> float | None:
    lungs = find_lungs(image)
    return None if lungs is None else cardiothoracic_ratio(lungs)


def _pictures(
    run: Run, rows: Sequence[Row], boxes: Boxes, unread: set[str] | None = None
) -> Iterator[tuple[Row, RecordImages, Truth]]:
    """Of the records whose image can be read; the paths of others, and of images that lack a mask or counterfactual
    that their record names, are added to ``unread``."""
    unread = set() if unread is None else unread
    for row in rows:
        try:
            images, truth = read_images(run, row), read_truth(run, row, boxes)
        except (OSError, BadImage):
            unread.add(row["image_path"])
            continue
        if lost(row, truth):
            unread.add(row["image_path"])
        yield row, images, truth


def external_rows(run: Run, rows: Sequence[Row], boxes: Boxes, judges: Sequence[ExternalJudge]) -> list[Row]:
    """Flip rates by judges that this project did not train: of the images each of them calls abnormal, how many have a
    counterfactual that it calls healthy. One row for each judge and class."""
    if not judges:
        return []
    told: list[Row] = []
    for row, images, _ in _pictures(run, rows, boxes):
        about: Row = {key: row[key] for key in ("image_path", "label", "setting") if key in row}
        for judge in judges:
            before, after = judge.healthy(np.stack([images.image, images.counterfactual]))
            told.append({**about, "judge": judge.name, "before": float(before), "after": float(after)})
    found = []
    for judge in judges:
        verdicts = pd.DataFrame(row for row in told if row["judge"] == judge.name)
        for label, members in by_label(verdicts) if len(verdicts) else ():
            rate, n = flip_rate(members["before"].tolist(), members["after"].tolist())
            gain = (members["after"] - members["before"]).to_numpy(float)
            found.append(
                {
                    "judge": judge.name,
                    "label": label,
                    "images": len(members),
                    "n": n,
                    "flip_rate": None if math.isnan(rate) else rate,
                    "called_healthy_before": float((members["before"] > 0.5).mean()),
                    "called_healthy_after": float((members["after"] > 0.5).mean()),
                    "confidence_gain": float(gain.mean()),
                    "confidence_gain_interval": list(group_bootstrap(gain, members["image_path"].tolist())),
                    "healthy_is": judge.says,
                    "weights_sha256": judge.sha256,
                }
            )
    return found


def counterfactual_rows(scores: list[Row]) -> list[Row]:
    """Means by class with 95 % bootstrap intervals over images; a measure that no image has is absent."""
    found = []
    for label, rows in by_label(pd.DataFrame(scores)) if scores else ():
        row: Row = {"label": label, "n": len(rows)}
        for metric in PAIR_METRICS:
            row |= mean_of(rows, metric.key)
        found.append(row)
    return found


def mean_of(rows: pd.DataFrame, key: str) -> Row:
    """Mean and interval of a measure over the images that have it; nothing where none has."""
    known = rows.dropna(subset=[key]) if key in rows else rows[:0]
    if not len(known):
        return {}
    interval = group_bootstrap(known[key].to_numpy(float), known["image_path"].tolist())
    return {key: finite_mean(known[key].astype(float)), f"{key}_interval": list(interval)}


def heart_rows(scores: list[Row]) -> list[Row]:
    """Cardiothoracic ratio before and after, over the images on which lungs were found both times (``n`` of
    ``images``)."""
    frame = pd.DataFrame(scores)
    if "heart_before" not in frame:
        return []
    found = []
    for label, rows in by_label(frame):
        known = rows.dropna(subset=["heart_before", "heart_after"])
        if not len(known):
            continue
        change = (known["heart_after"] - known["heart_before"]).to_numpy(float)
        found.append(
            {
                "label": label,
                "images": len(rows),
                "n": len(known),
                "before": finite_mean(known["heart_before"].astype(float)),
                "after": finite_mean(known["heart_after"].astype(float)),
                "change": float(change.mean()),
                "change_interval": list(group_bootstrap(change, known["image_path"].tolist())),
                "grew": float((change > 0).mean()),
                "lungs": "found on image and counterfactual (data/lungs.py)",
            }
        )
    return found


def zone_rows(
    run: Run,
    rows: Sequence[Row],
    scores: Mapping[str, NDArray[np.float64]],
    unread: set[str] | None = None,
) -> list[Row]:
    """Maps, and brightness alone, against Brixia scores of the images of ``rows``, by setting. Zones are thirds of the
    lungs' mask; without one, of the lungs that are found on the counterfactual (whose lungs are dark); without those,
    of the image's middle: ``lungs`` counts which. Images that cannot be read are added to ``unread``."""
    found = dict[tuple[str, str], list[tuple[NDArray[np.float64], NDArray[np.float64], str]]]()
    for row, images, truth in _pictures(run, rows, {}, unread):
        lungs, how = truth.lungs, "mask"
        if lungs is None:
            lungs = find_lungs(images.counterfactual)
            how = "image" if lungs is None else "found"
        zones = zone_masks(lungs, images.image.shape[0])
        maps = {name: transform(images.signed_map) for name, transform in SALIENCY.items()}
        for name, values in (maps | {"brightness": images.image}).items():
            of_image = zone_energy(values, zones), scores[row["image_path"]], how
            found.setdefault((row.get("setting", ""), name), []).append(of_image)
    return [_zone_row(*key, members) for key, members in found.items()]


def _zone_row(setting: str, name: str, members: Sequence[tuple[NDArray[np.float64], NDArray[np.float64], str]]) -> Row:
    energies, scores = (np.stack([member[at] for member in members]) for at in (0, 1))
    agreement = zone_agreement(energies, scores)
    kinds = [kind for _, _, kind in members]
    return {
        "map": under(name, setting),
        "n": agreement.n,
        "spearman": agreement.pooled,
        "spearman_interval": list(agreement.interval),
        "spearman_within_image": agreement.within,
        "n_within": agreement.n_within,
        "lungs": ", ".join(f"{kind} {kinds.count(kind)}" for kind in ("mask", "found", "image") if kind in kinds),
    }
