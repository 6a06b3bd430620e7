"""Tables S1 to S7, which the paper does not have: validity, false attribution, localisation, memorisation, fidelity and
diversity, cardiothoracic ratio, and readers' scores."""

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
from diffva_ray.paper.state import PaperState
from diffva_ray.schema import Row, digest
from diffva_ray.storage.store import Store

MAX_AUDITED = 600  # counterfactuals and images of each set in the memorisation audit
AUDIT_SIDE = 32  # pixels of the side of the images that the audit compares
HEARTS = ("cardiomegaly", "cardiomegaly-severity")  # runs with cardiothoracic ratios


def extra_tables(state: PaperState, tables: Sequence[Table]) -> list[Table]:
    """Tables S1 to S7, S5 from the distances of ``tables``; the others are listed in ``state.missing``."""
    extras = [scores_table(state), false_attribution_table(state), localization_table(state), audit_table(state)]
    extras += [fidelity_table(state, tables), heart_table(state), zones_table(state)]
    return [table for table in extras if table is not None]


def fidelity_table(state: PaperState, tables: Sequence[Table]) -> Table | None:
    """Table S5: precision, recall, density and coverage of the comparisons of tables 2, 4 and 5, and FID-infinity."""
    body, details = list[list[str]](), list[Row]()
    kept = ("image_set_1", "image_set_2", "setting", "n1", "n2", "manifold", "verisimilitude", "interpolation",
            "direction", "extractor", "infinity")  # fmt: skip
    rows = [row for table in tables if table.key in ("table2", "table4", "table5") for row in table.details]
    for row in rows:
        if "manifold" not in row:
            continue
        limit = row.get("infinity")
        at_infinity = (
            f"{number(limit['value'])} ± {limit['error']:.2g}" if limit and limit["trusted"] else "N too small"
        )
        body.append([row["image_set_1"], row["image_set_2"], SETTINGS.get(row["setting"], ""),
                     f"{row['n1']} / {row['n2']}",
                     *(number(row["manifold"][key]) for key in ("precision", "recall", "density", "coverage")),
                     *_realism(row), at_infinity])  # fmt: skip
        details.append({key: row.get(key) for key in kept})
    if not body:
        state.missing.append(("table S5 (fidelity and diversity)", "fewer than six images in every comparison"))
        return None
    caption = (
        f"Extractor {details[0]['extractor']}; k = {details[0]['manifold']['k']} neighbours. Precision and density of "
        "the second set are measured with the first, recall and coverage of the first with the second. Two samples of "
        "one distribution do not reach 1 at small N. Distance at infinite N: extrapolated over 1/N, only where half of "
        "the images outnumber the dimensions; ± is the error of the fit alone. Verisimilitude: share of "
        "counterfactuals whose nearest neighbour is a real image (0.5: not distinguishable, 0: all distinguishable). "
        "Remote: share of counterfactuals farther from the real images than 95 % of these are from each other; in "
        "brackets, the share of them between two images that are not neighbours (interpolated modes). Direction "
        "(−1 to 1): movement of the features from the class towards the healthy images."
    )
    heads = ["image set 1", "image set 2", "setting", "N1 / N2", "precision", "recall", "density", "coverage",
             "verisimilitude", "remote", "direction", "distance at infinite N"]  # fmt: skip
    return Table("tableS5", "Table S5. Fidelity and diversity", caption, heads, body, details)


def _realism(row: Row) -> list[str]:
    taken, remote, direction = (row.get(key) for key in ("verisimilitude", "interpolation", "direction"))
    return [
        "–" if taken is None else with_error(taken["taken"], taken["error"]),
        "–" if remote is None else f"{remote['remote']:.0%} ({remote['between']:.0%})",
        "–" if direction is None else with_interval(direction["mean"], (direction["low"], direction["high"])),
    ]


