"""Tables 1 to 5 in the paper's layout: the published value beside ours, with N, intervals and controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from diffva_ray.evaluate.distances import distance_row, run_features
from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.records import finished, read_records
from diffva_ray.evaluate.run_index import index_run
from diffva_ray.evaluate.set_distances import choose_extractors, reference
from diffva_ray.metrics.fid import SMALL
from diffva_ray.metrics.fid_controls import conditional, split_halves
from diffva_ray.paper.experiments import SAMPLES, SETTINGS, SHEET
from diffva_ray.paper.layout import Table, number, with_error, with_interval
from diffva_ray.paper.state import PaperState, settings_of
from diffva_ray.schema import TableRow

CLASSES: dict[str, dict[str, float]] = SHEET["published"]["classes"]
FIVE_SCALES = 5  # of the paper's MS-SSIM
MIN_HALVES = 8  # images that can be split into halves


@dataclass
class Distances:
    """One comparison of two image sets, under one setting or several."""

    first: str  # name of the first set
    second: str  # name of the second set
    paper: str  # published value as text
    rows: dict[str, TableRow | None] = field(default_factory=dict)  # by setting, from ``distances.distance_row``
    more: list[str] = field(default_factory=list)  # a further line: measure, N1 / N2, paper, ours by setting


def extractor_line(rows: Sequence[TableRow | None]) -> tuple[str, str]:
    """The name of the distance, and a sentence that names its extractor."""
    row = next((row for row in rows if row), None)
    if row is None:
        return "Fréchet distance", "No distance could be computed."
    text = f"Extractor {row['extractor']} (weights {row['weights_sha256'][:8]}), resize path {row['resize']}."
    if min(row["n1"], row["n2"]) <= row.get("dimension", 0):
        text += (
            f" Fewer images than the {row['dimension']} feature dimensions: the bias is large, and the interval "
            "corrects only a part of it."
        )
    if row["is_stand_in"]:
        text += " It is a stand-in, not FID: its values cannot be compared with the paper's."
        return "Fréchet distance", text
    return "FID", text


def lines(comparison: Distances, columns: Sequence[str], name: str) -> list[list[str]]:
    """Table rows of one comparison: the distance and KID (KID first below 2048 images), then the controls."""
    rows = [comparison.rows.get(column) for column in columns]
    first = next((row for row in rows if row), None)
    if first is None:
        return [[comparison.first, comparison.second, name, "", comparison.paper, *["not made" for _ in columns]]]

    def line(measure: str, n1: int, n2: int, paper: str, text: Callable[[TableRow], str]) -> list[str]:
        cells = ["–" if row is None else text(row) for row in rows]
        return [comparison.first, comparison.second, measure, f"{n1} / {n2}", paper, *cells]

    n1, n2 = first["n1"], first["n2"]
    kid = line("KID ± s.e.", n1, n2, "", lambda row: with_error(row["kid"]["value"], row["kid"]["standard_error"]))
    distance = line(
        f"{name} [95 %]", n1, n2, comparison.paper, lambda row: with_interval(row["value"], row["interval"])
    )
    result = [kid, distance] if min(n1, n2) < SMALL else [distance, kid]
    if n1 != n2:
        size = first["n_matched"]["n"]
        result.append(
            line(f"{name}, N matched", size, size, "",
                 lambda row: with_error(row["n_matched"]["mean"], row["n_matched"]["sd"]))
        )  # fmt: skip
    if any("halves" in row for row in rows if row):
        size = first.get("halves", {}).get("n", 0)
        result.append(
            line(f"{name}, split halves", size, size, "", lambda row: number(row.get("halves", {}).get("crossed")))
        )
    return result


def _fid_row(metrics: Mapping[str, Any], first: str, second: str) -> TableRow | None:
    return next((row for row in metrics.get("fid", []) if (row["set1"], row["set2"]) == (first, second)), None)


def _distance_table(key: str, comparisons: Sequence[Distances], columns: Sequence[str], **values: Any) -> Table:
    """A table of distances; ``values`` fill its caption, which also names the extractor."""
    name, extractor = extractor_line([row for comparison in comparisons for row in comparison.rows.values()])
    body = []
    for comparison in comparisons:
        body += lines(comparison, columns, name)
        body += [[comparison.first, comparison.second, *comparison.more]] if comparison.more else []
    heads = ["image set 1", "image set 2", "measure", "N1 / N2", "paper"]
    heads += [SETTINGS.get(column, "ours") for column in columns]
    return _table(key, heads, body, details(comparisons), extractor=extractor, **values)


def _table(key: str, heads: list[str], body: list[list[str]], details: list[TableRow], **values: Any) -> Table:
    """A table with its title and its caption, filled with ``values``."""
    texts = SHEET["tables"][key]
    return Table(key, texts["title"], texts["caption"].format_map(values).strip(), heads, body, details)


def distance_tables(state: PaperState, labels: Sequence[str]) -> list[Table]:
    """Tables 1 and 2 from the runs with both settings of the paper and with the model's own recipe."""
    absent = [label for label in CLASSES if label not in labels]
    state.missing += [(f"tables 1 to 3, class {label}", "no images") for label in absent]
    healthy = state.base.data.healthy_class
    reference = f"{healthy} (reference)"
    columns = [name for name in SETTINGS if name in state.metrics]

    def compared(one: str, other: str, paper: str, sets: tuple[str, str]) -> Distances:
        return Distances(one, other, paper, {name: _fid_row(state.metrics[name], *sets) for name in columns})

    first, second = list[Distances](), list[Distances]()
    for label in labels:
        paper = CLASSES.get(label, {})
        names = f"{label} (source)", f"{label} (counterfactual)"

        edits = compared(f"{label} images", "their healthy counterfactuals", _paper(paper, "counterfactuals"), names)
        real = compared(f"{label} images", f"real {healthy}", _paper(paper, "healthy"), (reference, names[0]))
        pairs = zip(edits.rows.values(), real.rows.values())
        gaps = [number(abs(a["value"] - b["value"])) if a and b else "–" for a, b in pairs]
        real.more = ["absolute difference of the two", "", _paper(paper, "difference"), *gaps]
        first += [edits, real]
        of_label = f"healthy counterfactuals of {label}"
        second.append(compared(f"real {healthy}", of_label, _paper(paper, "quality"), (reference, names[1])))
    settings = prompts(state, columns)
    return [
        _distance_table("table1", first, columns, settings=settings),
        _distance_table("table2", second, columns, settings=settings),
    ]


