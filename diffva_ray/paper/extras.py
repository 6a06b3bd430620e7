"""What the paper has no table for: does the verdict turn, how little changes, where, on healthy films, from memory,
and how much of each set the other covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.films import Film, UnusableData
from diffva_ray.data.images import BadImage, decode, to_square
from diffva_ray.evaluate.figures import finished
from diffva_ray.evaluate.records import grey, read_images, read_records, read_truth
from diffva_ray.evaluate.tables import finite_mean
from diffva_ray.metrics.counterfactual import changed_share, cout, memorisation, outside_lesion
from diffva_ray.metrics.localization import patient_bootstrap
from diffva_ray.metrics.validity import Judge, load_judge
from diffva_ray.model.training_films import TrainingFilms
from diffva_ray.paper.experiments import SETTINGS
from diffva_ray.paper.layout import Table, number, with_interval
from diffva_ray.paper.run import Made
from diffva_ray.schema import digest
from diffva_ray.storage import Store, open_store

Row = dict[str, Any]
SAMPLE = 200  # films of a class whose pictures are read again, at most
PIXELS = 32  # side of the squares that the memorisation audit compares


def extra_tables(made: Made, tables: Sequence[Table]) -> list[Table]:
    """Tables S1 to S5, the last from the distances of ``tables``; one that cannot be made is noted in
    ``made.missing``."""
    judge = load_judge(open_store(made.options.model))
    found = [scores_table(made, judge), false_attribution_table(made), localization_table(made), audit_table(made)]
    return [table for table in [*found, fidelity_table(made, tables)] if table is not None]


def fidelity_table(made: Made, tables: Sequence[Table]) -> Table | None:
    """Table S5: precision, recall, density and coverage of the comparisons of tables 2, 4 and 5, and FID-infinity."""
    body, details = list[list[str]](), list[Row]()
    for table in tables:
        if table.key not in ("table2", "table4", "table5"):
            continue
        for row in table.details:
            if "manifold" not in row:
                continue
            setting = SETTINGS.get(row["setting"], "")
            m, far = row["manifold"], row.get("infinity")
            beyond = f"{number(far['value'])} ± {far['error']:.2g}" if far and far["trusted"] else "N too small"
            body.append([row["image_set_1"], row["image_set_2"], setting, f"{row['n1']} / {row['n2']}",
                         *(number(m[key]) for key in ("precision", "recall", "density", "coverage")),
                         beyond])  # fmt: skip
            details.append({key: row[key] for key in ("image_set_1", "image_set_2", "setting", "n1", "n2", "manifold")}
                           | {"infinity": far, "extractor": row["extractor"]})  # fmt: skip
    if not body:
        made.missing.append(("table S5 (fidelity and diversity)", "fewer than six films in every comparison"))
        return None
    caption = (
        f"Extractor {details[0]['extractor']}; k = {details[0]['manifold']['k']} neighbours. Precision and density: of "
        "the second set by the first; recall and coverage: of the first by the second. Two samples of one distribution "
        "do not reach 1 at small N. Distance at infinite N: extrapolated over 1/N, only where half the films are more "
        "than the dimensions; ± is the fit's error alone."
    )
    heads = ["image set 1", "image set 2", "setting", "N1 / N2", "precision", "recall", "density", "coverage",
             "distance at infinite N"]  # fmt: skip
    return Table("tableS5", "Table S5. Fidelity and diversity", caption, heads, body, details)


def film_scores(made: Made, name: str, judge: Judge | None) -> list[Row]:
    """Scores of a sample of a run's films: at most ``SAMPLE`` of each class, by the digest of their paths."""
    run = made.runs[name]
    data, rows, taken = open_store(run.about["data_root"]), list[Row](), dict[str, int]()
    for row in sorted(finished(read_records(run)).to_dict("records"), key=lambda row: digest(row["source_path"])):
        if taken.get(row["label"], 0) >= SAMPLE:
            continue
        try:
            images, truth = read_images(run, data, row), read_truth(run, data, row, made.boxes)
        except (OSError, BadImage):
            continue
        taken[row["label"]] = taken.get(row["label"], 0) + 1
        place = None if truth.lesion is None else outside_lesion(images.signed_map, truth.lesion)
        found = {
            "label": row["label"],
            "source_path": row["source_path"],
            "changed": changed_share(images.signed_map),
            "energy": float(np.abs(images.signed_map).mean()),
            "in_lungs": row["map_energy_lung_fraction"],
            "outside_change": place.change if place else None,
            "inside_change": place.inside if place else None,
            "before": row["judge_source"],
            "after": row["judge_counterfactual"],
            "cout": cout(judge.healthy_probability, images.film, images.counterfactual, 25)[0] if judge else None,
        }
        rows.append({key: None if value is None or value != value else value for key, value in found.items()})
    return rows


