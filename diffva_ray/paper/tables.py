"""Tables 1 to 5 in the paper's layout: its published value beside ours, with N, intervals and what the paper lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffva_ray.evaluate.distances import distance_row, run_features
from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.records import read_records
from diffva_ray.evaluate.run_index import index_run
from diffva_ray.evaluate.set_distances import choose_extractors, reference
from diffva_ray.metrics.fid import SMALL
from diffva_ray.metrics.fid_controls import conditional
from diffva_ray.paper import published
from diffva_ray.paper.experiments import SETTINGS
from diffva_ray.paper.layout import Table, number, with_error, with_interval
from diffva_ray.paper.state import Made, settings_of
from diffva_ray.schema import Row, Status

FIVE_SCALES = 5


@dataclass
class Distances:
    """Distance rows of one comparison by column (setting), as ``distances.distance_row`` gives them."""

    first: str
    second: str
    paper: str
    rows: dict[str, Row | None] = field(default_factory=dict)


def extractor_line(rows: Sequence[Row | None]) -> tuple[str, str]:
    """What the distance is called, and the sentence that names its extractor."""
    row = next((row for row in rows if row), None)
    if row is None:
        return "Fréchet distance", "No distance could be computed."
    about = f"Extractor {row['extractor']} (weights {row['weights_sha256'][:8]}), resize path {row['resize']}."
    if min(row["n1"], row["n2"]) <= row.get("dimension", 0):
        about += (
            f" Fewer images than its {row['dimension']} dimensions: the bias is large and the interval removes "
            "a part of it only."
        )
    if row["is_stand_in"]:
        return "Fréchet distance", about + " It is a stand-in, not FID: its values cannot be set against the paper's."
    return "FID", about


def lines(comparison: Distances, columns: Sequence[str], name: str) -> list[list[str]]:
    """Display rows of one comparison: KID first below 2048 images; the distance; its controls."""
    rows = [comparison.rows.get(column) for column in columns]
    known = [row for row in rows if row]
    if not known:
        return [[comparison.first, comparison.second, name, "", comparison.paper, *["not made" for _ in columns]]]
    sizes = f"{known[0]['n1']} / {known[0]['n2']}"

    def cells(show: Any) -> list[str]:
        return ["–" if row is None else show(row) for row in rows]

    kid = ["KID ± s.e.", sizes, "", *cells(lambda row: with_error(row["kid"]["value"], row["kid"]["standard_error"]))]
    distance = [f"{name} [95 %]", sizes, comparison.paper,
                *cells(lambda row: with_interval(row["value"], row["interval"]))]  # fmt: skip
    found = [kid, distance] if min(known[0]["n1"], known[0]["n2"]) < SMALL else [distance, kid]
    if known[0]["n1"] != known[0]["n2"]:
        size = known[0]["n_matched"]["n"]
        found.append([f"{name}, N matched", f"{size} / {size}", "",
                      *cells(lambda row: with_error(row["n_matched"]["mean"], row["n_matched"]["sd"]))])  # fmt: skip
    if any("halves" in row for row in known):
        halves = known[0].get("halves", {}).get("n", 0)
        found.append([f"{name}, split halves", f"{halves} / {halves}", "",
                      *cells(lambda row: number(row.get("halves", {}).get("crossed")))])  # fmt: skip
    return [[comparison.first, comparison.second, *row] for row in found]


def _fid_row(metrics: Row, first: str, second: str) -> Row | None:
    return next((row for row in metrics.get("fid", []) if (row["set1"], row["set2"]) == (first, second)), None)


def distance_tables(made: Made, labels: Sequence[str]) -> list[Table]:
    """Tables 1 and 2 from the runs of both settings and of the model's own recipe."""
    absent = [label for label in published.CLASSES if label not in labels]
    made.missing += [(f"tables 1 to 3, class {label}", "no image of it") for label in absent]
    healthy = made.base.data.healthy_class
    reference = f"{healthy} (reference)"
    columns = [name for name in SETTINGS if name in made.metrics]
    first, second = list[Distances](), list[Distances]()
    differences: dict[str, list[str]] = {}
    for label in labels:
        paper = published.CLASSES.get(label)
        names = f"{label} (source)", f"{label} (counterfactual)"
        edits = Distances(f"{label} images", "their healthy counterfactuals", _paper(paper, "counterfactuals"))
        real = Distances(f"{label} images", f"real {healthy}", _paper(paper, "healthy"))
        quality = Distances(f"real {healthy}", f"healthy counterfactuals of {label}", _paper(paper, "quality"))
        for column in columns:
            metrics = made.metrics[column]
            edits.rows[column] = _fid_row(metrics, *names)
            real.rows[column] = _fid_row(metrics, reference, names[0])
            quality.rows[column] = _fid_row(metrics, reference, names[1])
        first += [edits, real]
        second.append(quality)
        pairs = [(edits.rows[column], real.rows[column]) for column in columns]
        differences[label] = [number(abs(a["value"] - b["value"])) if a and b else "–" for a, b in pairs]
    name, about = extractor_line([row for comparison in first for row in comparison.rows.values()])
    heads = ["image set 1", "image set 2", "measure", "N1 / N2", "paper", *(SETTINGS[column] for column in columns)]
    body = list[list[str]]()
    for label, edits, real in zip(labels, first[::2], first[1::2]):
        paper = published.CLASSES.get(label)
        body += [*lines(edits, columns, name), *lines(real, columns, name)]
        body.append([f"{label} images", "", "absolute difference", "", _paper(paper, "difference"),
                     *differences[label]])  # fmt: skip
    own = f"Intervals: delete-group jackknife, bias-corrected. {about} {prompts(made, columns)}"
    return [
        Table(
            "table1",
            "Table 1. Images, their healthy counterfactuals and real healthy images",
            "The paper takes the small distance between images and their own counterfactuals for "
            "minimal change; an image "
            "there meets its own edit, so the split halves (no image meets its own) stand beside it. Its “relative "
            f"absolute difference” is this plain difference. {own}",
            heads,
            body,
            details(first),
        ),
        Table(
            "table2",
            "Table 2. Real healthy images and healthy counterfactuals",
            f"The same reference set for every class. N differs between classes and the distance is biased by it: read "
            f"the N-matched value or KID. {own}",
            heads,
            [line for comparison in second for line in lines(comparison, columns, name)],
            details(second),
        ),
    ]