def prompts(state: PaperState, columns: Sequence[str]) -> str:
    """Sampling settings and prompt of each column, for captions."""
    texts = [f"{SETTINGS.get(column, column)}: {settings_of(state.runs[column])}" for column in columns]
    return f"Settings: {'; '.join(texts)}."


def details(comparisons: Sequence[Distances]) -> list[TableRow]:
    """All numbers of the comparisons, one row for each setting."""
    return [
        {"image_set_1": comparison.first, "image_set_2": comparison.second, "setting": column,
         "paper": comparison.paper or None, **row}
        for comparison in comparisons
        for column, row in comparison.rows.items()
        if row
    ]  # fmt: skip


def _paper(paper: dict[str, float], name: str) -> str:
    return f"{paper[name]:g}" if name in paper else ""


def similarity_table(state: PaperState, labels: Sequence[str]) -> Table:
    """Table 3: MS-SSIM and SSIM of image and counterfactual."""
    columns = [name for name in SETTINGS if name in state.metrics]
    body, details = list[list[str]](), list[TableRow]()
    first: TableRow = {}
    for label in labels:
        paper = CLASSES.get(label, {})
        rows = [next((row for row in state.metrics[column].get("ssim", []) if row["label"] == label), None)
                for column in columns]  # fmt: skip
        if not any(rows):
            continue
        first = next(row for row in rows if row)
        five = first["ms_ssim_scales"] == FIVE_SCALES
        for key, name in (("ms_ssim", "MS-SSIM"), ("ssim", "SSIM")):
            value = paper.get(key)
            text = "–" if value is None else f"{value:.3f}"
            if value is not None and key == "ms_ssim" and not five:  # another quantity than ours
                text = "(5 scales)"
            ours = ["–" if row is None else with_interval(row[key], row[f"{key}_interval"]) for row in rows]
            body.append([label, name, str(first["n"]), text, *ours])
        details += [{"setting": column, **row} for column, row in zip(columns, rows) if row]
    heads = ["class", "measure", "N", "paper", *(SETTINGS[column] for column in columns)]
    scales = ""
    if first and first["ms_ssim_scales"] != FIVE_SCALES:
        scales = "The paper's MS-SSIM has five scales, which need 176 px, and cannot be compared with ours."
    values = {"preset": "–", "grid": "–", "ms_ssim_scales": 0, **first}
    return _table("table3", heads, body, details, scales=scales, settings=prompts(state, columns), **values)


def cardiomegaly_table(state: PaperState) -> Table:
    """Table 4: generated cardiomegaly against real cardiomegaly, and against the healthy images it was made from."""
    healthy, metrics = state.base.data.healthy_class, state.metrics.get("cardiomegaly", {})
    names = f"{healthy} (source)", f"{healthy} (counterfactual)"
    real = "Cardiomegaly (reference)"
    paper = SHEET["published"]["cardiomegaly"]
    comparisons = [
        Distances("real cardiomegaly (CheXpert)", "generated cardiomegaly", _paper(paper, "real")),
        Distances("healthy images", "generated cardiomegaly", _paper(paper, "healthy")),
        Distances("real cardiomegaly (CheXpert)", "healthy images", ""),
    ]
    pairs = ((real, names[1]), names, (real, names[0]))
    for comparison, pair in zip(comparisons, pairs):
        row = _fid_row(metrics, *pair)
        if row:
            comparison.rows["cardiomegaly"] = row
    settings = prompts(state, ["cardiomegaly"]) if "cardiomegaly" in state.runs else ""
    table = _distance_table("table4", comparisons, ["cardiomegaly"], settings=settings)
    return with_sample(table, state, "cardiomegaly", "real cardiomegaly (CheXpert)")