def heart_table(state: PaperState) -> Table | None:
    """Table S6: cardiothoracic ratio before and after cardiomegaly was induced."""
    body, details = list[list[str]](), list[Row]()
    for name in HEARTS:
        for row in state.metrics.get(name, {}).get("heart", []):
            prompt = row["label"].partition(" under ")[2] or f"“{state.runs[name].keys['prompt']}”"
            body.append([prompt, f"{row['n']} of {row['images']}", number(row["before"]), number(row["after"]),
                         with_interval(row["change"], row["change_interval"]), f"{row['grew']:.0%}"])  # fmt: skip
            details.append({"run": name, "prompt": prompt, **row})
    if not body:
        state.missing.append(
            ("table S6 (cardiothoracic ratio)", "no lungs were found on the images, or on the counterfactuals")
        )
        return None
    caption = (
        "Healthy images before and after cardiomegaly was induced: sum of the largest distances of the heart border "
        "from the midline, divided by the largest inner diameter of the thorax. Lungs are segmented on image and "
        "counterfactual, not read from masks; the smooth outline lowers the ratio by about 0.05, so read the change. "
        "95 % bootstrap intervals over images."
    )
    heads = ["prompt", "N", "before", "after", "change", "grew"]
    return Table("tableS6", "Table S6. Cardiothoracic ratio", caption, heads, body, details)


def zones_table(state: PaperState) -> Table | None:
    """Table S7: maps against readers' Brixia scores of six lung zones."""
    if state.options.brixia is None:
        state.missing.append(("table S7 (Brixia scores)", "no readers' scores given (--brixia)"))
        return None
    body, details = list[list[str]](), list[Row]()
    for name, title in SETTINGS.items():
        for row in state.metrics[name].get("brixia", []):
            if row["map"] == "brightness":  # the same for every setting
                title = "baseline"
                if any(line[0] == title for line in body):
                    continue
            body.append([title, row["map"], str(row["n"]), with_interval(row["spearman"], row["spearman_interval"]),
                         number(row["spearman_within_image"]), row["lungs"]])  # fmt: skip
            details.append({"run": name, **row})
    caption = (
        "Spearman correlation between the mean of a map in each of six lung zones and the readers' mean scores (0 to "
        "3): over all zones of all images with a 95 % bootstrap interval over images, and within images, which is "
        "independent of the overall severity of the image. Brightness is the image itself. Lungs: from a mask, "
        "segmented on the image, or the middle of the image."
    )
    heads = ["setting", "map", "N", "all zones", "within images", "lungs"]
    return Table("tableS7", "Table S7. Maps against Brixia scores", caption, heads, body, details)


def _scores(state: PaperState, name: str, label: str) -> Row:
    """A run's counterfactual scores of ``label``, or of its only class."""
    rows = state.metrics[name].get("counterfactual", [])
    return next((row for row in rows if row["label"] == label), rows[0] if len(rows) == 1 else {"n": 0})


def _cell(row: Row, key: str) -> str:
    return with_interval(row.get(key), row.get(f"{key}_interval"))


def scores_table(state: PaperState) -> Table | None:
    """Table S1: validity, decisiveness, minimality and hallucination by class and setting."""
    columns = [name for name in SETTINGS if state.metrics.get(name, {}).get("counterfactual")]
    if not columns:
        state.missing.append(("table S1", "no run has counterfactual scores"))
        return None
    labels = sorted({row["label"] for name in columns for row in state.metrics[name]["counterfactual"]} - {ALL})
    body, details = list[list[str]](), list[Row]()
    for label in labels:
        scores = [_scores(state, name, label) for name in columns]
        rates = []
        for name, row in zip(columns, scores):
            validity = next((v for v in state.metrics[name].get("validity", []) if v["label"] == label), None)
            rate = validity["flip_rate"] if validity else None
            rates.append(number(rate) + (f" (n = {validity['n']})" if validity else ""))
            details.append({"setting": name, "flip_rate": rate, **row})
        n = str(max(row["n"] for row in scores))
        body.append([label, "flip rate", n, *rates])
        for metric in PAIR_METRICS:
            cells = [_cell(row, metric.key) for row in scores]
            if any(cell != "–" for cell in cells):
                body.append([label, metric.title, n, *cells])
    maps = ", ".join(f"{SETTINGS[name]}: {state.runs[name].recipe.generate.map_name}" for name in columns)
    caption = (
        f"At most {SAMPLE} images of a class; 95 % bootstrap intervals over images. The judge is the model's own and "
        "never guides. Flip rate: share of images called abnormal whose counterfactual is called healthy; confidence "
        f"gain: change of the probability of healthy; COUT (−1 to 1, {COUT_STEPS} steps): high when few pixels change "
        "the decision; collateral change (0 to 1): change of the probabilities of the other classes. Compare |M| only "
        f"within a column, because the kinds of map differ ({maps})."
    )
    heads = ["class", "measure", "N", *(SETTINGS[name] for name in columns)]
    return Table("tableS1", "Table S1. Counterfactual scores", caption, heads, body, details)


