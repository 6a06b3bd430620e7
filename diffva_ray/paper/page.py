"""``index.md`` and ``index.html``: the tables and figures in the paper's order, what was assumed, what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jinja2 import Environment

from diffva_ray.data.datasets import open_dataset
from diffva_ray.paper.experiments import ASSUMED, EXPERIMENTS
from diffva_ray.paper.extras import extra_tables
from diffva_ray.paper.figures import Drawn, draw_figures
from diffva_ray.paper.layout import Table, thinned
from diffva_ray.paper.state import Made, abnormal_classes
from diffva_ray.paper.tables import ablation_table, cardiomegaly_table, distance_tables, likeness_table

TITLE = "The tables and figures of Siddiqui et al. 2024"
UNMADE = (
    ("figure 1", "a drawing of the method; ARCHITECTURE.md has ours"),
    (
        "source-matched control (children against children)",
        "the Radiography layout does not say an image's source; "
        "diffva reduce RUN --sources CSV compares within sources where a table says it",
    ),
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'">
<title>{{ title }}</title><style>
body{font:15px/1.5 system-ui,sans-serif;color:#1c2328;margin:0 auto;max-width:1360px;padding:1.5rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2.2rem}p,li{max-width:78ch}.c{color:#5d6a73;font-size:.86rem}
.w{overflow-x:auto}table{border-collapse:collapse;font-size:.84rem}td,th{padding:.22rem .5rem;text-align:left;
border-bottom:1px solid #e6eaed;white-space:nowrap;font-variant-numeric:tabular-nums}th{border-bottom:2px solid #c9d1d6}
img{max-width:100%;height:auto;border:1px solid #e6eaed}.s{font-weight:600}
</style></head><body>
<h1>{{ title }}</h1><p class="s">Not for clinical use.</p>
{% for text in intro %}<p>{{ text }}</p>{% endfor %}
{% for table in tables %}<h2 id="{{ table.key }}">{{ table.title }}</h2><div class="w"><table><thead><tr>
{% for head in table.heads %}<th>{{ head }}</th>{% endfor %}</tr></thead><tbody>
{% for row in thinned(table.rows) %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div><p class="c">{{ table.caption }}</p>
<p class="c">{% for end in ("csv", "md", "tex", "json") %}<a href="tables/{{ table.key }}.{{ end }}">{{ end }}</a>
{% endfor %}</p>{% endfor %}
{% for figure in figures %}<h2 id="figure{{ figure.number }}">Figure {{ figure.number }}. {{ figure.title }}</h2>
<img src="{{ figure.path }}" alt="{{ figure.title }}"><p class="c">{{ figure.caption }}</p>{% endfor %}
<h2>Not made</h2><ul>{% for what, why in missing %}<li>{{ what }}: {{ why }}</li>{% endfor %}</ul>
<h2>Assumed</h2><ul>{% for text in assumed %}<li>{{ text }}</li>{% endfor %}</ul>
<h2>Runs</h2><ul>{% for name, shows in runs %}<li><code>runs/{{ name }}</code>: {{ shows }}</li>{% endfor %}</ul>
{% if notes %}<h2>Notes</h2><ul>{% for text in notes %}<li>{{ text }}</li>{% endfor %}</ul>{% endif %}
</body></html>
"""


def write_page(made: Made) -> None:
    """Compute and write every table and figure, then the two pages."""
    dataset = open_dataset(made.radiography, made.base.data)
    labels = abnormal_classes(dataset, made.base.data.healthy_class)
    tables = [*distance_tables(made, labels), likeness_table(made, labels), cardiomegaly_table(made)]
    tables.append(ablation_table(made))
    tables += extra_tables(made, tables)
    for table in tables:
        table.write(made.store)
    figures = draw_figures(made)
    missing = [*made.missing, *UNMADE]
    assumed = [*ASSUMED, *dict.fromkeys(text for run in made.runs.values() for text in run.recipe.assumed)]
    notes = list(dict.fromkeys([*made.notes, *(n for m in made.metrics.values() for n in m.get("notes", []))]))
    runs = [(experiment.name, experiment.shows) for experiment in EXPERIMENTS if experiment.name in made.runs]
    intro = introduction(made, dataset.classes)
    made.store.put("index.md", _markdown(intro, tables, figures, missing, assumed, runs, notes).encode())
    page = Environment(autoescape=True).from_string(PAGE)
    made.store.put(
        "index.html",
        page.render(title=TITLE, intro=intro, tables=tables, figures=figures, missing=missing, assumed=assumed,
                    runs=runs, notes=notes, thinned=thinned).encode(),
    )  # fmt: skip


def introduction(made: Made, classes: dict[str, int]) -> list[str]:
    """What images and which model, and how to read the rest."""
    counts = ", ".join(f"{label} {n}" for label, n in classes.items())
    phantoms = made.card.get("data_kind") == "phantoms"
    found = [
        f"Images: {counts}. Model {made.card['digest'][:12]} (recipe {made.base.name}, {made.base.model.resolution} px"
        + (", trained on phantoms" if phantoms else "")
        + "). Seed and settings of every run are in its run.json.",
        "Each table has the paper's published value beside ours. The paper gives neither N nor an interval for its "
        "tables 1 to 3, and not which of its two settings made them: both are here, and the model's own recipe beside "
        "them.",
    ]
    if phantoms:
        found.append(
            "This model has learned phantoms and this sheet shows how the method and its numbers behave; it says "
            "nothing about real images."
        )
    return found


def _markdown(
    intro: Sequence[str],
    tables: Sequence[Table],
    figures: Sequence[Drawn],
    missing: Sequence[tuple[str, str]],
    assumed: Sequence[str],
    runs: Sequence[tuple[str, str]],
    notes: Sequence[str],
) -> str:
    parts = [f"# {TITLE}", "**Not for clinical use.**", *intro]
    for table in tables:
        parts += [f"## {table.title}", table.markdown(), table.caption]
    for figure in figures:
        parts += [f"## Figure {figure.number}. {figure.title}", f"![{figure.title}]({figure.path})", figure.caption]
    parts += ["## Not made", _bullets(f"{what}: {why}" for what, why in missing)]
    parts += ["## Assumed", _bullets(assumed)]
    parts += ["## Runs", _bullets(f"`runs/{name}`: {shows}" for name, shows in runs)]
    if notes:
        parts += ["## Notes", _bullets(notes)]
    return "\n\n".join(parts) + "\n"


def _bullets(texts: Iterable[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)