def with_sample(table: Table, state: PaperState, name: str, title: str) -> Table:
    """The table with a first row: the paper's size of the random sample ``name``, and how many images ours has."""
    sample = state.samples.get(name)
    size = "–" if sample is None else f"{sample.size} of {sample.available}"
    table.rows.insert(0, [title, "", "images drawn", "", str(SAMPLES[name]), size])
    return table


def ablation_table(state: PaperState) -> Table:
    """Table 5: real healthy images against what the ablations make of them, and the effect of guidance <= 1."""
    healthy = state.base.data.healthy_class
    comparisons = list[Distances]()
    for run_name, (title, paper) in SHEET["ablations"].items():
        if run_name not in state.runs:
            continue
        keys = state.runs[run_name].keys
        setting = f"{keys['strength']:g} / {keys['guidance_scale']:g}, “{keys['prompt']}”"
        comparison = Distances(f"real {healthy}", f"{title} ({setting})", f"{paper:g}" if paper else "")
        row, within = _pooled(state, run_name)
        if row is not None and within is not None:  # of several classes
            row["within_class"] = within
            comparison.more = ["distance within class", "", "", number(within)]
        comparison.rows["ours"] = row
        comparisons.append(comparison)
    table = _distance_table("table5", comparisons, ["ours"], guidance=guidance_finding(state))
    return with_sample(table, state, "random healthy", f"random {healthy} images")


def source_table(state: PaperState, labels: Sequence[str]) -> Table | None:
    """Table S12: counterfactuals against healthy images of the same source; None without sources."""
    healthy, columns = state.base.data.healthy_class, [name for name in SETTINGS if name in state.metrics]
    within = {name: [row for row in state.metrics[name].get("fid", []) if row.get("source")] for name in columns}
    sources = sorted({row["source"] for rows in within.values() for row in rows})
    if not sources:
        return None
    comparisons = list[Distances]()
    for label in labels:
        of_label = f"healthy counterfactuals of {label}"
        of_all = {name: _fid_row(state.metrics[name], f"{healthy} (reference)", f"{label} (counterfactual)")
                  for name in columns}  # fmt: skip
        for source in sources:
            sets = f"{healthy} of {source} (reference)", f"{label} of {source} (counterfactual)"
            rows = {name: _fid_row(state.metrics[name], *sets) for name in columns}
            if any(rows.values()):
                comparisons.append(Distances(f"real {healthy} of {source}", f"{of_label} of {source}", "", rows))
        comparisons.append(Distances(f"real {healthy}", of_label, "", of_all))
    return _distance_table("tableS12", comparisons, columns)


def _pooled(state: PaperState, name: str) -> tuple[TableRow | None, float | None]:
    """The distance of all counterfactuals of a run to real healthy images, and its mean over the classes."""
    run = state.runs[name]
    records = index_run(run)
    if not len(records.frame):
        return None, None
    # features
    healthy = state.base.data.healthy_class
    options = Options(weights=state.options.weights, resize=state.options.resize, cache=state.store.uri)
    extractor = choose_extractors(run, options, [])[0]
    features = run_features(run, records, extractor)
    counterfactuals = features.counterfactual
    healthy_images = reference(run, healthy, state.radiography, extractor, options, [])
    if healthy_images is None:
        return None, None
    # distances
    real = healthy_images.features
    row = distance_row(f"real {healthy}", name, real, counterfactuals, extractor, run.recipe.evaluate.fid_subsets)
    labels = records.frame["label"]
    groups = {label: (real, counterfactuals.take((labels == label).to_numpy())) for label in sorted(labels.unique())}
    if set(groups) == {healthy} and row is not None and len(counterfactuals) >= MIN_HALVES:
        row["halves"] = asdict(split_halves(features.source, counterfactuals, splits=2))
    single = len(groups) == 1 or any(len(of_label) < 2 for _, of_label in groups.values())
    return row, None if single else conditional(groups)


def guidance_finding(state: PaperState) -> str:
    """Compare the pixels of two runs that differ only in a guidance of 1 or less."""
    names = ("no-text", "no-text-guidance-1")
    if not set(names) <= state.runs.keys():
        return "Guidance of 1 or less was not compared."
    records = [finished(read_records(state.runs[name])) for name in names]
    first, second = (dict(zip(rows["image_path"], rows["counterfactual_sha256"])) for rows in records)
    common = first.keys() & second.keys()
    same = sum(first[path] == second[path] for path in common)
    scales = [f"{state.runs[name].keys['guidance_scale']:g}" for name in names]
    return f"Guidance {scales[0]} and {scales[1]} give the same pixels in {same} of {len(common)} images."
