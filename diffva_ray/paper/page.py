"""``index.md`` and ``index.html``: tables and figures in the paper's order, with assumptions and what is missing."""

from __future__ import annotations

from collections.abc import Sequence

from diffva_ray.data.datasets import open_dataset
from diffva_ray.evaluate.report.assets import render_page
from diffva_ray.evaluate.report.numbers import text_table
from diffva_ray.paper.experiments import EXPERIMENTS, SHEET
from diffva_ray.paper.extras import extra_tables
from diffva_ray.paper.figures import PaperFigure, draw_figures
from diffva_ray.paper.layout import Table, thinned
from diffva_ray.paper.state import PaperState
from diffva_ray.paper.studies import study_tables
from diffva_ray.paper.tables import (
    CLASSES,
    ablation_table,
    cardiomegaly_table,
    distance_tables,
    similarity_table,
    source_table,
)

NO_SOURCES = "no source has two counterfactuals and two healthy images, or none are given (--sources)"
TITLE = "The tables and figures of Siddiqui et al. 2024"


def write_page(state: PaperState) -> None:
    """Compute and write all tables and figures, then ``index.md`` and ``index.html``."""
    # tables and figures
    dataset = open_dataset(state.radiography, state.base.data)
    classes = {label for label in dataset.classes if label != state.base.data.healthy_class}
    labels = [*(label for label in CLASSES if label in classes), *sorted(classes - CLASSES.keys())]  # the paper's first
    tables = [*distance_tables(state, labels), similarity_table(state, labels), cardiomegaly_table(state)]
    tables.append(ablation_table(state))
    tables += extra_tables(state, tables)
    tables += study_tables(state)
    within = source_table(state, labels)
    if within is None:
        state.missing.append(("Table S12. Distances within sources (children against children)", NO_SOURCES))
    else:
        tables.append(within)
    for table in tables:
        table.write(state.store)
    figures = draw_figures(state)
    # lists at the end of the page
    notes = [*state.notes, *(note for metrics in state.metrics.values() for note in metrics.get("notes", []))]
    recipe_assumptions = [text for run in state.runs.values() for text in run.recipe.assumed]
    lists = [
        ("Not made", [f"{what}: {why}" for what, why in [*state.missing, *SHEET["not_planned"]]]),
        ("Assumed", [*SHEET["assumed"], *dict.fromkeys(recipe_assumptions)]),
        ("Runs", [f"runs/{item.name}: {item.shows}" for item in EXPERIMENTS if item.name in state.runs]),
        ("Notes", list(dict.fromkeys(notes))),
    ]
    # pages
    intro = introduction(state, dataset.classes)
    state.store.put("index.md", _markdown(intro, tables, figures, lists).encode())
    html_tables = [text_table(t.key, t.title, t.caption, t.heads, thinned(t.rows), "dense") for t in tables]
    values = {"title": TITLE, "intro": intro, "tables": html_tables, "figures": figures, "lists": lists}
    state.store.put("index.html", render_page("paper.html", ("page.css",), values).encode())


def introduction(state: PaperState, classes: dict[str, int]) -> list[str]:
    """Images, model, and how to read the tables."""
    counts = ", ".join(f"{label} {n}" for label, n in classes.items())
    phantoms = state.card.get("data_kind") == "phantoms"
    paragraphs = [
        f"Images: {counts}. Model {state.card['digest'][:12]} (recipe {state.base.name}, "
        f"{state.base.model.resolution} px{', trained on phantoms' if phantoms else ''}). Seed and settings of each "
        "run are in its run.json.",
        "Each table shows the paper's published value beside ours. For tables 1 to 3 the paper gives no "
        "interval, and not which of its two settings was used: both are shown, and the model's own recipe.",
    ]
    if phantoms:
        paragraphs.append(
            "This model was trained on phantoms: the page shows how the method and its numbers behave, and nothing "
            "about real images."
        )
    return paragraphs


def _markdown(
    intro: Sequence[str],
    tables: Sequence[Table],
    figures: Sequence[PaperFigure],
    lists: Sequence[tuple[str, list[str]]],
) -> str:
    parts = [f"# {TITLE}", "**Not for clinical use.**", *intro]
    for table in tables:
        parts += [f"## {table.title}", table.markdown(), table.caption]
    for figure in figures:
        parts += [f"## Figure {figure.number}. {figure.title}", f"![{figure.title}]({figure.path})", figure.caption]
    for heading, lines in lists:
        if lines:
            parts += [f"## {heading}", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts) + "\n"
