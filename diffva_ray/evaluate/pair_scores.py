"""Scores single images and their counterfactuals on a sample of a run's images, and compares attribution maps with
readers' scores of lung zones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffva_ray.data.images import BadImage
from diffva_ray.data.lungs import find_lungs
from diffva_ray.evaluate.factor_scores import factor_scores
from diffva_ray.evaluate.records import (
    Lesions,
    RecordImages,
    Truth,
    check_own_images,
    read_images,
    read_truth,
    under,
)
from diffva_ray.evaluate.run_index import IndexedRecord
from diffva_ray.evaluate.scores import lost, names_of
from diffva_ray.evaluate.tables import by_label, finite_mean, known
from diffva_ray.evaluate.word_scores import word_scores
from diffva_ray.generate.run import Run
from diffva_ray.metrics.cardiothoracic import cardiothoracic_ratio
from diffva_ray.metrics.counterfactual import flip_rate
from diffva_ray.metrics.intervals import group_bootstrap
from diffva_ray.metrics.localization import SALIENCY
from diffva_ray.metrics.pair_metrics import PAIR_METRICS, Pair
from diffva_ray.metrics.ssim import psnr
from diffva_ray.metrics.zones import zone_agreement, zone_energy, zone_masks
from diffva_ray.model.card import read_card
from diffva_ray.schema import Record, TableRow
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store, StoreError

if TYPE_CHECKING:  # these load torch
    from diffva_ray.metrics.external_judges import ExternalJudge
    from diffva_ray.metrics.factors import FactorClassifier
    from diffva_ray.metrics.perceptual import Lpips
    from diffva_ray.metrics.validity import Judge

T = TypeVar("T")
HEART = "cardiomegaly"  # in a label or prompt: the cardiothoracic ratio is measured


def run_judge(run: Run) -> Judge | None:
    """The judge of the run's model; None if it has none, or if its folder holds another model now."""
    from diffva_ray.metrics.validity import load_judge

    return _of_model(run, load_judge)


def run_factors(run: Run) -> FactorClassifier | None:
    """The factor classifier of the run's model; None as in ``run_judge``."""
    from diffva_ray.metrics.factors import load_factors

    return _of_model(run, load_factors)


def _of_model(run: Run, load: Callable[[Store], T | None]) -> T | None:
    try:
        store = open_store(str(run.about["model"]))
        card = read_card(store)
        same = card is not None and card["digest"] == run.keys["model_digest"]
        return load(store) if same else None
    except (OSError, ValueError, StoreError):
        return None


def score_pairs(
    run: Run,
    rows: Sequence[IndexedRecord],
    lesions: Lesions,
    judge: Judge | None,
    lpips: Lpips | None,
    unread: set[str] | None = None,
    factors: FactorClassifier | None = None,
) -> list[TableRow]:
    """Score each record whose images can be read: PAIR_METRICS, ``lpips``, the PSNR of its reconstruction, the judge's
    probabilities, the answers of the factor classifier, where the change is if the prompt names a place, and, for
    cardiomegaly, the cardiothoracic ratio of image and counterfactual. Unknown scores are None; ``unread`` as in
    ``scores.score_records``."""
    scored = []
    for row, images, truth in _read(run, rows, lesions, unread):
        pair = Pair(
            images.image, images.counterfactual, images.signed_map, row["label"], row, truth.lesion, truth.lungs, judge
        )
        scores: TableRow = {metric.key: metric.of(pair) for metric in PAIR_METRICS}
        scores |= _controls(row, images, truth, judge)
        scores["lpips"] = None if lpips is None else lpips(images.image, images.counterfactual)
        scores |= {"prompt": row["prompt"], **word_scores(row["prompt"], images.signed_map, truth.lungs)}
        scores |= factor_scores(factors, images.image, images.counterfactual)
        if HEART in f"{row['label']} {row['prompt']}".casefold():
            scores |= {"heart_before": _heart(images.image), "heart_after": _heart(images.counterfactual)}
        names = _names(row)
        scored.append(names | {key: value if known(value) else None for key, value in scores.items()})
    return scored


