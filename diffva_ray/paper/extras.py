"""What the paper has no table for: does the verdict turn, how little changes, where, on healthy images, from memory,
and how much of each set the other covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from diffva_ray.data.dataset import LabelledImage, UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.images import BadImage, decode, to_square
from diffva_ray.evaluate.records import finished, grey, read_records
from diffva_ray.evaluate.run_index import SAMPLE
from diffva_ray.evaluate.tables import ALL, overall
from diffva_ray.metrics.counterfactual import memorisation
from diffva_ray.metrics.pair_metrics import COUT_STEPS, PAIR_METRICS
from diffva_ray.model.training_images import TrainingImages
from diffva_ray.paper.experiments import SETTINGS
from diffva_ray.paper.layout import Table, number, with_error, with_interval
from diffva_ray.paper.state import Made
from diffva_ray.schema import Row, digest
from diffva_ray.storage.store import Store

AUDITED = 600  # counterfactuals, and healthy images of either set before those are equal in number
PIXELS = 32  # side of the squares that the memorisation audit compares


def extra_tables(made: Made, tables: Sequence[Table]) -> list[Table]:
    """Tables S1 to S7, S5 from the distances of ``tables``; one that cannot be made is noted in ``made.missing``."""
    found = [scores_table(made), false_attribution_table(made), localization_table(made), audit_table(made)]
    found += [fidelity_table(made, tables), heart_table(made), zones_table(made)]
    return [table for table in found if table is not None]


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
                         *_realism(row), beyond])  # fmt: skip
            kept = ("image_set_1", "image_set_2", "setting", "n1", "n2", "manifold", "verisimilitude", "interpolation",
                    "direction", "extractor")  # fmt: skip
            details.append({key: row.get(key) for key in kept} | {"infinity": far})
    if not body:
        made.missing.append(("table S5 (fidelity and diversity)", "fewer than six images in every comparison"))
        return None
    caption = (
        f"Extractor {details[0]['extractor']}; k = {details[0]['manifold']['k']} neighbours. Precision and density: of "
        "the second set by the first; recall and coverage: of the first by the second. Two samples of one distribution "
        "do not reach 1 at small N. Distance at infinite N: extrapolated over 1/N, only where half the images are more "
        "than the dimensions; ± is the fit's error alone. Verisimilitude: counterfactuals whose "
        "nearest neighbour is a real image "
        "(0.5 where nobody can tell them apart, 0 where all give themselves away). Remote: "
        "counterfactuals farther from the real "
        "images than 95 % of these are from each other, and of them those between two images that are no neighbours "
        "(interpolated modes). Direction (−1 to 1): do features move from the class towards the healthy images?"
    )
    heads = ["image set 1", "image set 2", "setting", "N1 / N2", "precision", "recall", "density", "coverage",
             "verisimilitude", "remote", "direction", "distance at infinite N"]  # fmt: skip
    return Table("tableS5", "Table S5. Fidelity and diversity", caption, heads, body, details)


def _realism(row: Row) -> list[str]:
    taken, apart, way = (row.get(key) for key in ("verisimilitude", "interpolation", "direction"))
    return [
        "–" if taken is None else with_error(taken["taken"], taken["error"]),
        "–" if apart is None else f"{apart['remote']:.0%} ({apart['between']:.0%})",
        "–" if way is None else with_interval(way["mean"], (way["low"], way["high"])),
    ]


HEARTS = ("cardiomegaly", "cardiomegaly-severity")


def heart_table(made: Made) -> Table | None:
    """Table S6: cardiothoracic ratio before and after cardiomegaly was asked for."""
    body, details = list[list[str]](), list[Row]()
    for name in HEARTS:
        for row in made.metrics.get(name, {}).get("heart", []):
            prompt = row["label"].partition(" under ")[2] or f"“{made.runs[name].keys['prompt']}”"
            body.append([prompt, f"{row['n']} of {row['images']}", number(row["before"]), number(row["after"]),
                         with_interval(row["change"], row["change_interval"]), f"{row['grew']:.0%}"])  # fmt: skip
            details.append({"run": name, "prompt": prompt, **row})
    if not body:
        made.missing.append(
            ("table S6 (cardiothoracic ratio)", "no lungs were found on the images, or on no counterfactual")
        )
        return None
    caption = (
        "Healthy images before and after cardiomegaly was induced: widest reach of the heart to both sides of the "
        "midline over the widest inner diameter of the thorax. Lungs are found on image and "
        "counterfactual alike, not read from "
        "masks, and outlined smoothly, which takes some 0.05 off the ratio: read the change. 95 % bootstrap intervals "
        "over images."
    )
    heads = ["prompt", "N", "before", "after", "change", "grew"]
    return Table("tableS6", "Table S6. Cardiothoracic ratio", caption, heads, body, details)


def zones_table(made: Made) -> Table | None:
    """Table S7: maps against readers' Brixia scores of six lung zones."""
    if made.options.brixia is None:
        made.missing.append(("table S7 (Brixia scores)", "no readers' scores given (--brixia)"))
        return None
    body, details = list[list[str]](), list[Row]()
    for name, title in SETTINGS.items():
        for row in made.metrics[name].get("brixia", []):
            if row["map"] == "brightness":  # the same for every setting
                title = "baseline"
                if any(line[0] == title for line in body):
                    continue
            body.append([title, row["map"], str(row["n"]), with_interval(row["spearman"], row["spearman_interval"]),
                         number(row["spearman_within_image"]), row["lungs"]])  # fmt: skip
            details.append({"run": name, **row})
    caption = (
        "Spearman's correlation of a map's mean in each of six lung zones with the readers' mean scores (0 to 3): over "
        "all zones of all images with a 95 % bootstrap interval over images, and within images, which leaves out how "
        "ill an image is as a whole. Brightness is the image itself. Lungs: of a mask, found on the "
        "image, or its middle."
    )
    heads = ["setting", "map", "N", "all zones", "within images", "lungs"]
    return Table("tableS7", "Table S7. Maps against Brixia scores", caption, heads, body, details)