def false_attribution_table(state: PaperState) -> Table | None:
    """Table S2: strength of the maps on healthy images, beside abnormal images."""
    body, details = list[list[str]](), list[Row]()
    for healthy, abnormal in (("healthy-0.55", "generate-0.55"), ("healthy-own", "generate-own")):
        if healthy not in state.runs or abnormal not in state.runs:
            continue
        of_healthy = _scores(state, healthy, state.base.data.healthy_class)
        of_abnormal = _scores(state, abnormal, ALL)
        for title, key in (("mean |M|", "energy"), ("share of pixels changed by > 0.05", "changed")):
            first, second = of_healthy.get(key), of_abnormal.get(key)
            ratio = first / second if first is not None and second else None
            body.append([SETTINGS[abnormal], title, f"{of_healthy['n']} / {of_abnormal['n']}", _cell(of_healthy, key),
                         _cell(of_abnormal, key), number(ratio)])  # fmt: skip
            details.append({"setting": abnormal, "measure": key, "n_healthy": of_healthy["n"],
                            "n_ill": of_abnormal["n"], "healthy": first,
                            "healthy_interval": of_healthy.get(f"{key}_interval"), "ill": second,
                            "ill_interval": of_abnormal.get(f"{key}_interval"), "ratio": ratio})  # fmt: skip
    if not body:
        state.missing.append(("table S2", "no run on healthy images was made"))
        return None
    caption = "Healthy images with the healthy prompt need no change: any attribution on them is false."
    heads = ["setting", "measure", "N healthy / abnormal", "healthy images", "abnormal images", "ratio"]
    return Table("tableS2", "Table S2. False attribution on healthy images", caption, heads, body, details)


def localization_table(state: PaperState) -> Table | None:
    """Table S3: maps against known lesions, with trivial baselines, over all classes."""
    columns = [name for name in SETTINGS if state.metrics.get(name, {}).get("localization")]
    if not columns:
        state.missing.append(("table S3 (localisation)", "no image has a lesion mask or box"))
        return None
    body, details = list[list[str]](), list[Row]()
    for name in columns:
        rows = state.metrics[name]["localization"]
        for map_name in dict.fromkeys(row["map"] for row in rows):
            row = overall(row for row in rows if row["map"] == map_name)
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
        f"All classes; region: {region}. Dice at the best threshold of each image is an upper bound; fixed thresholds "
        "need a validation run (diffva reduce --threshold-from). Baselines are smoothed as in the first setting."
    )
    heads = ["setting", "map", "N", "AUROC [95 %]", "AUPRC", "Dice, best τ", "pointing game"]
    return Table("tableS3", "Table S3. Maps against known lesions", caption, heads, body, details)


def audit_table(state: PaperState) -> Table | None:
    """Table S4: whether healthy counterfactuals are nearer to healthy training images than to unseen healthy images."""
    what = "table S4 (memorisation audit)"
    healthy = state.base.data.healthy_class
    # training images and unseen images
    try:
        trained = open_dataset(str(state.card.get("data", "")), state.base.data, [healthy])
    except (UnusableData, OSError, ValueError) as error:
        state.missing.append((what, f"the training images cannot be read ({error})"))
        return None
    unseen = open_dataset(state.radiography, state.base.data, [healthy])
    seen = TrainingImages.of(state.card)
    held = _squares(unseen.store, unseen.images, seen, False)
    train = _squares(trained.store, trained.images, seen, True)
    # counterfactuals of each setting
    body, details = list[list[str]](), list[Row]()
    for name in (name for name in SETTINGS if name in state.runs):
        run = state.runs[name]
        rows = sorted(finished(read_records(run)).to_dict("records"), key=lambda row: digest(row["image_path"]))
        counterfactuals = [_small(grey(run.store, row["counterfactual_path"])) for row in rows[:MAX_AUDITED]]
        try:
            audit = memorisation(np.array(counterfactuals), train, held)
        except ValueError as error:
            state.missing.append((what, str(error)))
            return None
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


def _squares(
    store: Store, images: Sequence[LabelledImage], training: TrainingImages | None, wanted: bool
) -> np.ndarray:
    """Images as rows [n, AUDIT_SIDE ** 2]; with known hashes only those that are (or are not) training images."""
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
