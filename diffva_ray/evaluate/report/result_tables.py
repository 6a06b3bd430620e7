"""The tables of the page: what reduce found, as rows of finished text, each with a caption that says how to read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffva_ray.evaluate.report.numbers import (
    Cell,
    Group,
    Table,
    class_name,
    count,
    decibel,
    everyone,
    interval,
    number,
    percent,
    plain,
)
from diffva_ray.metrics.fid import SMALL
from diffva_ray.metrics.localization import SALIENCY
from diffva_ray.metrics.pair_metrics import PAIR_METRICS
from diffva_ray.schema import Row

Format = Callable[[Any], str]
Column = tuple[str, str, Format, bool]  # key, heading, format, more is better
GROUND_TRUTH: list[Column] = [
    ("lesion_error_ratio", "lesion error left", percent, False),
    ("psnr", "PSNR to counterfactual, dB", decibel, False),
    ("psnr_input", "the image’s own", decibel, False),
    ("psnr_reconstruction", "autoencoder’s", decibel, False),
    ("ssim", "SSIM to counterfactual", number, False),
]
VALIDITY: list[Column] = [
    ("flip_rate", "flip rate", percent, False),
    ("called_healthy_before", "called healthy before", percent, False),
    ("confidence_gain", "confidence gain", number, False),
]
EXTERNAL: list[Column] = [
    ("images", "of images", count, False),
    ("flip_rate", "flip rate", percent, False),
    ("called_healthy_before", "called healthy before", percent, False),
    ("called_healthy_after", "after", percent, False),
    ("confidence_gain", "confidence gain", number, False),
    ("confidence_gain_interval", "95% interval", interval, False),
]
SSIM: list[Column] = [
    ("ssim", "SSIM", number, False),
    ("ssim_sd", "sd", number, False),
    ("ssim_interval", "95% interval", interval, False),
    ("ms_ssim", "MS-SSIM", number, False),
    ("ms_ssim_interval", "95% interval", interval, False),
    ("psnr", "PSNR, dB", decibel, False),
    ("lpips", "LPIPS", number, False),
    ("lpips_interval", "95% interval", interval, False),
    ("lpips_n", "n", count, False),
    ("l1", "mean |difference|", lambda value: number(value, 4), False),
    ("attribution_energy", "map energy", lambda value: number(value, 4), False),
    ("attribution_energy_lung_fraction", "of it in lungs", percent, False),
]
ZONES: list[Column] = [
    ("spearman", "Spearman, all zones", number, True),
    ("spearman_interval", "95% interval", interval, False),
    ("spearman_within_image", "within an image", number, True),
    ("n_within", "n within", count, False),
]
FORMS: dict[str, Format] = {"number": number, "percent": percent, "small": lambda value: number(value, 4)}
PAIRS: list[Column] = [(metric.key, metric.heading, FORMS[metric.form], False) for metric in PAIR_METRICS]
HEART: list[Column] = [
    ("images", "of images", count, False),
    ("before", "image", number, False),
    ("after", "counterfactual", number, False),
    ("change", "change", number, False),
    ("change_interval", "95% interval", interval, False),
    ("grew", "grew", percent, False),
]
LOCALIZATION: list[Column] = [
    ("auroc", "AUROC", number, True),
    ("auroc_interval", "95% interval", interval, False),
    ("auprc", "AUPRC", number, True),
    ("dice_fixed", "Dice, fixed τ", number, True),
    ("threshold", "τ", lambda value: number(value, 4), False),
    ("dice_best", "Dice, best", number, True),
    ("iou_best", "IoU, best", number, True),
    ("pointing_game", "pointing game", number, True),
]


def report_tables(metrics: Row) -> list[Table]:
    """The tables that apply, in the order of the page."""
    made = [_localization(metrics.get("localization", []))]
    made.append(
        _by_class(
            "validity", "Validity", metrics.get("validity", []), VALIDITY,
            "The model’s own judge: a classifier trained on the same labels, which never guides a counterfactual. Flip "
            "rate: images it calls abnormal whose counterfactual it calls healthy.",
        )
    )  # fmt: skip
    external = metrics.get("external_validity", [])
    for n, judge in enumerate(dict.fromkeys(row["judge"] for row in external)):
        rows = [row for row in external if row["judge"] == judge]
        made.append(
            _by_class(
                f"validity-{n}", f"Validity, by {judge}", rows, EXTERNAL,
                f"A judge that this project did not train on this run's images, on a sample of them. Healthy is "
                f"{rows[0]['healthy_is']}, above one half.",
            )
        )  # fmt: skip
    made.append(
        _by_class(
            "ground_truth", "Ground-truth counterfactual", metrics.get("ground_truth", []), GROUND_TRUTH,
            "Lesion error left: mean error to the ground-truth counterfactual inside the lesion, as "
            "a share of the image’s own.",
        )
    )  # fmt: skip
    made += [_zones(metrics.get("brixia", [])), _distances(metrics.get("fid", []))]
    made += [_within(metrics.get("fid_within", [])), _ssim(metrics.get("ssim", []))]
    made.append(
        _by_class(
            "counterfactual", "What else changed", metrics.get("counterfactual", []), PAIRS,
            "Of a sample of images. Confidence gain, COUT and change of other findings are by the "
            "judge: a good counterfactual "
            "gains, has a high COUT, and leaves other findings as they are.",
        )
    )  # fmt: skip
    made.append(
        _by_class(
            "heart", "Cardiothoracic ratio", metrics.get("heart", []), HEART,
            "Width of the heart by that of the chest, before and after, where the lungs were found on both: read the "
            "change, not the ratio.",
        )
    )  # fmt: skip
    return [table for table in made if table is not None]


def _by_class(key: str, title: str, rows: list[Row], columns: list[Column], caption: str) -> Table | None:
    if not rows:
        return None
    used = _used(rows, columns)
    body = []
    for row, cells in zip(rows, _lines(rows, used)):
        kind = "total" if everyone(row["label"]) else ""
        body.append((kind, [Cell(class_name(row["label"]), False), Cell(count(row["n"]), True), *cells]))
    return Table(key, title, caption, [("class", False), ("n", True), *_heads(used)], [Group("", body)])


def _used(rows: list[Row], columns: list[Column]) -> list[Column]:
    """The columns that any row has a value for."""
    return [column for column in columns if any(row.get(column[0]) is not None for row in rows)]


def _heads(columns: list[Column]) -> list[tuple[str, bool]]:
    return [(head, True) for _, head, _, _ in columns]


def _lines(rows: list[Row], columns: list[Column]) -> list[list[Cell]]:
    """The cells of each row; the best of these rows is marked where more is better."""
    found: list[list[Cell]] = [[] for _ in rows]
    for key, _, form, more_is_better in columns:
        values = [row.get(key) for row in rows]
        best = max((value for value in values if value is not None), default=None) if more_is_better else None
        for cells, value in zip(found, values):
            text = "–" if value is None else form(value)
            cells.append(Cell(text, True, value is not None and value == best))
    return found


def _localization(rows: list[Row]) -> Table | None:
    if not rows:
        return None
    used = _used(rows, LOCALIZATION)
    groups = []
    for label in sorted({row["label"] for row in rows}, key=lambda label: (not everyone(label), label)):
        members = [row for row in rows if row["label"] == label]
        body = [
            ("ours" if row["map"] in SALIENCY else "", [Cell(_map_name(row["map"]), False), *cells])
            for row, cells in zip(members, _lines(members, used))
        ]
        groups.append(Group(f"{class_name(label)}, n = {count(members[0]['n'])}", body))
    regions = ", ".join(sorted({row["region"] for row in rows}))
    fixed = next((row["threshold_from"] for row in rows if row.get("threshold_from")), None)
    caption = (
        f"Each map against the known lesion, inside the region: {regions}. Means over images, interval by bootstrap "
        "over images; best of each class in bold. Best Dice and IoU use each image’s own best "
        "threshold, which no reader "
        "has; " + (f"τ was fixed on {fixed}." if fixed else "no threshold was fixed on a validation run.")
    )
    return Table("localization", "Localisation", caption, [("map", False), *_heads(used)], groups)


def _map_name(name: str) -> str:
    kind, at, setting = name.partition(" under ")
    ours = {"positive": "ours, max(M, 0)", "absolute": "ours, |M|"}
    return ours.get(kind, f"baseline: {plain(kind)}") + at + setting


def _zones(rows: list[Row]) -> Table | None:
    if not rows:
        return None
    used = _used(rows, ZONES)
    body = []
    for row, cells in zip(rows, _lines(rows, used)):
        kind = "ours" if row["map"].split(" under ")[0] in SALIENCY else ""
        body.append((kind, [Cell(_map_name(row["map"]), False), Cell(count(row["n"]), True), *cells]))
    caption = (
        "Do maps find most where readers scored most? Rank correlation, from −1 to 1, of a map’s mean in each of six "
        "lung zones with the readers’ Brixia scores: over all zones of all images, and between the zones of one image, "
        f"which the image’s severity as a whole cannot make. Where the lungs were from: {rows[0]['lungs']}."
    )
    heads = [("map", False), ("n", True), *_heads(used)]
    return Table("brixia", "Brixia zones", caption, heads, [Group("", body)])


def _ssim(rows: list[Row]) -> Table | None:
    if not rows:
        return None
    scales = max(row["ms_ssim_scales"] for row in rows)
    caption = (
        f"LabelledImage against its counterfactual, as in the paper’s table 3; preset "
        f"{rows[0]['preset']}, on the {rows[0]['grid']} px "
        "grid. Intervals by bootstrap over images."
    )
    table = _by_class("ssim", "Table 3: likeness of image and counterfactual", rows, SSIM, caption)
    if table is not None and scales < 5:
        table.warnings.append(
            f"MS-SSIM has {scales} of 5 scales on this grid (fewer than 176 px) and does not compare with the paper’s."
        )
    return table


def _distances(rows: list[Row]) -> Table | None:
    if not rows:
        return None
    stand_in = any(row.get("is_stand_in") for row in rows)
    small = min(min(row["n1"], row["n2"]) for row in rows)
    name = "Fréchet distance" if stand_in else "FID"
    heads = [("image set 1", False), ("image set 2", False), ("N1", True), ("N2", True), ("KID ± s.e.", True),
             (name, True), ("95% interval", True), ("at equal N", True), ("split halves", True)]  # fmt: skip
    groups: dict[str, Group] = {}
    several = len({row["extractor"] for row in rows}) > 1
    for row in rows:
        kid, equal = row["kid"], row["n_matched"]
        cells = [
            Cell(plain(row["set1"]), False),
            Cell(plain(row["set2"]), False),
            Cell(count(row["n1"]), True),
            Cell(count(row["n2"]), True),
            Cell(f"{number(kid['value'], 4)} ± {number(kid['standard_error'], 4)}", True),
            Cell(number(row["value"]), True),
            Cell(interval(row["interval"]), True),
            Cell(number(equal["mean"]), True),
            Cell(number(row.get("halves", {}).get("crossed")), True),
        ]
        title = _paper_table(row) + (f", extractor {row['extractor']}" if several else "")
        groups.setdefault(title, Group(title, [])).rows.append(("", cells))
    weights = str(rows[0].get("weights_sha256") or "")[:8]
    caption = (
        f"Extractor {rows[0]['extractor']}{f' (weights {weights})' if weights else ''}, resize {rows[0]['resize']}. "
        "Fréchet distances between sets of images; the interval is by delete-group jackknife and "
        "corrected for bias, so "
        "the plain value may lie above it. At equal N: the larger set drawn down to the smaller. Split halves: images "
        "against the counterfactuals of other images, so that none meets its own edit."
    )
    warnings = []
    if stand_in:
        warnings.append("Distances of a stand-in extractor: they are not FID and compare with no published value.")
    if small < SMALL:
        warnings.append(
            f"The smallest set has {count(small)} images. Below {count(SMALL)} read KID first: the Fréchet distance is "
            "biased upwards, the more the fewer images."
        )
    order = sorted(groups.values(), key=lambda group: group.title)
    return Table("fid", "Tables 1 and 2: distances between sets", caption, heads, order, warnings)


def _within(rows: list[Row]) -> Table | None:
    """Distances class by class, beside that of the pooled sets, which is what a single row of a paper would be."""
    if not rows:
        return None
    heads = [("image set 1", False), ("image set 2", False), ("N1", True), ("N2", True), ("class by class", True),
             ("all together", True)]  # fmt: skip
    groups: dict[str, Group] = {}
    several = len({row["extractor"] for row in rows}) > 1
    for row in rows:
        cells = [
            Cell(plain(row["set1"]), False),
            Cell(plain(row["set2"]), False),
            Cell(count(row["n1"]), True),
            Cell(count(row["n2"]), True),
            Cell(number(row["within"]), True),
            Cell(number(row["pooled"]), True),
        ]
        title = f"Extractor {row['extractor']}" if several else ""
        groups.setdefault(title, Group(title, [])).rows.append(("", cells))
    caption = (
        "Fréchet distance as the mean over the classes, beside that of all classes in one set: where the first is much "
        f"larger, classes were exchanged and the pooled sets hide it. Classes: {plain(rows[0]['conditions'])}."
    )
    return Table("fid-within", "Distances class by class", caption, heads, list(groups.values()))


def _paper_table(row: Row) -> str:
    """Which of the paper's comparisons a row is."""
    first, second = ("reference" if "(reference)" in row[name] else row[name] for name in ("set1", "set2"))
    if first != "reference":
        return "Table 1: images and their counterfactuals"
    return (
        "Table 2: real reference images and counterfactuals"
        if "(counterfactual)" in second
        else "Table 1: real reference images and images"
    )
