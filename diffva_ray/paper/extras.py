"""Tables S1 to S7, which the paper does not have: the report's tables of several runs side by side, and an audit of
memorisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from diffva_ray.data.dataset import LabelledImage, UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.images import BadImage, decode, to_square
from diffva_ray.evaluate.records import as_records, finished, grey, read_records
from diffva_ray.evaluate.report.result_tables import report_tables
from diffva_ray.evaluate.tables import ALL
from diffva_ray.generate.run import Run
from diffva_ray.metrics.counterfactual import memorisation
from diffva_ray.metrics.localization import SALIENCY
from diffva_ray.model.training_images import TrainingImages
from diffva_ray.paper.experiments import SETTINGS, SHEET
from diffva_ray.paper.layout import Table, number
from diffva_ray.paper.state import PaperState
from diffva_ray.schema import TableRow, digest
from diffva_ray.storage.store import Store

MAX_AUDITED = 600  # counterfactuals and images of each set in the memorisation audit
AUDIT_SIDE = 32  # pixels of the side of the images that the audit compares


@dataclass(frozen=True, kw_only=True)
class Extra:
    """A table of the report, over several runs."""

    key: str
    title: str
    table: str  # key in the report and in metrics.json
    more_runs: dict[str, str] = field(default_factory=dict)  # titles of runs before those of SETTINGS
    pooled: bool = False  # whether only the rows over all classes are shown
    caption: str  # added to that of the report
    absent: str  # why there may be no rows


EXTRAS = tuple(Extra(**fields) for fields in SHEET["extras"])


def extra_tables(state: PaperState, tables: Sequence[Table]) -> list[Table]:
    """Tables S1 to S7, S5 from the distances of ``tables``; those without rows are listed in ``state.missing``."""
    made = dict[str, Table]()
    for extra in EXTRAS:
        rows = _rows(state, extra)
        if rows:
            made[extra.key] = _of_report(extra.key, extra.title, extra.table, {extra.table: rows}, extra.caption)
        else:
            state.missing.append((extra.title, extra.absent))
    chosen = [table for table in tables if table.key in ("table2", "table4", "table5")]
    rows = [{**row, "run": SETTINGS.get(row["setting"], "")} for table in chosen for row in table.details
            if "manifold" in row]  # fmt: skip
    title = "Table S5. Fidelity and diversity"
    if rows:
        made["tableS5"] = _of_report("tableS5", title, "fidelity", {"fid": rows})
    else:
        state.missing.append((title, "fewer than six images in every comparison"))
    try:
        made["tableS4"] = audit_table(state)
    except ValueError as error:
        state.missing.append(("Table S4. Memorisation", str(error)))
    return [made[key] for key in sorted(made)]


def _rows(state: PaperState, extra: Extra) -> list[TableRow]:
    """The rows of all runs; baselines, which are the same in every run, of the first run only."""
    results = list[TableRow]()
    for name, title in {**extra.more_runs, **SETTINGS}.items():
        metrics = state.metrics.get(name, {})
        rows = metrics.get(extra.table, [])
        if extra.pooled and any(row["label"] == ALL for row in rows):
            rows = [row for row in rows if row["label"] == ALL]
        rates = {row["label"]: row["flip_rate"] for row in metrics.get("validity", [])}
        for row in rows:
            if not results or row.get("map", "positive") in SALIENCY or results[0]["run"] == title:
                rate = {"flip_rate": rates.get(row["label"])} if extra.table == "counterfactual" else {}
                results.append({"run": title, **row, **rate})
    return results


def _of_report(key: str, title: str, name: str, metrics: dict[str, list[TableRow]], caption: str = "") -> Table:
    """The report's table ``name`` of ``metrics``, with its groups in the first column."""
    (table,) = (table for table in report_tables(metrics) if table.key == name)
    body = [[group.title, *(cell.text for cell in cells)] for group in table.groups for _, cells in group.rows]
    heads = ["setting", *(head for head, _ in table.heads)]
    (rows,) = metrics.values()
    return Table(key, title, f"{table.caption} {caption}".strip(), heads, body, rows)


def audit_table(state: PaperState) -> Table:
    """Table S4: whether healthy counterfactuals are nearer to healthy training images than to unseen healthy images.

    Raises ValueError with the reason why it cannot be made."""
    healthy = state.base.data.healthy_class
    # training images and unseen images
    try:
        trained = open_dataset(str(state.card.get("data", "")), state.base.data, [healthy])
    except (UnusableData, OSError, ValueError) as error:
        raise ValueError(f"the training images cannot be read ({error})") from None
    unseen = open_dataset(state.radiography, state.base.data, [healthy])
    seen = TrainingImages.of(state.card)
    held = audit_images(unseen.store, unseen.images, seen, False)
    train = audit_images(trained.store, trained.images, seen, True)
    # counterfactuals of each setting
    body, details = list[list[str]](), list[TableRow]()
    for name in (name for name in SETTINGS if name in state.runs):
        audit = memorisation(audit_counterfactuals(state.runs[name]), train, held)
        low, high = audit.without_memory
        body.append([SETTINGS[name], f"{audit.n}", f"{audit.set_size}", number(audit.nearer),
                     f"{number(low)} to {number(high)}", f"{audit.p_value:.3f}", number(audit.train),
                     number(audit.held_out)])  # fmt: skip
        details.append({"setting": name, **asdict(audit)})
    caption = (
        "Healthy counterfactuals against healthy training images and the same number of unseen healthy images, by "
        f"Euclidean distance of images of {AUDIT_SIDE} px. Without memory: the central 95 % of the shares when images "
        "are assigned to the two sets at random (permutation test); p: how often that share is at least as large."
    )
    heads = ["setting", "counterfactuals", "images in each set", "nearer to training", "without memory", "p",
             "median distance, training", "median distance, unseen"]  # fmt: skip
    return Table("tableS4", "Table S4. Memorisation", caption, heads, body, details)


def audit_counterfactuals(run: Run) -> np.ndarray:
    """At most MAX_AUDITED counterfactuals of a run as rows [n, AUDIT_SIDE ** 2]."""
    rows = sorted(as_records(finished(read_records(run))), key=lambda row: digest(row["image_path"]))
    return np.array([_small(grey(run.store, row["counterfactual_path"])) for row in rows[:MAX_AUDITED]])


def audit_images(
    store: Store, images: Sequence[LabelledImage], training: TrainingImages | None = None, wanted: bool = True
) -> np.ndarray:
    """At most MAX_AUDITED images as rows [n, AUDIT_SIDE ** 2]; with known hashes only those that are (or are not)
    training images."""
    rows = []
    for image in sorted(images, key=lambda image: digest(image.path))[:MAX_AUDITED]:
        try:
            data = store.read(image.path)
            if training is None or (training.holds(data) is wanted):
                rows.append(_small(decode(data)))
        except (OSError, BadImage):
            continue
    return np.array(rows).reshape(len(rows), AUDIT_SIDE**2)


def _small(image: np.ndarray) -> np.ndarray:
    return to_square(image.astype(np.float32), AUDIT_SIDE).ravel()
