"""``report/index.html``: what a run is, what it found, and what to be careful about; for finished and unfinished runs.

The page asks for nothing but the files beside it: style and script are inline, allowed by their digests alone.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from diffva_ray.evaluate import figures
from diffva_ray.evaluate.annotations import lesion_boxes
from diffva_ray.evaluate.figures import map_scale, own_boxes, settings_line, write_figures
from diffva_ray.evaluate.records import finished, reduced_metrics
from diffva_ray.evaluate.report import images
from diffva_ray.evaluate.report.assets import policy, style, templates, viewer_script
from diffva_ray.evaluate.report.catalogue import attempts, counts, read_earlier, write_catalogue
from diffva_ray.evaluate.report.charts import charts
from diffva_ray.evaluate.report.images import Palette, Pictured, map_file, sample, strip_file, write_pictures
from diffva_ray.evaluate.report.numbers import cards, count, glance, judge_problem, number, plain
from diffva_ray.evaluate.report.result_tables import report_tables
from diffva_ray.generate.committed import committed, parts
from diffva_ray.generate.run import SUCCESS, Run
from diffva_ray.model.card import UnusableModel, read_card
from diffva_ray.schema import RECORDS, Row, Status
from diffva_ray.storage.store import join, open_store

PAGE = "report/index.html"
QUARANTINED = 100  # rows of the table, at most
LISTED_BAD = 5000  # quarantined records of the viewer, at most
SEEN = (
    "record_id", "image_path", "label", "prompt", "status", "error", "ssim", "attribution_energy", "judge_image",
    "judge_counterfactual", "counterfactual_path", "attribution_path", "reconstruction_path", "lung_mask_path",
    "lesion_mask_path", "ground_truth_path", "width", "height",
)  # columns read of every record; of a million, all of them would take several GB  # fmt: skip
STICKY = 1.25  # colours of an earlier report are kept while their limit is within this factor of what it would be now


@dataclass(frozen=True)
class Note:
    """Something to be careful about. ``command`` is what to type, where that helps; ``grave`` ones stand out."""

    text: str
    command: str = ""
    grave: bool = False


@dataclass(frozen=True)
class Contents:
    """What lies beside the page: index files, the records listed there, their pictures, the limit of the colours."""

    index_files: int
    listed: list[Row]
    bad_listed: int
    pictures: dict[str, Pictured]
    limit: float
    chosen: int


def write_report(run: Run, listed: int | None = None, boxes: str | None = None) -> str:
    """Write the figures and the page of a run, replacing earlier ones; returns where the page is.

    An unfinished run, or one without tables, gets the page of what there is; pictures of an earlier report are kept
    where they still hold. ``listed``: records in the viewer at most; ``boxes``: a CSV of lesion boxes. Raises OSError
    when the run cannot be read or written, UnusableData for boxes of other images.
    """
    records = committed(run, SEEN).to_pandas()
    write_figures(run, records)
    contents = write_contents(run, records, listed, boxes)
    run.store.put(PAGE, render(run, records, contents).encode())
    return join(run.store.uri, PAGE)


def write_contents(run: Run, records: pd.DataFrame, listed: int | None = None, csv: str | None = None) -> Contents:
    """Everything the page loads: pictures below ``report/images``, records below ``report/data``."""
    earlier = read_earlier(run)
    limit = map_scale(run, records).limit
    if earlier.limit is not None and 1 / STICKY <= limit / earlier.limit <= STICKY:
        limit = earlier.limit
    most = images.most(run.recipe.model.resolution) if listed is None else listed
    chosen = {row["record_id"] for row in sample(records, most)}
    chosen |= {row["record_id"] for _, row in figures.spanning(run, records)}
    failed = records.loc[records["status"] != Status.OK.value, "record_id"].head(LISTED_BAD)
    rows = whole(run, chosen | set(failed))
    good = [row for row in rows if row["record_id"] in chosen]
    if csv is None:
        boxes = own_boxes(run, [row["image_path"] for row in good])
    else:
        boxes = lesion_boxes(run.about["data"], csv, [])
    pictures = write_pictures(run, good, Palette(limit), boxes, earlier.pictures)
    extension = strip_file("", "", run.recipe.model.resolution).rpartition(".")[2]
    about = {"limit": limit, "side": run.recipe.model.resolution, "extension": extension}
    varied = {row["record_id"]: text for row in rows if (text := varied_settings(run, row))}
    files = write_catalogue(run, rows, pictures, about, varied)
    return Contents(files, rows, len(failed), pictures, limit, len(good))


def whole(run: Run, ids: set[str]) -> list[Row]:
    """All columns of some records, in plan order."""
    wanted = pa.array(sorted(ids), pa.string())
    kept = [table.filter(pc.is_in(table["record_id"], wanted)) for _, table in parts(run, RECORDS.names)]
    return pa.concat_tables(kept).to_pandas().to_dict("records") if kept else []


def render(run: Run, records: pd.DataFrame, contents: Contents) -> str:
    """The page as HTML. Every value is escaped."""
    css, script = Markup(style("page.css", "charts.css", "viewer.css")), Markup(viewer_script())  # our own, not escaped
    metrics = reduced_metrics(run)
    bad = records[records["status"] != Status.OK.value]
    done = {
        "planned": run.about["records"],
        "records": len(records),
        "ok": len(finished(records)),
        "quarantined": len(bad),
        **counts(records, attempts(run)),
    }
    filters = {"count": count, "number": number, "plain": plain}
    return (
        templates(**filters)
        .get_template("page.html")
        .render(
            title=f"{run.store.uri.rstrip('/').split('/')[-1]} · diffva report",
            style=css,
            script=script,
            policy=policy(css, script),
            name=run.store.uri.rstrip("/").split("/")[-1],
            recipe=run.recipe,
            prompt=run.keys["prompt"],
            settings=settings_line(run),
            facts=facts(run),
            recipe_json=json.dumps(run.about["recipe"], indent=1, ensure_ascii=False),
            notes=notes(run, metrics, done),
            reduce_notes=(metrics or {}).get("notes", []),
            done=done,
            glance=glance(metrics),
            cards=cards(metrics, done),
            tables=report_tables(metrics) if metrics else [],
            charts=charts(records),
            cases=cases(run, records, contents.pictures),
            ranked_by=figures.ranking(run, records)[1] if len(records) else "",
            contents=contents,
            unreadable=contents.chosen - len(contents.pictures),
            induced=figures.inducing(run, records),
            quarantine=bad.head(QUARANTINED).to_dict("records"),
            reasons=bad["status"].value_counts().to_dict(),
        )
    )


def cases(run: Run, records: pd.DataFrame, pictures: dict[str, Pictured]) -> list[Row]:
    """Best, typical and worst image of each class, with the pictures beside the page; those without any are left
    out."""
    size, found = run.recipe.model.resolution, []
    names = {"highest": "best", "median": "typical", "lowest": "worst"}
    for rank, row in figures.spanning(run, records):
        picture = pictures.get(row["record_id"])
        if picture is None:
            continue
        found.append(
            {
                **row,
                "rank": names[rank],
                "strip": f"images/{strip_file(row['record_id'], picture.key, size)}",
                "map": f"images/{map_file(row['record_id'], picture.key)}",
                "lesion": picture.lesion,
                "truth": picture.truth,
                "auroc": picture.auroc,
                "side": size,
                "judged": _known(row["judge_image"]) and _known(row["judge_counterfactual"]),
            }
        )
    return found


def varied_settings(run: Run, row: Row) -> str:
    """What sets a record apart from others of its image: swept settings, samples."""
    keys = [str(key) for key, _ in run.keys["sweep"]]
    said = [f"{plain(key)} {row[key]}" for key in keys if row.get(key) is not None]
    if run.keys["samples"] > 1:
        said.append(f"sample {row['sample']}")
    return ", ".join(said)


def _known(value: Any) -> bool:
    return value is not None and value == value


def facts(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """What was run and with what, as headed lists of (name, value)."""
    keys, about, recipe = run.keys, run.about, run.recipe
    swept = {key: ", ".join(str(value) for value in values) + " (swept)" for key, values in keys["sweep"]}
    method = ("method", "scheduler", "num_inference_steps", "strength", "guidance_scale", "prompt", "samples", "seed")
    machine = about.get("machine", {})
    return [
        (
            "Method",
            [(plain(key), swept.get(key, str(keys[key]))) for key in method]
            + [("map", recipe.generate.map_name), ("resolution", f"{keys['resolution']} px, {keys['aspect']}")],
        ),
        (
            "Model and data",
            [
                ("recipe", recipe.name),
                ("model", str(about.get("model", "–"))),
                ("model digest", keys["model_digest"][:16]),
                ("data", str(about.get("data", "–"))),
                ("kind of data", str(about.get("data_kind") or "not recorded")),
                ("classes", ", ".join(keys["classes"] or ["all but " + recipe.data.healthy_class])),
                ("limit", "none" if keys["limit"] is None else count(keys["limit"])),
            ],
        ),
        (
            "Provenance",
            [
                ("started", str(about.get("started", "–"))),
                ("diffva-ray", f"{about.get('diffva_ray', '–')}, code {about.get('code_revision', '–')}"),
                ("fingerprint", run.fingerprint),
                ("device", f"{keys['device']}, {keys['dtype']}, micro-batch {keys['micro_batch']}"),
                ("machine", f"{machine.get('system', '–')}, {machine.get('cpus', '–')} CPUs"),
                ("versions", ", ".join(f"{key} {value}" for key, value in about.get("versions", {}).items())),
            ],
        ),
    ]


def notes(run: Run, metrics: Row | None, done: Row) -> list[Note]:
    """What a reader of this run has to know before its numbers, gravest first."""
    place = shlex.quote(run.store.uri)
    found = model_notes(run)
    missing = done["planned"] - done["records"]
    if missing:
        text = (
            f"Unfinished: {count(done['records'])} of {count(done['planned'])} planned records are done, and this page "
            "shows those. The same diffva generate command again goes on with the others."
        )
        found.append(Note(text, grave=True))
    if metrics is None:
        found.append(Note("Not reduced yet, so there are no tables.", f"diffva reduce {place}"))
    else:
        if metrics["records"]["ok"] != done["ok"]:
            text = f"The tables are of {count(metrics['records']['ok'])} records; {count(done['ok'])} are ok now."
            found.append(Note(text, f"diffva reduce {place}", True))
        if problem := judge_problem(metrics):
            found.append(Note(f"No flip rate of this page says anything: {problem}.", grave=True))
        if not run.store.exists(SUCCESS):
            text = "Not marked as finished (no _SUCCESS): the last reduce ended early, or more records are quarantined"
            found.append(Note(f"{text} than max_quarantined_fraction allows.", grave=True))
    if run.keys["sweep"]:
        varied = ", ".join(plain(key) for key, _ in run.keys["sweep"])
        found.append(
            Note(f"This run sweeps {varied}: tables keep its settings apart, distributions take them together.")
        )
    for change in run.about.get("environment_changes", []):
        text = ", ".join(f"{key} {value}" for key, value in change.items())
        found.append(Note(f"Continued in another environment ({text}): pixels may differ from an undisturbed run."))
    if str(run.about.get("code_revision", "")).endswith("-dirty"):
        found.append(Note("Made with an edited checkout: the code revision alone does not reproduce it."))
    return found


def model_notes(run: Run) -> list[Note]:
    """What the model was trained on, where that is not what the run is about."""
    kind, uri = run.about.get("data_kind"), str(run.about.get("model", ""))
    try:
        card = read_card(open_store(uri)) if uri else None
    except (OSError, ValueError, UnusableModel):
        card = None
    if card is None:
        return [Note("The model’s card cannot be read from here: what it was trained on is not known to this page.")]
    trained = card.get("data_kind")
    if trained == "phantoms" != kind:
        text = (
            "This model was trained on phantoms and has not learned real images; maps on this page show what it does, "
            "not what is wrong."
        )
        return [Note(text, grave=True)]
    if trained and kind and trained != kind:
        return [Note(f"The model was trained on {trained}, these images are {kind}: expect it to do worse on them.")]
    return []
