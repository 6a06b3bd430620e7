"""Tables of the report: the rows of ``metrics.json`` as text, each table with a caption that explains its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffva_ray.evaluate.report.numbers import (
    INTERVAL,
    Cell,
    Group,
    Table,
    class_name,
    count,
    decibel,
    interval,
    is_overall,
    number,
    percent,
    plain,
)
from diffva_ray.metrics.fid import SMALL
from diffva_ray.metrics.localization import SALIENCY
from diffva_ray.metrics.pair_metrics import PAIR_METRICS
from diffva_ray.schema import Row


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    key: str  # of the value in a row
    heading: str
    form: Callable[[Any], str] = number  # the value as text
    best: bool = False  # whether the highest value is marked as the best
    is_number: bool = True  # right-aligned


def _four_digits(value: Any) -> str:
    return number(value, 4)


def _map_name(name: str) -> str:
    kind, under, setting = name.partition(" under ")
    ours = {"positive": "ours, max(M, 0)", "absolute": "ours, |M|"}
    return ours.get(kind, f"baseline: {plain(kind)}") + under + setting


FORMS: dict[str, Callable[[Any], str]] = {"number": number, "percent": percent, "small": _four_digits}
CLASS = (Column("label", "class", class_name, is_number=False), Column("n", "n", count))
MAP = Column("map", "map", _map_name, is_number=False)
SETS = (
    Column("set1", "image set 1", plain, is_number=False),
    Column("set2", "image set 2", plain, is_number=False),
    Column("n1", "N1", count),
    Column("n2", "N2", count),
)
GROUND_TRUTH = (
    *CLASS,
    Column("lesion_error_ratio", "lesion error left", percent),
    Column("psnr", "PSNR to ground truth, dB", decibel),
    Column("psnr_input", "PSNR of the image", decibel),
    Column("psnr_reconstruction", "PSNR of the reconstruction", decibel),
    Column("ssim", "SSIM to ground truth"),
)
VALIDITY = (
    *CLASS,
    Column("flip_rate", "flip rate", percent),
    Column("called_healthy_before", "images called healthy", percent),
    Column("confidence_gain", "confidence gain"),
)
EXTERNAL_VALIDITY = (
    *CLASS,
    Column("images", "of images", count),
    Column("flip_rate", "flip rate", percent),
    Column("called_healthy_before", "images called healthy", percent),
    Column("called_healthy_after", "counterfactuals called healthy", percent),
    Column("confidence_gain", "confidence gain"),
    Column("confidence_gain_interval", INTERVAL, interval),
)
SSIM = (
    *CLASS,
    Column("ssim", "SSIM"),
    Column("ssim_sd", "sd"),
    Column("ssim_interval", INTERVAL, interval),
    Column("ms_ssim", "MS-SSIM"),
    Column("ms_ssim_interval", INTERVAL, interval),
    Column("psnr", "PSNR, dB", decibel),
    Column("lpips", "LPIPS"),
    Column("lpips_interval", INTERVAL, interval),
    Column("lpips_n", "n", count),
    Column("l1", "mean |difference|", _four_digits),
    Column("attribution_energy", "map energy", _four_digits),
    Column("attribution_energy_lung_fraction", "share in lungs", percent),
)
ZONES = (
    MAP,
    CLASS[1],
    Column("spearman", "Spearman, all zones", best=True),
    Column("spearman_interval", INTERVAL, interval),
    Column("spearman_within_image", "within an image", best=True),
    Column("n_within", "n within", count),
)
PAIRS = (
    *CLASS,
    Column("flip_rate", "flip rate", percent),
    *(Column(metric.key, metric.heading, FORMS[metric.form]) for metric in PAIR_METRICS),
)
HEART = (
    *CLASS,
    Column("images", "of images", count),
    Column("before", "image"),
    Column("after", "counterfactual"),
    Column("change", "change"),
    Column("change_interval", INTERVAL, interval),
    Column("grew", "grew", percent),
)
LOCALIZATION = (
    MAP,
    Column("auroc", "AUROC", best=True),
    Column("auroc_interval", INTERVAL, interval),
    Column("auprc", "AUPRC", best=True),
    Column("dice_fixed", "Dice, fixed τ", best=True),
    Column("threshold", "τ", _four_digits),
    Column("dice_best", "Dice, best τ", best=True),
    Column("iou_best", "IoU, best τ", best=True),
    Column("pointing_game", "pointing game", best=True),
)
FIDELITY = (
    *SETS,
    *(Column(name, name) for name in ("precision", "recall", "density", "coverage", "verisimilitude")),
    Column("remote", "remote", percent),
    Column("between", "between modes", percent),
    Column("direction", "direction"),
    Column("direction_interval", INTERVAL, interval),
    Column("infinity", "at infinite N"),
)
WITHIN = (*SETS, Column("within", "mean over classes"), Column("pooled", "classes pooled"))


def report_tables(metrics: Row) -> list[Table]:
    """The tables that apply, in the order of the page."""
    tables = [
        localization_table(metrics.get("localization", [])),
        _table(
            "validity", "Validity", metrics.get("validity", []), VALIDITY,
            "The model’s own judge is a classifier trained on the same labels; it never guides a counterfactual. Flip "
            "rate: share of the images called abnormal whose counterfactual is called healthy.",
        ),
        *_external_validity(metrics.get("external_validity", [])),
        _table(
            "ground_truth", "Ground-truth counterfactual", metrics.get("ground_truth", []), GROUND_TRUTH,
            "Lesion error left: mean error of the counterfactual inside the lesion, as a share of the image’s own "
            "error. Errors and PSNR are against the ground-truth counterfactual.",
        ),
        _zones(metrics.get("brixia", [])),
        _distances(metrics.get("fid", [])),
        _within(metrics.get("fid_within", [])),
        _fidelity(metrics.get("fid", [])),
        _ssim(metrics.get("ssim", [])),
        _table(
            "counterfactual", "What else changed", metrics.get("counterfactual", []), PAIRS,
            "On a sample of the images. The judge gives confidence gain, COUT and the change of other findings: a good "
            "counterfactual has a high gain, a high COUT and no change of other findings.",
        ),
        _table(
            "heart", "Cardiothoracic ratio", metrics.get("heart", []), HEART,
            "Width of the heart divided by the width of the chest, before and after, where lungs were found on image "
            "and counterfactual. Read the change, not the ratio.",
        ),
    ]  # fmt: skip
    return [table for table in tables if table is not None]


def _table(
    key: str, title: str, rows: Sequence[Row], columns: Sequence[Column], caption: str,
    group: Callable[[Row], str] = lambda row: "",
) -> Table | None:  # fmt: skip
    """Columns without any value are left out; ``group`` gives the heading a row stands under, after its ``run``."""
    if not rows:
        return None
    used = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(" · ".join(filter(None, [row.get("run"), group(row)])), []).append(row)
    groups = [Group(heading, _body(of_group, used)) for heading, of_group in members.items()]
    return Table(key, title, caption, [(column.heading, column.is_number) for column in used], groups)


def _body(rows: Sequence[Row], columns: Sequence[Column]) -> list[tuple[str, list[Cell]]]:
    """The cells of one group, each row with its kind; the best value of a column is marked."""
    best = {column.key: max((row[column.key] for row in rows if row.get(column.key) is not None), default=None)
            for column in columns if column.best}  # fmt: skip
    body = []
    for row in rows:
        cells = []
        for column in columns:
            value = row.get(column.key)
            text = "–" if value is None else column.form(value)
            cells.append(Cell(text, column.is_number, value is not None and value == best.get(column.key)))
        body.append((_kind(row), cells))
    return body


def _kind(row: Row) -> str:
    if "map" in row:
        return "ours" if row["map"].partition(" under ")[0] in SALIENCY else ""
    return "total" if is_overall(row.get("label", "")) else ""


def localization_table(rows: list[Row]) -> Table | None:
    regions = ", ".join(sorted({row["region"] for row in rows}))
    validation = next((row["threshold_from"] for row in rows if row.get("threshold_from")), None)
    return _table(
        "localization", "Localisation",
        sorted(rows, key=lambda row: (not is_overall(row["label"]), row["label"])), LOCALIZATION,
        f"Each attribution map against the known lesion, inside the region: {regions}. Means over images with a "
        "bootstrap interval over images; the best value of each class is bold. Best Dice and IoU use the best "
        "threshold of each image, which is unknown for a new image; "
        + (f"τ was fixed on {validation}." if validation else "no threshold was fixed on a validation run."),
        lambda row: f"{class_name(row['label'])}, n = {count(row['n'])}",
    )  # fmt: skip


def _external_validity(rows: list[Row]) -> list[Table | None]:
    return [
        _table(
            f"validity-{n}", f"Validity, by {judge}", [row for row in rows if row["judge"] == judge], EXTERNAL_VALIDITY,
            "A judge that was not trained with this model, on a sample of the images. Healthy means "
            f"{next(row['healthy_is'] for row in rows if row['judge'] == judge)} above one half.",
        )
        for n, judge in enumerate(dict.fromkeys(row["judge"] for row in rows))
    ]  # fmt: skip


def _zones(rows: list[Row]) -> Table | None:
    lungs = rows[0]["lungs"] if rows else ""
    return _table(
        "brixia", "Brixia zones", rows, ZONES,
        "Are the maps strongest where readers gave the highest scores? Rank correlation (−1 to 1) between the mean of "
        "a map in each of six lung zones and the readers’ Brixia scores: over all zones of all images, and between the "
        "zones of one image, which is independent of the overall severity of the image. "
        f"Source of the lung regions: {lungs}.",
    )  # fmt: skip


def _ssim(rows: list[Row]) -> Table | None:
    if not rows:
        return None
    first, scales = rows[0], max(row["ms_ssim_scales"] for row in rows)
    table = _table(
        "ssim", "Table 3: similarity of image and counterfactual", rows, SSIM,
        f"As in table 3 of the paper; preset {first['preset']}, on the {first['grid']} px grid. Bootstrap intervals "
        "over images.",
    )  # fmt: skip
    if table is not None and scales < 5:
        table.warnings.append(
            f"MS-SSIM has {scales} of 5 scales on this grid (fewer than 176 px) and cannot be compared with the paper."
        )
    return table


def _distances(rows: list[Row]) -> Table | None:
    if not rows:
        return None
    stand_in = any(row.get("is_stand_in") for row in rows)
    columns = (
        *SETS, Column("kid_text", "KID ± s.e.", str), Column("value", "Fréchet distance" if stand_in else "FID"),
        Column("interval", INTERVAL, interval), Column("matched", "at equal N"), Column("halves", "split halves"),
    )  # fmt: skip
    # nested values as columns
    flat = [
        {
            **row,
            "kid_text": f"{number(row['kid']['value'], 4)} ± {number(row['kid']['standard_error'], 4)}",
            "matched": row["n_matched"]["mean"],
            "halves": row.get("halves", {}).get("crossed"),
        }
        for row in rows
    ]
    several = len({row["extractor"] for row in rows}) > 1

    def heading(row: Row) -> str:
        return _paper_table(row) + (f", extractor {row['extractor']}" if several else "")

    weights = str(rows[0].get("weights_sha256") or "")[:8]
    table = _table(
        "fid", "Tables 1 and 2: distances between sets", sorted(flat, key=heading), columns,
        f"Extractor {rows[0]['extractor']}{f' (weights {weights})' if weights else ''}, resize {rows[0]['resize']}. "
        "Fréchet distances between sets of images. The delete-group jackknife interval is corrected for bias, so the "
        "plain value may lie above it. At equal N: the larger set is sampled down to the size of the smaller. Split "
        "halves: images against the counterfactuals of other images, so no image meets its own counterfactual.",
        heading,
    )  # fmt: skip
    if table is not None and stand_in:
        table.warnings.append(
            "Distances of a stand-in extractor: they are not FID and cannot be compared with published values."
        )
    smallest = min(min(row["n1"], row["n2"]) for row in rows)
    if table is not None and smallest < SMALL:
        table.warnings.append(
            f"The smallest set has {count(smallest)} images. Below {count(SMALL)} images read KID first: the Fréchet "
            "distance is biased upwards, more so for fewer images."
        )
    return table


def _fidelity(rows: list[Row]) -> Table | None:
    """Fidelity and diversity of the sets that are large enough."""
    flat = []
    for row in (row for row in rows if "manifold" in row):
        direction, limit = row.get("direction", {}), row.get("infinity", {})
        flat.append({
            **{key: row.get(key) for key in ("run", "set1", "set2", "n1", "n2")},
            **row["manifold"],
            "n1": row["n1"], "n2": row["n2"],
            "verisimilitude": row.get("verisimilitude", {}).get("taken"),
            **row.get("interpolation", {}),
            "direction": direction.get("mean"),
            "direction_interval": (direction["low"], direction["high"]) if direction else None,
            "infinity": limit["value"] if limit.get("trusted") else None,
        })  # fmt: skip
    neighbours = next((row["k"] for row in flat), 0)
    return _table(
        "fidelity", "Fidelity and diversity", flat, FIDELITY,
        f"Precision and density of the second set are measured with the first, recall and coverage of the first with "
        f"the second ({neighbours} neighbours); two samples of one distribution do not reach 1 at small N. "
        "Verisimilitude: share of counterfactuals whose nearest neighbour is a real image (0.5: not distinguishable, "
        "0: all distinguishable). Remote: share of counterfactuals farther from the real images than 95 % of these are "
        "from each other; between modes: share that is remote and between two images that are not neighbours. "
        "Direction (−1 to 1): movement of the features from the class towards the healthy images. At infinite N: the "
        "distance extrapolated over 1/N, only where half of the images outnumber the dimensions.",
    )  # fmt: skip


def _within(rows: list[Row]) -> Table | None:
    """Distances class by class, beside the distance of the pooled sets, as papers report it."""
    several = len({row["extractor"] for row in rows}) > 1
    classes = plain(rows[0]["conditions"]) if rows else ""
    return _table(
        "fid-within", "Distances class by class", rows, WITHIN,
        "Mean of the Fréchet distances of the classes, beside the distance of all classes in one set. Where the first "
        f"is much larger, images moved between classes and the pooled sets hide it. Classes: {classes}.",
        lambda row: f"Extractor {row['extractor']}" if several else "",
    )  # fmt: skip


def _paper_table(row: Row) -> str:
    """The paper's comparison that a row belongs to."""
    if "(reference)" not in row["set1"]:
        return "Table 1: images and their counterfactuals"
    if "(counterfactual)" in row["set2"]:
        return "Table 2: real reference images and counterfactuals"
    return "Table 1: real reference images and images"
