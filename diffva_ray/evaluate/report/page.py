"""``report/index.html``: what a run is, what it found, and what to be careful about; for finished and unfinished runs.

The page asks for nothing but the pictures beside it: style and script are inline, allowed by their digests alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from diffva_ray.evaluate.figures import direction, finished, reduced_metrics, settings_line, write_figures
from diffva_ray.evaluate.records import Row, read_records
from diffva_ray.evaluate.report.gallery import FILMS, FOLDER, Gallery, write_gallery
from diffva_ray.evaluate.report.numbers import cards, count, number, plain, report_tables
from diffva_ray.generate.plan import SUCCESS, Run
from diffva_ray.model.card import UnusableModel, read_card
from diffva_ray.schema import Status
from diffva_ray.storage import join, open_store

PAGE = "report/index.html"
QUARANTINED = 100  # rows shown at most
HERE = resources.files(__package__)


@dataclass(frozen=True)
class Note:
    """Something to be careful about. ``command`` is what to type, where that helps; ``grave`` ones stand out."""

    text: str
    command: str = ""
    grave: bool = False


def write_report(run: Run) -> str:
    """Write the figures and the page of a run, replacing earlier ones; returns where the page is.

    An unfinished run, or one without tables, gets the page of what there is. Raises OSError when the run cannot be
    read or written.
    """
    records = read_records(run)
    figures = {path.split("/")[-1]: run.store.read(path) for path in write_figures(run, records)}
    gallery = write_gallery(run, records)
    for name, picture in figures.items():
        run.store.put(f"{FOLDER}/{name}", picture)
    kept = {f"{FOLDER}/{name}" for name in figures} | {f"{FOLDER}/{row['record_id']}.png" for row in gallery.shown}
    for entry in run.store.list(FOLDER):
        if entry.path not in kept:  # of an earlier report, when other films were done
            run.store.delete(entry.path)
    run.store.put(PAGE, render(run, records, gallery, list(figures)).encode())
    return join(run.store.uri, PAGE)


def render(run: Run, records: pd.DataFrame, gallery: Gallery, figures: Sequence[str]) -> str:
    """The page as HTML. ``figures``: names of pictures beside it. Every value is escaped."""
    style, script = (Markup((HERE / name).read_text()) for name in ("page.css", "page.js"))  # our own, not escaped
    metrics = reduced_metrics(run)
    bad = records[records["status"] != Status.OK.value]
    done = {
        "planned": run.about["records"],
        "records": len(records),
        "ok": len(finished(records)),
        "quarantined": len(bad),
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"count": count, "number": number, "plain": plain}
    return environment.from_string((HERE / "page.html").read_text()).render(
        style=style,
        script=script,
        policy=policy(style, script),
        name=run.store.uri.rstrip("/").split("/")[-1],
        recipe=run.recipe,
        prompt=run.about["keys"]["prompt"],
        settings=settings_line(run),
        facts=facts(run),
        recipe_json=json.dumps(run.about["recipe"], indent=1, ensure_ascii=False),
        notes=notes(run, metrics, done),
        reduce_notes=(metrics or {}).get("notes", []),
        done=done,
        cards=cards(metrics, done),
        tables=report_tables(metrics) if metrics else [],
        figures=figures,
        gallery=gallery,
        gallery_limit=FILMS,
        films=[_film(run, row) for row in gallery.shown],
        classes=sorted({row["label"] for row in gallery.shown}),
        induced=any(direction(run, label) < 0 for label in {row["label"] for row in gallery.shown}),
        judged=any(_known(row["judge_counterfactual"]) for row in gallery.shown),
        quarantine=bad.head(QUARANTINED).to_dict("records"),
    )


def policy(style: str, script: str) -> str:
    """Content-Security-Policy: pictures beside the page, this very style and script, nothing else."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src 'self' file:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _film(run: Run, row: Row) -> Row:
    """What the gallery says about a record; what a sweep or draws vary is named."""
    varied = [str(key) for key, _ in run.about["keys"]["sweep"]]
    said = [f"{plain(key)} {row[key]}" for key in varied if row.get(key) is not None]
    if run.about["keys"]["draws"] > 1:
        said.append(f"draw {row['draw']}")
    judge = None
    if _known(row["judge_source"]) and _known(row["judge_counterfactual"]):
        judge = (row["judge_source"], row["judge_counterfactual"])
    return {**row, "picture": f"images/{row['record_id']}.png", "judge": judge, "varied": ", ".join(said)}


def _known(value: Any) -> bool:
    return value is not None and value == value


def facts(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """What was run and with what, as headed lists of (name, value)."""
    keys, about, recipe = run.about["keys"], run.about, run.recipe
    swept = {key: ", ".join(str(value) for value in values) + " (swept)" for key, values in keys["sweep"]}
    method = ("method", "scheduler", "num_inference_steps", "strength", "guidance_scale", "prompt", "draws", "seed")
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
        if not run.store.exists(SUCCESS):
            text = "Not marked as finished (no _SUCCESS): the last reduce ended early, or more records are quarantined"
            found.append(Note(f"{text} than max_quarantined_fraction allows.", grave=True))
    if run.about["keys"]["sweep"]:
        varied = ", ".join(plain(key) for key, _ in run.about["keys"]["sweep"])
        found.append(
            Note(f"This run sweeps {varied}: cards, tables and distributions are over all its points together.")
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
            "This model was trained on phantoms and has not learned real films; maps on this page show what it does, "
            "not what is wrong."
        )
        return [Note(text, grave=True)]
    if trained and kind and trained != kind:
        return [Note(f"The model was trained on {trained}, these films are {kind}: expect it to do worse on them.")]
    return []