def _scores(made: Made, name: str, label: str) -> Row:
    """The row of a run's counterfactual scores that is of ``label``; of its only class where it has one."""
    rows = made.metrics[name].get("counterfactual", [])
    return next((row for row in rows if row["label"] == label), rows[0] if len(rows) == 1 else {"n": 0})


def _cell(row: Row, key: str) -> str:
    return with_interval(row.get(key), row.get(f"{key}_interval"))


def scores_table(made: Made) -> Table | None:
    """Table S1: validity, decisiveness, minimality and hallucination by class and setting."""
    columns = [name for name in SETTINGS if made.metrics.get(name, {}).get("counterfactual")]
    if not columns:
        made.missing.append(("table S1", "no generating run was made"))
        return None
    labels = sorted({row["label"] for name in columns for row in made.metrics[name]["counterfactual"]} - {ALL})
    body, details = list[list[str]](), list[Row]()
    for label in labels:
        scores = [_scores(made, name, label) for name in columns]
        rates = []
        for name, row in zip(columns, scores):
            validity = [found for found in made.metrics[name].get("validity", []) if found["label"] == label]
            rate = validity[0]["flip_rate"] if validity else None
            rates.append(number(rate) + (f" (n = {validity[0]['n']})" if validity else ""))
            details.append({"setting": name, "flip_rate": rate, **row})
        n = str(max(row["n"] for row in scores))
        body.append([label, "flip rate", n, *rates])
        for metric in PAIR_METRICS:
            cells = [_cell(row, metric.key) for row in scores]
            if any(cell != "–" for cell in cells):
                body.append([label, metric.title, n, *cells])
    maps = ", ".join(f"{SETTINGS[name]}: {made.runs[name].recipe.generate.map_name}" for name in columns)
    caption = (
        f"At most {SAMPLE} images of a class; 95 % bootstrap intervals over images. Judge: the "
        f"model's own, which never "
        "guides; flip rate: images it calls abnormal whose counterfactual it calls healthy; "
        "confidence gain: change of its "
        f"probability of healthy; COUT (−1 to 1, {COUT_STEPS} steps): high when few, decisive pixels turn it; "
        "collateral change (0 to 1): how far its probabilities of the other classes move. Maps differ in "
        f"kind, so compare |M| within a column ({maps})."
    )
    heads = ["class", "measure", "N", *(SETTINGS[name] for name in columns)]
    return Table("tableS1", "Table S1. Counterfactual scores", caption, heads, body, details)


def false_attribution_table(made: Made) -> Table | None:
    """Table S2: what the maps show on healthy images, beside what they show on ill ones."""
    body, details = list[list[str]](), list[Row]()
    for healthy, ill in (("healthy-0.55", "generate-0.55"), ("healthy-own", "generate-own")):
        if healthy not in made.runs or ill not in made.runs:
            continue
        of_healthy, of_ill = _scores(made, healthy, made.base.data.healthy_class), _scores(made, ill, ALL)
        for title, key in (("mean |M|", "energy"), ("share of pixels changed by > 0.05", "changed")):
            first, second = of_healthy.get(key), of_ill.get(key)
            ratio = first / second if first is not None and second else None
            body.append([SETTINGS[ill], title, f"{of_healthy['n']} / {of_ill['n']}", _cell(of_healthy, key),
                         _cell(of_ill, key), number(ratio)])  # fmt: skip
            details.append({"setting": ill, "measure": key, "n_healthy": of_healthy["n"], "n_ill": of_ill["n"],
                            "healthy": first, "healthy_interval": of_healthy.get(f"{key}_interval"), "ill": second,
                            "ill_interval": of_ill.get(f"{key}_interval"), "ratio": ratio})  # fmt: skip
    if not body:
        made.missing.append(("table S2", "no run on healthy images was made"))
        return None
    caption = "Healthy images under the healthy prompt need no change: what a map shows there is false attribution."
    heads = ["setting", "measure", "N healthy / ill", "healthy images", "ill images", "ratio"]
    return Table("tableS2", "Table S2. False attribution on healthy images", caption, heads, body, details)