def _names(record: IndexedRecord) -> TableRow:
    """What identifies a record in a table of scores."""
    names = names_of(record)
    return {**names, "setting": record["setting"]} if "setting" in record else names


def _controls(record: Record, images: RecordImages, truth: Truth, judge: Judge | None) -> TableRow:
    """PSNR of the reconstruction; what the judge says of it and of the ground truth, between which a flip rate lies."""
    scores: TableRow = {"psnr_reconstruction": psnr(images.image, images.reconstruction)}
    if judge is not None and record["judge_image"] is not None:
        scores["judge_image"] = record["judge_image"]
        scores["judge_reconstruction"] = float(judge.healthy_probability(images.reconstruction[None])[0])
        if truth.counterfactual is not None:
            scores["judge_ground_truth"] = float(judge.healthy_probability(truth.counterfactual[None])[0])
    return scores


def _heart(image: NDArray[np.float32]) -> float | None:
    lungs = find_lungs(image)
    return None if lungs is None else cardiothoracic_ratio(lungs)


def _read(
    run: Run, rows: Sequence[IndexedRecord], lesions: Lesions, unread: set[str] | None = None
) -> Iterator[tuple[IndexedRecord, RecordImages, Truth]]:
    """Yields the records whose images can be read, with images and ground truth.

    ``unread`` gets the paths of images with an unreadable or changed image, mask or ground truth file."""
    unread = set() if unread is None else unread
    for row in rows:
        try:
            images, truth = read_images(run, row), read_truth(run, row, lesions)
        except (OSError, BadImage):
            check_own_images(run, row)
            unread.add(row["image_path"])
            continue
        if lost(row, truth):
            unread.add(row["image_path"])
        yield row, images, truth


def add_controls(rows: list[TableRow], scores: list[TableRow]) -> None:
    """Add the flip rates of reconstructions and of ground-truth counterfactuals, on the sampled ``scores``, to the rows
    of the flip rate: an autoencoder alone should flip nothing, the truth everything."""
    frame = pd.DataFrame(scores)
    if "judge_image" not in frame:
        return
    sampled = dict(by_label(frame))
    for row in (row for row in rows if row["label"] in sampled):
        for name in ("reconstruction", "ground_truth"):
            column = f"judge_{name}"
            if column not in frame:
                continue
            judged = sampled[row["label"]].dropna(subset=["judge_image", column])
            rate, n = flip_rate(judged["judge_image"].to_numpy(float), judged[column].to_numpy(float))
            if n:
                row |= {f"flip_rate_{name}": rate, f"flip_rate_{name}_n": n}


def external_rows(
    run: Run, rows: Sequence[IndexedRecord], lesions: Lesions, judges: Sequence[ExternalJudge]
) -> list[TableRow]:
    """Flip rates by published judges: the fraction of the images a judge calls abnormal whose counterfactual it calls
    healthy. One row for each judge and class."""
    if not judges:
        return []
    # what each judge says of each record
    judged: list[TableRow] = []
    for row, images, _ in _read(run, rows, lesions):
        names = _names(row)
        for judge in judges:
            before, after = judge.healthy(np.stack([images.image, images.counterfactual]))
            judged.append({**names, "judge": judge.name, "before": float(before), "after": float(after)})
    # rates by judge and class
    rates = []
    for judge in judges:
        frame = pd.DataFrame(row for row in judged if row["judge"] == judge.name)
        for label, members in by_label(frame) if len(frame) else ():
            rate, n = flip_rate(members["before"].tolist(), members["after"].tolist())
            gain = (members["after"] - members["before"]).to_numpy(float)
            rates.append(
                {
                    "judge": judge.name,
                    "label": label,
                    "images": len(members),
                    "n": n,
                    "flip_rate": None if math.isnan(rate) else rate,
                    "called_healthy_before": float((members["before"] > 0.5).mean()),
                    "called_healthy_after": float((members["after"] > 0.5).mean()),
                    "confidence_gain": float(gain.mean()),
                    "confidence_gain_interval": list(group_bootstrap(gain, members["group"].tolist())),
                    "healthy_is": judge.says,
                    "weights_sha256": judge.sha256,
                }
            )
    return rates


