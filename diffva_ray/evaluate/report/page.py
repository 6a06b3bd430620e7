"""``report/index.html``: settings, results and warnings of a run, finished or not.

The page loads only files beside it; style and script are inline and allowed by their hashes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from diffva_ray.evaluate import figures
from diffva_ray.evaluate.annotations import lesion_shapes
from diffva_ray.evaluate.anonymous import without_examples, without_names
from diffva_ray.evaluate.credibility import stated
from diffva_ray.evaluate.figures import map_scale, own_shapes, settings_line, write_figures
from diffva_ray.evaluate.judge_quality import judge_quality
from diffva_ray.evaluate.records import as_records, finished, reduced_metrics
from diffva_ray.evaluate.report.assets import render_page, viewer_script
from diffva_ray.evaluate.report.catalogue import NAMES, attempts, counts, read_earlier, write_catalogue, write_names
from diffva_ray.evaluate.report.charts import charts
from diffva_ray.evaluate.report.images import (
    Palette,
    PanelFiles,
    map_file,
    max_listed,
    sample,
    strip_file,
    write_panels,
)
from diffva_ray.evaluate.report.numbers import cards, count, glance, judge_problem, plain, text_table
from diffva_ray.evaluate.report.result_tables import report_tables
from diffva_ray.evaluate.tables import known
from diffva_ray.generate.committed import committed, parts
from diffva_ray.generate.run import SUCCESS, Run
from diffva_ray.model.card import UnusableModel, read_card
from diffva_ray.schema import Record, Status, TableRow
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import join

PAGE = "report/index.html"
MAX_QUARANTINE_ROWS = 100  # of the quarantine table
MAX_QUARANTINE_LISTED = 5000  # quarantined records in the viewer
PAGE_COLUMNS = (
    "record_id", "image_path", "image_sha256", "label", "prompt", "status", "error", "ssim", "attribution_energy",
    "judge_image", "judge_counterfactual", "counterfactual_path", "attribution_path", "reconstruction_path",
    "lung_mask_path", "lesion_mask_path", "ground_truth_path", "width", "height", "view", "spacing", "sample",
)  # read of every record; all columns of a million records would take several GB  # fmt: skip
FEW = 10  # records, below which the page says that its numbers say little
LIMIT_TOLERANCE = 1.25  # an earlier report's colour limit is kept if the new one differs by at most this factor


@dataclass(frozen=True)
class Note:
    """A warning at the top of the page."""

    text: str
    command: str = ""  # that the reader can run
    grave: bool = False  # displayed in red


@dataclass(frozen=True)
class Contents:
    """The files beside the page."""

    index_files: int  # number of index files
    listed: list[Record]  # records in the viewer
    bad_listed: int  # quarantined records among them
    panels: dict[str, PanelFiles]  # by record id
    limit: float  # of the map colours
    chosen: int  # ok records in the viewer


def write_report(run: Run, listed: int | None = None, boxes: str | None = None, anonymous: bool = False) -> str:
    """Write figures and page of a run, finished or not, replace earlier ones, and return the URI of the page; panels
    still valid are kept.

    ``listed``: largest number of ok records in the viewer (None: as many as the image size allows); ``boxes``: CSV of
    lesion boxes (None: those of the data set); ``anonymous``: whether ids replace the names of files. Raises
    UnusableData for boxes of other images."""
    records = committed(run, PAGE_COLUMNS).to_pandas()
    write_figures(run, records)
    contents = write_contents(run, records, listed, boxes, anonymous)
    if anonymous:
        run.store.delete(NAMES)
    else:
        write_names(run, records)
    run.store.put(PAGE, render(run, records, contents, anonymous).encode())
    return join(run.store.uri, PAGE)


def write_contents(
    run: Run, records: pd.DataFrame, listed: int | None = None, csv: str | None = None, anonymous: bool = False
) -> Contents:
    """Write the files that the page loads: panels below ``report/images``, records below ``report/data``."""
    # colours
    earlier = read_earlier(run)
    limit = map_scale(run, records).limit
    if earlier.limit is not None and 1 / LIMIT_TOLERANCE <= limit / earlier.limit <= LIMIT_TOLERANCE:
        limit = earlier.limit
    # records
    size = run.recipe.model.resolution
    chosen = {row["record_id"] for row in sample(records, max_listed(size) if listed is None else listed)}
    chosen |= {row["record_id"] for _, row in figures.spanning(run, records)}
    failed = records.loc[records["status"] != Status.OK.value, "record_id"].head(MAX_QUARANTINE_LISTED)
    rows = whole(run, chosen | set(failed))
    good = [row for row in rows if row["record_id"] in chosen]
    # files
    if csv is None:
        lesions = own_shapes(run, [row["image_path"] for row in good])
    else:
        lesions = lesion_shapes(run.about["data"], run.recipe.data, csv, [])
    panels = write_panels(run, good, Palette(limit), lesions, earlier.panels)
    rows = [without_names(run, row) for row in rows] if anonymous else rows
    about = {"limit": limit, "side": size, "extension": strip_file("", "", size).rpartition(".")[2]}
    varied = {row["record_id"]: text for row in rows if (text := varied_settings(run, row))}
    return Contents(write_catalogue(run, rows, panels, about, varied), rows, len(failed), panels, limit, len(good))


def whole(run: Run, ids: set[str]) -> list[Record]:
    """All columns of the records ``ids``, in plan order."""
    wanted = pa.array(sorted(ids), pa.string())
    kept = [table.filter(pc.is_in(table["record_id"], wanted)) for _, table in parts(run, run.records_schema.names)]
    return as_records(pa.concat_tables(kept).to_pandas()) if kept else []


def render(run: Run, records: pd.DataFrame, contents: Contents, anonymous: bool = False) -> str:
    """The page as HTML."""
    metrics = reduced_metrics(run)
    bad = records[records["status"] != Status.OK.value]
    done = {
        "planned": run.about["records"],
        "records": len(records),
        "ok": len(finished(records)),
        "quarantined": len(bad),
        **counts(records, attempts(run)),
    }
    named = partial(without_names, run) if anonymous else lambda row: row
    quarantine = [
        (row["image_path"], plain(row["label"]), row["status"], row["error"] or "–")
        for row in map(named, as_records(bad.head(MAX_QUARANTINE_ROWS)))
    ]
    reduce_notes = (metrics or {}).get("notes", [])
    name = run.store.uri.rstrip("/").split("/")[-1]
    values = {
        "title": f"{name} · diffva report",
        "name": name,
        "recipe": run.recipe,
        "prompt": run.keys["prompt"],
        "settings": settings_line(run),
        "facts": facts(run),
        "recipe_json": json.dumps(run.about["recipe"], indent=1, ensure_ascii=False),
        "notes": notes(run, metrics, done),
        "reduce_notes": without_examples(reduce_notes) if anonymous else reduce_notes,
        "done": done,
        "problems": stated(run, metrics),
        "glance": glance(metrics),
        "cards": cards(metrics, done),
        "tables": report_tables(metrics) if metrics else [],
        "charts": charts(records),
        "cases": list(map(named, cases(run, records, contents.panels))),
        "ranked_by": figures.ranking(run, records)[1] if len(records) else "",
        "contents": contents,
        "unreadable": contents.chosen - len(contents.panels),
        "induced": figures.inducing(run, records),
        "quarantine": text_table(
            "quarantine", "Quarantine", "", ("image", "class", "status", "reason"), quarantine, "reasons"
        ),
        "quarantine_shown": len(quarantine),
        "reasons": bad["status"].value_counts().to_dict(),
    }
    return render_page("page.html", ("page.css", "charts.css", "viewer.css"), values, viewer_script())


def cases(run: Run, records: pd.DataFrame, panels: dict[str, PanelFiles]) -> list[TableRow]:
    """Best, typical and worst image of each class, without those that have no panels; the answers of a judge that
    guesses are left out."""
    size, results = run.recipe.model.resolution, []
    quality = judge_quality(run)
    guesses = quality is not None and bool(quality.problem)
    for rank, row in figures.spanning(run, records):
        files = panels.get(row["record_id"])
        if files is None:
            continue
        results.append(
            {
                **row,
                "rank": rank,
                "strip": f"images/{strip_file(row['record_id'], files.key, size)}",
                "map": f"images/{map_file(row['record_id'], files.key)}",
                "lesion": files.lesion,
                "truth": files.truth,
                "auroc": files.auroc,
                "side": size,
                "judged": not guesses and known(row["judge_image"]) and known(row["judge_counterfactual"]),
            }
        )
    return results


def varied_settings(run: Run, row: Mapping[str, Any]) -> str:
    """The swept settings and the sample number that distinguish a record from others of its image."""
    keys = [str(key) for key, _ in run.keys["sweep"]]
    parts_of_text = [f"{plain(key)} {row[key]}" for key in keys if row.get(key) is not None]
    if run.keys["samples"] > 1:
        parts_of_text.append(f"sample {row['sample']}")
    return ", ".join(parts_of_text)


def facts(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Method, model, data and provenance of the run as headed lists of (name, value)."""
    keys, about, recipe = run.keys, run.about, run.recipe
    swept = {key: ", ".join(str(value) for value in values) + " (swept)" for key, values in keys["sweep"]}
    method = ("method", "scheduler", "num_inference_steps", "strength", "guidance_scale", "prompt", "samples", "seed")
    machine = about.get("machine", {})
    generation = [
        *((plain(key), swept.get(key, str(keys[key]))) for key in method),
        ("kind of map", recipe.generate.map_name),
        ("resolution", f"{keys['resolution']} px, {keys['aspect']}"),
    ]
    model_and_data = [
        ("recipe", recipe.name),
        ("model", str(about.get("model", "–"))),
        ("model digest", keys["model_digest"][:16]),
        ("data", str(about.get("data", "–"))),
        ("kind of data", str(about.get("data_kind") or "not recorded")),
        ("classes", ", ".join(keys["classes"] or ["all but " + recipe.data.healthy_class])),
        ("limit", "none" if keys["limit"] is None else count(keys["limit"])),
    ]
    provenance = [
        ("started", str(about.get("started", "–"))),
        ("diffva-ray", f"{about.get('diffva_ray', '–')}, code {about.get('code_revision', '–')}"),
        ("fingerprint", run.fingerprint),
        ("device", f"{keys['device']}, {keys['dtype']}, micro-batch {keys['micro_batch']}"),
        ("machine", f"{machine.get('system', '–')}, {machine.get('cpus', '–')} CPUs"),
        ("versions", ", ".join(f"{key} {value}" for key, value in about.get("versions", {}).items())),
    ]
    return [("Method", generation), ("Model and data", model_and_data), ("Provenance", provenance)]