def localization_table(made: Made) -> Table | None:
    """Table S3: maps against lesion truth, with the trivial baselines, over all classes."""
    columns = [name for name in SETTINGS if made.metrics.get(name, {}).get("localization")]
    if not columns:
        made.missing.append(("table S3 (localisation)", "no image has a lesion mask or box"))
        return None
    body, details = list[list[str]](), list[Row]()
    for name in columns:
        rows = made.metrics[name]["localization"]
        for name_of_map in dict.fromkeys(row["map"] for row in rows):
            row = overall(row for row in rows if row["map"] == name_of_map)
            if row is None:
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
        f"All classes; region: {region}. Dice at each image's own best threshold is an upper bound that no reader has; "
        "fixed thresholds need a validation run (diffva reduce --threshold-from). Baselines have the smoothing of the "
        "first column's recipe."
    )
    heads = ["setting", "map", "N", "AUROC [95 %]", "AUPRC", "Dice, best", "pointing game"]
    return Table("tableS3", "Table S3. Maps against the lesions' truth", caption, heads, body, details)


def audit_table(made: Made) -> Table | None:
    """Table S4: are healthy counterfactuals nearer to healthy training images than to healthy images that the model
    never saw?"""
    what = "table S4 (memorisation audit)"
    healthy, size = made.base.data.healthy_class, PIXELS
    try:
        trained = open_dataset(str(made.card.get("data", "")), made.base.data, [healthy])
    except (UnusableData, OSError, ValueError) as error:
        made.missing.append((what, f"the training images cannot be read from here ({error})"))
        return None
    unseen = open_dataset(made.radiography, made.base.data, [healthy])
    seen = TrainingImages.of(made.card)
    held = _squares(unseen.store, unseen.images, size, seen, False)
    train = _squares(trained.store, trained.images, size, seen, True)
    columns = [name for name in SETTINGS if name in made.runs]
    body, details = list[list[str]](), list[Row]()
    for name in columns:
        run = made.runs[name]
        rows = sorted(finished(read_records(run)).to_dict("records"), key=lambda row: digest(row["image_path"]))
        counterfactuals = [_small(grey(run.store, row["counterfactual_path"]), size) for row in rows[:AUDITED]]
        try:
            found = memorisation(np.array(counterfactuals), train, held)
        except ValueError as error:
            made.missing.append((what, str(error)))
            return None
        low, high = found.without_memory
        body.append([SETTINGS[name], f"{found.n}", f"{found.set_size}", number(found.nearer),
                     f"{number(low)} to {number(high)}", f"{found.p_value:.3f}", number(found.train),
                     number(found.held_out)])  # fmt: skip
        details.append({"setting": name, **asdict(found)})
    caption = (
        "Healthy counterfactuals against healthy training images and as many healthy images that the "
        "model never saw, by "
        f"Euclidean distance of {size} px squares. Without memory: 95 % of the shares when the images of both sets are "
        "dealt at random (permutation test); p: how often the share is then at least as large."
    )
    heads = ["setting", "counterfactuals", "images a set", "nearer to training", "without memory", "p",
             "median distance, training", "median distance, unseen"]  # fmt: skip
    return Table("tableS4", "Table S4. Memorisation", caption, heads, body, details)


def _squares(
    store: Store, images: Sequence[LabelledImage], size: int, seen: TrainingImages | None, wanted: bool
) -> np.ndarray:
    """Images as flat squares [n, size * size]; where hashes are known, only those that are (or are not) in the list."""
    found = []
    for image in sorted(images, key=lambda image: digest(image.path))[:AUDITED]:
        try:
            data = store.read(image.path)
            if seen is None or (seen.holds(data) is wanted):
                found.append(_small(decode(data), size))
        except (OSError, BadImage):
            continue
    return np.array(found).reshape(len(found), size * size)


def _small(image: np.ndarray, size: int) -> np.ndarray:
    return to_square(image.astype(np.float32), size).ravel()