def prompts(made: Made, columns: Sequence[str]) -> str:
    """Prompt and map of each setting, for captions."""
    said = []
    for column in columns:
        said.append(f"{SETTINGS.get(column, column)}: {settings_of(made.runs[column])}")
    return "SamplingSettings: " + "; ".join(said) + "."


def details(comparisons: Sequence[Distances]) -> list[Row]:
    """Every number of the comparisons, one row for each setting."""
    return [
        {"image_set_1": comparison.first, "image_set_2": comparison.second, "setting": column,
         "paper": comparison.paper or None, **row}
        for comparison in comparisons
        for column, row in comparison.rows.items()
        if row
    ]  # fmt: skip


def _paper(paper: published.ByClass | None, name: str) -> str:
    return "" if paper is None else f"{getattr(paper, name):g}"


def likeness_table(made: Made, labels: Sequence[str]) -> Table:
    """Table 3: MS-SSIM and SSIM of image and counterfactual."""
    columns = [name for name in SETTINGS if name in made.metrics]
    body, found, five = list[list[str]](), list[Row](), True
    about: Row = {}
    for label in labels:
        paper = published.CLASSES.get(label)
        rows = [next((row for row in made.metrics[column].get("ssim", []) if row["label"] == label), None)
                for column in columns]  # fmt: skip
        known = [row for row in rows if row]
        if not known:
            continue
        about = known[0]
        five = about["ms_ssim_scales"] == FIVE_SCALES
        for key, name, value in (
            ("ms_ssim", "MS-SSIM", paper and paper.ms_ssim),
            ("ssim", "SSIM", paper and paper.ssim),
        ):
            if value is None:
                shown = "–"
            elif key == "ms_ssim" and not five:  # theirs and ours would be two measures
                shown = "(5 scales)"
            else:
                shown = f"{value:.3f}"
            ours = ["–" if row is None else with_interval(row[key], row[f"{key}_interval"]) for row in rows]
            body.append([label, name, str(about["n"]), shown, *ours])
        found += [{"setting": column, **row} for column, row in zip(columns, rows) if row]
    scales = about.get("ms_ssim_scales", 0)
    caption = (
        f"Means with 95 % bootstrap intervals over images; preset {about.get('preset')}, {about.get('grid')} px grid"
    )
    caption += f", MS-SSIM over {scales} scales."
    if not five:
        caption += " The paper's MS-SSIM has five scales, which need 176 px: another quantity, so it is not set beside."
    caption += f" {prompts(made, columns)}"
    heads = ["class", "measure", "N", "paper", *(SETTINGS[column] for column in columns)]
    return Table("table3", "Table 3. Likeness of image and healthy counterfactual", caption, heads, body, found)