def _mean(rows: Sequence[Row], key: str) -> tuple[float | None, tuple[float, float]]:
    known = [(row[key], row["source_path"]) for row in rows if row[key] is not None]
    values = np.array([value for value, _ in known], dtype=float)
    return finite_mean(values), patient_bootstrap(values, [path for _, path in known])


MEASURES = (
    ("confidence gain", "gain"),
    ("COUT", "cout"),
    ("share of pixels changed by > 0.05", "changed"),
    ("mean |M| in the lesion", "inside_change"),
    ("mean |M| outside it (hallucination)", "outside_change"),
    ("share of |M| in the lungs", "in_lungs"),
)


def scores_table(made: Made, judge: Judge | None) -> Table | None:
    """Table S1: validity, decisiveness, minimality and hallucination by class and setting."""
    columns = [name for name in SETTINGS if name in made.runs]
    if not columns:
        made.missing.append(("table S1", "no healing run was made"))
        return None
    scored = {name: film_scores(made, name, judge) for name in columns}
    for rows in scored.values():
        for row in rows:
            known = row["before"] is not None and row["after"] is not None
            row["gain"] = row["after"] - row["before"] if known else None
    labels = sorted({row["label"] for rows in scored.values() for row in rows})
    body, details = list[list[str]](), list[Row]()
    for label in labels:
        groups = [[row for row in scored[name] if row["label"] == label] for name in columns]
        n = str(max(len(group) for group in groups))
        rates = []
        for name, group in zip(columns, groups):
            validity = [row for row in made.metrics[name].get("validity", []) if row["label"] == label]
            rate = validity[0]["flip_rate"] if validity else None
            rates.append(number(rate) + (f" (n = {validity[0]['n']})" if validity else ""))
            details.append({"label": label, "setting": name, "n": len(group), "flip_rate": rate,
                            **{key: _mean(group, key)[0] for _, key in MEASURES}})  # fmt: skip
        body.append([label, "flip rate", n, *rates])
        for title, key in MEASURES:
            cells = [with_interval(*_mean(group, key)) for group in groups]
            if any(cell != "–" for cell in cells):
                body.append([label, title, n, *cells])
    maps = ", ".join(f"{SETTINGS[name]}: {made.runs[name].recipe.generate.map_name}" for name in columns)
    caption = (
        f"At most {SAMPLE} films of a class; 95 % bootstrap intervals over films. Judge: the model's own, which never "
        "guides; flip rate: films it calls abnormal whose twin it calls healthy; confidence gain: change of its "
        "probability of healthy; COUT (−1 to 1, 25 steps): high when few, decisive pixels turn it. Maps differ in "
        f"kind, so compare |M| within a column ({maps})."
    )
    heads = ["class", "measure", "N", *(SETTINGS[name] for name in columns)]
    return Table("tableS1", "Table S1. Counterfactual scores", caption, heads, body, details)


def false_attribution_table(made: Made) -> Table | None:
    """Table S2: what the maps show on healthy films, beside what they show on ill ones."""
    body, details = list[list[str]](), list[Row]()
    for healthy, ill in (("healthy-0.55", "heal-0.55"), ("healthy-own", "heal-own")):
        if healthy not in made.runs or ill not in made.runs:
            continue
        of_healthy, of_ill = (film_scores(made, name, None) for name in (healthy, ill))
        for title, key in (("mean |M|", "energy"), ("share of pixels changed by > 0.05", "changed")):
            first, second = _mean(of_healthy, key), _mean(of_ill, key)
            ratio = first[0] / second[0] if first[0] is not None and second[0] else None
            body.append([SETTINGS[ill], title, f"{len(of_healthy)} / {len(of_ill)}", with_interval(*first),
                         with_interval(*second), number(ratio)])  # fmt: skip
            details.append({"setting": ill, "measure": key, "n_healthy": len(of_healthy), "n_ill": len(of_ill),
                            "healthy": first[0], "healthy_interval": first[1], "ill": second[0],
                            "ill_interval": second[1], "ratio": ratio})  # fmt: skip
    if not body:
        made.missing.append(("table S2", "no run on healthy films was made"))
        return None
    caption = "Healthy films under the healthy prompt need no change: what a map shows there is false attribution."
    heads = ["setting", "measure", "N healthy / ill", "healthy films", "ill films", "ratio"]
    return Table("tableS2", "Table S2. False attribution on healthy films", caption, heads, body, details)