def notes(run: Run, metrics: Mapping[str, Any] | None, done: Mapping[str, Any]) -> list[Note]:
    """Warnings that a reader must know before the numbers, the most serious first."""
    command = f"diffva reduce {shlex.quote(run.store.uri)}"
    results = model_notes(run)
    if done["records"] < done["planned"]:
        text = (
            f"Unfinished: {count(done['records'])} of {count(done['planned'])} planned records are done, and this page "
            "shows those. Run the same diffva generate command again to continue."
        )
        results.append(Note(text, grave=True))
    # tables
    if metrics is None:
        results.append(Note("Not reduced yet, so there are no tables. Run:", command))
    else:
        if metrics["records"]["ok"] != done["ok"]:
            text = f"The tables are of {count(metrics['records']['ok'])} records; {count(done['ok'])} are ok now."
            results.append(Note(text, command, True))
        if problem := judge_problem(metrics):
            results.append(Note(f"Flip rates on this page are not reliable: {problem}.", grave=True))
        if not run.store.exists(SUCCESS):
            text = "Not marked as finished (no _SUCCESS): the last reduce was interrupted, or more records are "
            results.append(Note(f"{text}quarantined than max_quarantined_fraction allows.", grave=True))
    if 0 < done["ok"] < FEW:
        shown = "1 record" if done["ok"] == 1 else f"{done['ok']} records"
        results.append(Note(f"Only {shown}: the numbers on this page say little about other images."))
    # how the run was made
    if run.keys["sweep"]:
        varied = ", ".join(plain(key) for key, _ in run.keys["sweep"])
        results.append(Note(f"This run sweeps {varied}: tables separate its settings, distributions pool them."))
    for change in run.about.get("environment_changes", []):
        text = ", ".join(f"{key} {value}" for key, value in change.items())
        results.append(Note(f"Continued in another environment ({text}): pixels may differ from an undisturbed run."))
    if str(run.about.get("code_revision", "")).endswith("-dirty"):
        results.append(Note("Made with an edited checkout: the code revision alone does not reproduce this run."))
    return results


def model_notes(run: Run) -> list[Note]:
    """A warning where the model was trained on another kind of data, or where that is unknown."""
    kind, uri = run.about.get("data_kind"), str(run.about.get("model", ""))
    try:
        card = read_card(open_store(uri)) if uri else None
    except (OSError, ValueError, UnusableModel):
        card = None
    if card is None:
        return [Note("The model’s card cannot be read: this page does not know what the model was trained on.")]
    trained = card.get("data_kind")
    if trained == "phantoms" != kind:
        text = (
            "This model was trained on phantoms and has not learned real images: attribution maps on this page show "
            "what the model does, not what is abnormal."
        )
        return [Note(text, grave=True)]
    if trained and kind and trained != kind:
        return [Note(f"The model was trained on {trained}, these images are {kind}: expect worse results.")]
    return []