def counterfactual_rows(scores: list[TableRow]) -> list[TableRow]:
    """Means of PAIR_METRICS by class with 95 % bootstrap intervals over patients; absent if no image has the metric."""
    means = []
    for label, rows in by_label(pd.DataFrame(scores)) if scores else ():
        row: TableRow = {"label": label, "n": len(rows)}
        for metric in PAIR_METRICS:
            row |= mean_of(rows, metric.key)
        means.append(row)
    return means


def mean_of(rows: pd.DataFrame, key: str) -> TableRow:
    """Mean and interval of a metric over the images that have it; empty if none has."""
    present = rows.dropna(subset=[key]) if key in rows else rows[:0]
    if not len(present):
        return {}
    interval = group_bootstrap(present[key].to_numpy(float), present["group"].tolist())
    return {key: finite_mean(present[key].astype(float)), f"{key}_interval": list(interval)}


def heart_rows(scores: list[TableRow]) -> list[TableRow]:
    """Cardiothoracic ratio of image and counterfactual by class, over the ``n`` of ``images`` images in which lungs are
    found before and after."""
    frame = pd.DataFrame(scores)
    if "heart_before" not in frame:
        return []
    ratios = []
    for label, rows in by_label(frame):
        measured = rows.dropna(subset=["heart_before", "heart_after"])
        if not len(measured):
            continue
        change = (measured["heart_after"] - measured["heart_before"]).to_numpy(float)
        ratios.append(
            {
                "label": label,
                "images": len(rows),
                "n": len(measured),
                "before": finite_mean(measured["heart_before"].astype(float)),
                "after": finite_mean(measured["heart_after"].astype(float)),
                "change": float(change.mean()),
                "change_interval": list(group_bootstrap(change, measured["group"].tolist())),
                "grew": float((change > 0).mean()),
                "lungs": "found on image and counterfactual (data/lungs.py)",
            }
        )
    return ratios


def zone_rows(
    run: Run, rows: Sequence[IndexedRecord], scores: Mapping[str, NDArray[np.float64]], unread: set[str] | None = None
) -> list[TableRow]:
    """Compare maps, and brightness as a baseline, with the Brixia ``scores`` of the images of ``rows``, by setting.

    Zones are thirds of the lung mask; without a mask, of the lungs found on the counterfactual (whose lungs are dark);
    without those, of the middle of the image. The column ``lungs`` counts the three cases."""
    members_of = dict[tuple[str, str], list[tuple[NDArray[np.float64], NDArray[np.float64], str]]]()
    for row, images, truth in _read(run, rows, {}, unread):
        lungs, how = truth.lungs, "mask"
        if lungs is None:
            lungs = find_lungs(images.counterfactual)
            how = "image" if lungs is None else "found"
        zones = zone_masks(lungs, images.image.shape[0])
        maps = {name: transform(images.signed_map) for name, transform in SALIENCY.items()}
        for name, values in (maps | {"brightness": images.image}).items():
            of_image = zone_energy(values, zones), scores[row["image_path"]], how
            members_of.setdefault((row.get("setting", ""), name), []).append(of_image)
    return [_zone_row(*key, members) for key, members in members_of.items()]


def _zone_row(
    setting: str, name: str, members: Sequence[tuple[NDArray[np.float64], NDArray[np.float64], str]]
) -> TableRow:
    energies, scores = (np.stack([member[part] for member in members]) for part in (0, 1))
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