def cardiomegaly_table(made: Made) -> Table:
    """Table 4: induced cardiomegaly against real cardiomegaly and against the healthy images it was made of."""
    healthy, metrics = made.base.data.healthy_class, made.metrics.get("cardiomegaly", {})
    names = f"{healthy} (source)", f"{healthy} (counterfactual)"
    real = "Cardiomegaly (reference)"
    comparisons = [
        Distances("real cardiomegaly (CheXpert)", "generated cardiomegaly", f"{published.CARDIOMEGALY_REAL:g}"),
        Distances("healthy images", "generated cardiomegaly", f"{published.CARDIOMEGALY_HEALTHY:g}"),
        Distances("real cardiomegaly (CheXpert)", "healthy images", ""),
    ]
    pairs = ((real, names[1]), names, (real, names[0]))
    for comparison, pair in zip(comparisons, pairs):
        row = _fid_row(metrics, *pair)
        if row:
            comparison.rows["cardiomegaly"] = row
    name, about = extractor_line([row for comparison in comparisons for row in comparison.rows.values()])
    caption = (
        "The third comparison is ours: how far the two data sets are apart before anything is generated. Where it is "
        "no larger than the first, generating cardiomegaly has not brought the images nearer to real ones. The paper "
        f"has {published.CARDIOMEGALY_IMAGES} real images. {about} "
        + (prompts(made, ["cardiomegaly"]) if "cardiomegaly" in made.runs else "")
    )
    body = [line for comparison in comparisons for line in lines(comparison, ["cardiomegaly"], name)]
    heads = ["image set 1", "image set 2", "measure", "N1 / N2", "paper", "ours"]
    return Table("table4", "Table 4. Cardiomegaly, zero-shot", caption, heads, body, details(comparisons))


ABLATIONS = (
    ("generate-0.55", "full method (the paper's setting)", ""),
    ("no-text", "no text encoder", f"{published.NO_TEXT:g}"),
    ("no-image-prior", "no image prior", f"{published.NO_IMAGE_PRIOR:g}"),
    ("neither", "neither", f"{published.NEITHER:g}"),
    ("prompt-only", "control: empty prompt, all else as in the full method", ""),
)


def ablation_table(made: Made) -> Table:
    """Table 5: real healthy images against all counterfactuals of a run, whatever their class, and what guidance <= 1
    does."""
    healthy = made.base.data.healthy_class
    comparisons, settings = list[Distances](), list[list[str]]()
    for run_name, title, paper in ABLATIONS:
        if run_name not in made.runs:
            continue
        comparison = Distances(f"real {healthy}", title, paper)
        comparison.rows["ours"], within = _pooled(made, run_name)
        if comparison.rows["ours"] is not None and within is not None:
            comparison.rows["ours"]["within_class"] = within
        keys = made.runs[run_name].keys
        settings.append([f"{keys['strength']:g} / {keys['guidance_scale']:g}", f"“{keys['prompt']}”"])
        comparisons.append(comparison)
    name, about = extractor_line([comparison.rows["ours"] for comparison in comparisons])
    body = []
    for comparison, setting in zip(comparisons, settings):
        for line in lines(comparison, ["ours"], name):
            body.append([comparison.second, *setting, *line[2:]])
        row = comparison.rows["ours"]
        if row and "within_class" in row:
            body.append([comparison.second, *setting, f"{name} within class", "", "", number(row["within_class"])])
    heads = ["ablation", "strength / guidance", "prompt", "measure", "N1 / N2", "paper", "ours"]
    caption = (
        f"{guidance_finding(made)} So rows with guidance of 1 or less ablate the prompt, not the guidance; the control "
        "takes away the prompt alone. Strength 0.99 keeps about 9 % of the image's signal (75 "
        "steps): it is not without "
        f"an image. The paper: N = {published.ABLATION_IMAGES}. “Within class”: mean over classes of the distance to "
        f"real {healthy} images. {about}"
    )
    return Table("table5", "Table 5. Ablations", caption, heads, body, details(comparisons))


def _pooled(made: Made, name: str) -> tuple[Row | None, float | None]:
    run = made.runs[name]
    records = index_run(run)
    if not len(records.frame):
        return None, None
    healthy = made.base.data.healthy_class
    options = Options(weights=made.options.weights, resize=made.options.resize, cache=made.store.uri)
    extractor = choose_extractors(run, options, [])[0]
    counterfactuals = run_features(run, records, extractor).counterfactual
    healthy_images = reference(run, healthy, made.radiography, extractor, options, [])
    if healthy_images is None:
        return None, None
    real = healthy_images.features
    found = distance_row(f"real {healthy}", name, real, counterfactuals, extractor, run.recipe.evaluate.fid_subsets)
    labels = records.frame["label"]
    groups = {label: (real, counterfactuals.take((labels == label).to_numpy())) for label in sorted(labels.unique())}
    small = any(len(of_label) < 2 for _, of_label in groups.values())
    return found, None if small else conditional(groups)


def guidance_finding(made: Made) -> str:
    """What guidance of 1 or less does, from the pixels of two runs that differ in it alone."""
    if not {"no-text", "no-text-guidance-1"} <= made.runs.keys():
        return "Guidance of 1 or less was not compared."
    one, other = (
        records[records["status"] == Status.OK.value].set_index("image_path")["counterfactual_sha256"].to_dict()
        for records in (read_records(made.runs["no-text"]), read_records(made.runs["no-text-guidance-1"]))
    )
    common = sorted(set(one) & set(other))
    same = sum(one[path] == other[path] for path in common)
    first, second = (made.runs[name].keys["guidance_scale"] for name in ("no-text", "no-text-guidance-1"))
    return f"Guidance {first:g} and {second:g} give the same pixels in {same} of {len(common)} images."
