"""Tables of the report: the rows of ``metrics.json`` as text, with the columns and captions of ``tables.yaml``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any, NamedTuple

import yaml

from diffva_ray.evaluate.report.numbers import (
    Cell,
    Group,
    Table,
    class_name,
    count,
    decibel,
    interval,
    is_overall,
    judge_tested,
    number,
    percent,
    plain,
    signed,
)
from diffva_ray.evaluate.tables import OURS
from diffva_ray.metrics.baselines import SHUFFLED, WITH_PRIOR
from diffva_ray.metrics.fid import SMALL
from diffva_ray.metrics.pair_metrics import PAIR_METRICS
from diffva_ray.schema import TableRow


class Column(NamedTuple):
    """One column of a table."""

    key: str  # of the value in a row
    heading: str
    form: str  # a key of FORMS
    best: str = ""  # "best": the highest value is marked


def _small(value: float) -> str:
    return number(value, 4)


def _kid(value: Mapping[str, Any]) -> str:
    return f"{_small(value['value'])} ± {_small(value['standard_error'])}"


MAPS = {
    "positive": "ours, max(M, 0)",
    "absolute": "ours, |M|",
    WITH_PRIOR: "ours, max(M, 0) x prior",
    SHUFFLED: "ours, of another image",
}


def _map_name(name: str) -> str:
    kind, under, setting = name.partition(" under ")
    return MAPS.get(kind, f"baseline: {plain(kind).replace('pca', 'PCA')}") + under + setting


TEXTS: dict[str, Callable[[Any], str]] = {"class": class_name, "map": _map_name, "plain": plain}  # left-aligned
FORMS = TEXTS | {"count": count, "decibel": decibel, "interval": interval, "kid": _kid, "number": number,
                 "percent": percent, "signed": signed, "small": _small}  # fmt: skip
SPECS: dict[str, Any] = yaml.safe_load((resources.files(__package__) / "tables.yaml").read_text("utf-8"))
SPECS["counterfactual"]["columns"] += [(metric.key, metric.heading, metric.form) for metric in PAIR_METRICS]


def report_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """The tables that apply, in the order of the page."""
    rows: dict[str, list[TableRow]] = {key: metrics.get(key, []) for key in SPECS}
    judges = dict.fromkeys(row["judge"] for row in rows["external_validity"])
    by_judge = [[row for row in rows["external_validity"] if row["judge"] == judge] for judge in judges]
    tables = [
        localization_table(rows["localization"]),
        _table("validity", rows["validity"], tested=judge_tested(metrics.get("judge"))),
        *(_table("external_validity", of_judge, key=f"validity-{n}") for n, of_judge in enumerate(by_judge)),
        _table("ground_truth", rows["ground_truth"]),
        _table("brixia", rows["brixia"]),
        _distances(rows["fid"]),
        _within(rows["fid_within"]),
        _fidelity(rows["fid"]),
        _ssim(rows["ssim"]),
        _table("counterfactual", rows["counterfactual"]),
        _table("heart", rows["heart"]),
        _table("words", rows["words"]),
        _table("factors", rows["factors"]),
    ]
    return [table for table in tables if table is not None]


def _table(
    name: str, rows: Sequence[TableRow], group: Callable[[TableRow], str] = lambda row: "", key: str = "", **values: Any
) -> Table | None:
    """Table ``name`` of SPECS; None without rows. ``group`` gives the heading a row stands under, after its ``run``.

    Title and caption are filled with ``values``, else with those of the first row."""
    if not rows:
        return None
    spec = SPECS[name]
    columns = [Column(*column) for column in spec["columns"]]
    used = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    members: dict[str, list[TableRow]] = {}
    for row in rows:
        members.setdefault(" · ".join(filter(None, [row.get("run"), group(row)])), []).append(row)
    groups = [Group(heading, _body(of_group, used)) for heading, of_group in members.items()]
    title, caption = (spec[part].format_map({**rows[0], **values}) for part in ("title", "caption"))
    return Table(key or name, title, caption, [(column.heading, column.form not in TEXTS) for column in used], groups)


def _body(rows: Sequence[TableRow], columns: Sequence[Column]) -> list[tuple[str, list[Cell]]]:
    """The cells of one group, each row with its kind; the best value of a column is marked where values differ."""
    best: dict[str, Any] = {}
    for column in columns:
        values = {row[column.key] for row in rows if row.get(column.key) is not None} if column.best else set()
        best[column.key] = max(values) if len(values) > 1 else None
    body = []
    for row in rows:
        cells = []
        for column in columns:
            value = row.get(column.key)
            text = "–" if value is None else FORMS[column.form](value)
            cells.append(Cell(text, column.form not in TEXTS, value is not None and value == best.get(column.key)))
        body.append((_kind(row), cells))
    return body


def _kind(row: TableRow) -> str:
    if "map" in row:
        return "ours" if row["map"].partition(" under ")[0] in OURS else ""
    return "total" if is_overall(row.get("label", "")) else ""


def localization_table(rows: list[TableRow]) -> Table | None:
    """Localisation, all classes first; the caption names the region and where the thresholds are from."""
    validation = next((row["threshold_from"] for row in rows if row.get("threshold_from")), None)
    return _table(
        "localization",
        sorted(rows, key=lambda row: (not is_overall(row["label"]), row["label"])),
        lambda row: f"{class_name(row['label'])}, n = {count(row['n'])}",
        regions=", ".join(sorted({row["region"] for row in rows})),
        threshold=f"τ was fixed on {validation}" if validation else "no threshold was fixed on a validation run",
    )


def _ssim(rows: list[TableRow]) -> Table | None:
    table, scales = _table("ssim", rows), max((row["ms_ssim_scales"] for row in rows), default=5)
    if table is not None and scales < 5:
        table.warnings.append(
            f"MS-SSIM has {scales} of 5 scales on this grid (fewer than 176 px) and cannot be compared with the paper."
        )
    return table


def _distances(rows: list[TableRow]) -> Table | None:
    several = len({row["extractor"] for row in rows}) > 1

    def heading(row: TableRow) -> str:
        return _paper_table(row) + (f", extractor {row['extractor']}" if several else "")

    # nested values as columns
    flat = [{**row, "matched": row["n_matched"]["mean"], **row.get("halves", {})} for row in rows]
    weights = str(rows[0].get("weights_sha256") or "")[:8] if rows else ""
    extractor = f"{rows[0]['extractor']}{f' (weights {weights})' if weights else ''}" if rows else ""
    table = _table("fid", sorted(flat, key=heading), heading, extractor=extractor)
    if table is None:
        return None
    if any(row.get("is_stand_in") for row in rows):
        heads = [("Fréchet distance" if head == "FID" else head, is_number) for head, is_number in table.heads]
        table = replace(table, heads=heads)
        table.warnings.append(
            "Distances of a stand-in extractor: they are not FID and cannot be compared with published values."
        )
    smallest = min(min(row["n1"], row["n2"]) for row in rows)
    if smallest < SMALL:
        table.warnings.append(
            f"The smallest set has {count(smallest)} images. Below {count(SMALL)} images read KID first: the Fréchet "
            "distance is biased upwards, more so for fewer images."
        )
    return table


def _fidelity(rows: list[TableRow]) -> Table | None:
    """Fidelity and diversity of the sets that are large enough."""
    flat = []
    for row in (row for row in rows if "manifold" in row):
        direction, limit = row.get("direction", {}), row.get("infinity", {})
        values = {**row["manifold"], **row.get("verisimilitude", {}), **row.get("interpolation", {}), **row}
        values["direction"] = direction.get("mean")
        values["direction_interval"] = (direction["low"], direction["high"]) if direction else None
        flat.append({**values, "at_infinity": limit["value"] if limit.get("trusted") else None})
    return _table("fidelity", flat)


def _within(rows: list[TableRow]) -> Table | None:
    """Distances class by class, beside the distance of the pooled sets, as papers report it."""
    several = len({row["extractor"] for row in rows}) > 1
    classes = plain(rows[0]["conditions"]) if rows else ""
    return _table(
        "fid_within",
        rows,
        lambda row: f"Extractor {row['extractor']}" if several else "",
        key="fid-within",
        conditions=classes,
    )


def _paper_table(row: TableRow) -> str:
    """The paper's comparison that a row belongs to."""
    if "(reference)" not in row["set1"]:
        return "Table 1: images and their counterfactuals"
    if "(counterfactual)" in row["set2"]:
        return "Table 2: real reference images and counterfactuals"
    return "Table 1: real reference images and images"