def localization_table(made: Made) -> Table | None:
    """Table S3: maps against lesion truth, with the trivial baselines, over all classes."""
    columns = [name for name in SETTINGS if made.metrics.get(name, {}).get("localization")]
    if not columns:
        made.missing.append(("table S3 (localisation)", "no film has a lesion mask or box"))
        return None
    body, details = list[list[str]](), list[Row]()
    for name in columns:
        rows = made.metrics[name]["localization"]
        labels = {row["label"] for row in rows}
        for row in rows:
            if row["label"] != ("all" if "all" in labels else row["label"]):
                continue
            own = row["map"] in ("positive", "absolute")
            if not own and name != columns[0]:
                continue  # brightness and centre prior are the same for every setting
            title = row["map"].replace("_", " ") + (" part of the map" if row["map"] == "positive" else "")
            body.append([SETTINGS[name] if own else "baseline", title, str(row["n"]),
                         with_interval(row["auroc"], row.get("auroc_interval")), number(row["auprc"]),
                         number(row["dice_best"]), number(row["pointing_game"])])  # fmt: skip
            details.append({"setting": name, **row})
    body.sort(key=lambda cells: cells[0] == "baseline")
    region = details[0]["region"]
    caption = (
        f"All classes; region: {region}. Dice at each film's own best threshold is an upper bound that no reader has; "
        "fixed thresholds need a validation run (diffva reduce --threshold-from). Baselines have the smoothing of the "
        "first column's recipe."
    )
    heads = ["setting", "map", "N", "AUROC [95 %]", "AUPRC", "Dice, best", "pointing game"]
    return Table("tableS3", "Table S3. Maps against the lesions' truth", caption, heads, body, details)


def audit_table(made: Made) -> Table | None:
    """Table S4: are healthy twins nearer to healthy training films than to healthy films that the model never saw?"""
    what = "table S4 (memorisation audit)"
    healthy, size = made.base.data.healthy_class, PIXELS
    try:
        trained = open_dataset(str(made.card.get("data", "")), made.base.data, [healthy])
    except (UnusableData, OSError, ValueError) as error:
        made.missing.append((what, f"the training films cannot be read from here ({error})"))
        return None
    unseen = open_dataset(made.radiography, made.base.data, [healthy])
    seen = TrainingFilms.of(made.card)
    held = _squares(unseen.store, unseen.films, size, seen, False)
    train = _squares(trained.store, trained.films, size, seen, True)
    columns = [name for name in SETTINGS if name in made.runs]
    body, details = list[list[str]](), list[Row]()
    for name in columns:
        run = made.runs[name]
        rows = sorted(finished(read_records(run)).to_dict("records"), key=lambda row: digest(row["source_path"]))
        twins = [_small(grey(run.store, row["counterfactual_path"]), size) for row in rows[: 3 * SAMPLE]]
        try:
            found = memorisation(np.array(twins), train, held)
        except ValueError as error:
            made.missing.append((what, str(error)))
            return None
        low, high = found.without_memory
        body.append([SETTINGS[name], f"{found.n}", f"{found.set_size}", number(found.nearer),
                     f"{number(low)} to {number(high)}", f"{found.p_value:.3f}", number(found.train),
                     number(found.held_out)])  # fmt: skip
        details.append({"setting": name, **asdict(found)})
    caption = (
        "Healthy twins against healthy training films and as many healthy films that the model never saw, by "
        f"Euclidean distance of {size} px squares. Without memory: 95 % of the shares when the films of both sets are "
        "dealt at random (permutation test); p: how often the share is then at least as large."
    )
    heads = ["setting", "twins", "films a set", "nearer to training", "without memory", "p",
             "median distance, training", "median distance, unseen"]  # fmt: skip
    return Table("tableS4", "Table S4. Memorisation", caption, heads, body, details)


def _squares(store: Store, films: Sequence[Film], size: int, seen: TrainingFilms | None, wanted: bool) -> np.ndarray:
    """Films as flat squares [n, size * size]; where hashes are known, only those that are (or are not) in the list."""
    found = []
    for film in sorted(films, key=lambda film: digest(film.path))[: 5 * SAMPLE]:
        try:
            data = store.read(film.path)
            if seen is None or (seen.holds(data) is wanted):
                found.append(_small(decode(data), size))
        except (OSError, BadImage):
            continue
    return np.array(found).reshape(len(found), size * size)


def _small(image: np.ndarray, size: int) -> np.ndarray:
    return to_square(image.astype(np.float32), size).ravel()
