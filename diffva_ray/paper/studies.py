"""Tables S8 to S11: what the paper says in words about settings, inductions, interpolations and anatomy, measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import spearmanr
from skimage.morphology import convex_hull_image

from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.counterfactual.guess import guess
from diffva_ray.counterfactual.interpolation import between_prompts
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.images import BadImage, decode_square
from diffva_ray.data.lungs import find_lungs
from diffva_ray.evaluate.pair_scores import run_judge
from diffva_ray.evaluate.records import (
    as_records,
    finished,
    read_images,
    read_records,
    read_truth,
    setting_key,
    setting_names,
    under,
)
from diffva_ray.evaluate.tables import ALL
from diffva_ray.generate.cost import calls
from diffva_ray.generate.run import Run
from diffva_ray.metrics.intervals import group_bootstrap
from diffva_ray.metrics.validity import Judge
from diffva_ray.model.bundle import load
from diffva_ray.paper.experiments import EXPERIMENTS, SHEET
from diffva_ray.paper.inputs import sampled
from diffva_ray.paper.layout import Table, number, with_interval
from diffva_ray.paper.state import PaperState
from diffva_ray.schema import Image, TableRow, record_seed

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the second prompt
PLACES = ("lungs", "outside_chest", "left")
CHEST_WALL = 0.1  # thickness of the wall around the lungs' convex hull, as a fraction of its width
REFLECTED = 8  # healthy images that are interpolated


def study_tables(state: PaperState) -> Iterator[Table]:
    """Yields the tables that can be made; the others are listed in ``state.missing``."""
    for key, make in STUDIES.items():
        try:
            heads, rows, details = make(state)
        except ValueError as error:
            state.missing.append((SHEET["studies"][key]["title"], str(error)))
            continue
        text = SHEET["studies"][key]
        yield Table(key, text["title"], text["caption"], heads, rows, details)


Content = tuple[list[str], list[list[str]], list[TableRow]]  # heads, text and numbers of a table


def grid_table(state: PaperState) -> Content:
    """Table S8: distances, similarity and cost over strength and guidance. Raises ValueError without the run."""
    run, metrics = _run(state, "grid")
    config, details = run.recipe.generate.model_dump(), list[TableRow]()
    records = as_records(read_records(run))
    settings = list(dict.fromkeys(setting_key(record) for record in records))
    names = setting_names(settings)
    first = {setting_key(record): record for record in reversed(records)}
    for setting in settings:
        record, name = first[setting], names[setting]
        swept = {key: record[key] for key in ("strength", "guidance_scale", "num_inference_steps")}
        distances = {row["set1"].partition(" (")[0]: row for row in metrics.get("fid_within", [])
                     if row["set2"] == under("counterfactuals", name)}  # fmt: skip
        similar, flips = (_overall(metrics[table], name) for table in ("ssim", "validity"))
        images, healthy = (distances.get(key, {}) for key in ("images", run.recipe.data.healthy_class))
        details.append({
            **swept, "unet_calls": calls({**config, **swept}, len(run.recipe.data.prompts)).unet,
            "distance_to_images": images.get("pooled"), "distance_to_healthy": healthy.get("pooled"),
            "ssim": similar.get("ssim"), "ssim_interval": similar.get("ssim_interval"),
            "flip_rate": flips.get("flip_rate"), "images": similar.get("n"),
        })  # fmt: skip
    rows = [
        [number(row["strength"]), number(row["guidance_scale"]), f"{row['unet_calls']:.0f}",
         number(row["distance_to_images"]), number(row["distance_to_healthy"]),
         with_interval(row["ssim"], row["ssim_interval"]), number(row["flip_rate"])]
        for row in details
    ]  # fmt: skip
    heads = ["strength", "guidance", "UNet calls", "distance to the images", "distance to healthy images", "SSIM",
             "flip rate"]  # fmt: skip
    return heads, rows, details


def _overall(rows: list[TableRow], setting: str) -> TableRow:
    """The row over all classes under a setting, or of the only class; empty if there is none."""
    of_setting = [row for row in rows if row["label"].endswith(under("", setting))]
    pooled = [row for row in of_setting if row["label"] == under(ALL, setting)]
    return (pooled or of_setting or [{}])[0]


def other_table(state: PaperState) -> Content:
    """Table S9: from one disease to another, read by the judge. Raises ValueError without the run or a judge."""
    run, _ = _run(state, "other-disease")
    judge = _judge(state, "other-disease")
    classes = {run.recipe.data.prompt(label): label for label in judge.classes}
    before, after, labels, wanted = list[NDArray[np.float64]](), list[NDArray[np.float64]](), list[str](), list[str]()
    for record in as_records(finished(read_records(run))):
        if record["prompt"] not in classes or record["label"] not in judge.classes:
            continue
        images = read_images(run, record)
        found = judge.probabilities(np.stack([images.image, images.counterfactual]))
        before.append(found[0])
        after.append(found[1])
        labels.append(record["label"])
        wanted.append(classes[record["prompt"]])
    details = list[TableRow]()
    for label, target in sorted(set(zip(labels, wanted))):
        index = list(judge.classes).index(target)
        chosen = [n for n, pair in enumerate(zip(labels, wanted)) if pair == (label, target)]
        gains = np.array([after[n][index] - before[n][index] for n in chosen])
        details.append({
            "class": label, "prompt_class": target, "n": len(chosen),
            "before": float(np.mean([before[n][index] for n in chosen])),
            "after": float(np.mean([after[n][index] for n in chosen])),
            "gain": float(gains.mean()), "gain_interval": list(group_bootstrap(gains, chosen, within=(-1.0, 1.0))),
            "read_as": float(np.mean([after[n].argmax() == index for n in chosen])),
        })  # fmt: skip
    if not details:
        raise ValueError("no record has a prompt of one of the judge's classes")
    rows = [
        [row["class"], row["prompt_class"], str(row["n"]), number(row["before"]), number(row["after"]),
         with_interval(row["gain"], row["gain_interval"]), number(row["read_as"])]
        for row in details
    ]  # fmt: skip
    heads = ["image", "prompt", "n", "P(prompt's class) before", "after", "gain", "read as the prompt's class"]
    return heads, rows, details


def reflection_table(state: PaperState) -> Content:
    """Table S10: images between two prompts, read back as a class by the judge and by the model itself. Raises
    ValueError without a judge."""
    run, judge = _run(state, "inductions")[0], _judge(state, "inductions")
    engine = CounterfactualEngine(load(state.options.model, run.recipe), run.recipe.generate)
    data, details = run.recipe.data, list[TableRow]()
    dataset = open_dataset(state.radiography, data, [data.healthy_class])
    for label in (label for label in judge.classes if label != data.healthy_class and label in data.prompts):
        index, judged, guessed = list(judge.classes).index(label), list[NDArray[np.float64]](), list[list[bool]]()
        for image in sampled(dataset.images, REFLECTED, run.recipe.seed):
            try:
                square = decode_square(dataset.store.read(image.path), engine.size, bits=dataset.bits)[0]
            except (OSError, BadImage):
                continue
            seed = record_seed(run.recipe.seed, image.path, 0)
            frames = between_prompts(engine, square, data.healthy_prompt, data.prompt(label), WEIGHTS, seed)
            judged.append(judge.probabilities(frames.counterfactuals)[:, index])
            guessed.append([shown == label for shown in _own_guess(engine, frames.counterfactuals, seed)])
        if not judged:
            raise ValueError("no healthy image can be read")
        scores = np.stack(judged)
        ranks = [float(spearmanr(WEIGHTS, row).statistic) for row in scores if np.ptp(row) > 0]
        details.append({
            "prompt_class": label, "n": len(scores), "judge": scores.mean(axis=0).tolist(),
            "own": np.mean(guessed, axis=0).tolist(), "spearman": float(np.mean(ranks)) if ranks else None,
        })  # fmt: skip
    rows = [
        [
            row["prompt_class"],
            str(row["n"]),
            who,
            *map(number, row[key]),
            number(row["spearman"]) if key == "judge" else "",
        ]
        for row in details
        for who, key in (("judge, mean P", "judge"), ("model's own guess, share", "own"))
    ]
    return ["prompt's class", "n", "read by", *(f"{weight:g}" for weight in WEIGHTS), "Spearman"], rows, details


def place_table(state: PaperState) -> Content:
    """Table S11: shares of the map inside the lungs, outside the chest and on the patient's left. Raises ValueError
    without the run or without lungs."""
    run, _ = _run(state, "places")
    prompts = next(experiment for experiment in EXPERIMENTS if experiment.name == "places").prompts
    maps, areas = _shares(run)
    healthy, details = maps.get(prompts[0], {}), list[TableRow]()
    for prompt in (prompt for prompt in prompts if maps.get(prompt, {}).keys() & healthy.keys()):
        both = sorted(healthy.keys() & maps[prompt].keys())
        of_map, area, before = (np.stack([of[path] for path in both]) for of in (maps[prompt], areas, healthy))
        row: TableRow = {"prompt": prompt, "n": len(both)}
        for n, place in enumerate(PLACES):
            change = of_map[:, n] - before[:, n]
            row |= {f"{place}_map": float(of_map[:, n].mean()), f"{place}_area": float(area[:, n].mean()),
                    f"{place}_change": float(change.mean()),
                    f"{place}_change_interval": list(group_bootstrap(change, both, within=(-1.0, 1.0)))}  # fmt: skip
        details.append(row)
    if not details:
        raise ValueError("no image has lungs, given or found")
    rows = list[list[str]]()
    for row in details:
        prompt = row["prompt"]
        cells = [prompt, str(row["n"])]
        for place in PLACES:
            low, high = (100 * bound for bound in row[f"{place}_change_interval"])
            gain = f"{100 * row[f'{place}_change']:.1f} [{low:.1f}, {high:.1f}]"
            cells += [f"{row[f'{place}_map']:.0%} / {row[f'{place}_area']:.0%}", "–" if prompt == prompts[0] else gain]
        rows.append(cells)
    heads = ["prompt", "n", "in the lungs", "change", "outside the chest", "change", "on the left", "change"]
    return heads, rows, details


def _shares(run: Run) -> tuple[dict[str, dict[str, NDArray[np.float64]]], dict[str, NDArray[np.float64]]]:
    """Shares of the map in each of the PLACES by prompt and image, and shares of the area by image; images without
    lungs are left out."""
    maps, areas = dict[str, dict[str, NDArray[np.float64]]](), dict[str, NDArray[np.float64]]()
    for record in as_records(finished(read_records(run))):
        images, lungs = read_images(run, record), read_truth(run, record, {}).lungs
        lungs = find_lungs(images.image) if lungs is None else lungs
        if lungs is None or not lungs.any():
            continue
        places, change = _places(lungs), np.abs(images.signed_map.astype(np.float64))
        areas[record["image_path"]] = places.mean(axis=(1, 2))
        shares = (change * places).sum(axis=(1, 2)) / max(change.sum(), 1e-12)
        maps.setdefault(record["prompt"], {})[record["image_path"]] = shares
    return maps, areas


def _places(lungs: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The PLACES as [3, size, size]: lungs, outside of the chest, and the patient's left, from the middle of the lungs
    to the image's right."""
    chest = convex_hull_image(lungs)
    columns = np.flatnonzero(chest.any(axis=0))
    margin = max(1, round(CHEST_WALL * (columns[-1] - columns[0] + 1)))
    chest = ndimage.binary_dilation(chest, iterations=margin)
    left = np.zeros_like(lungs)
    left[:, (columns[0] + columns[-1] + 1) // 2 :] = True
    return np.stack([lungs, ~chest, left])


def _own_guess(engine: CounterfactualEngine, images: Image, seed: int) -> list[str]:
    """The class that the model itself takes each image [n, size, size] to show (``counterfactual.guess``)."""
    data = engine.bundle.recipe.data
    labels = list(data.prompts)
    latents = engine.model.encode(torch.from_numpy(images).to(engine.device))[0].float() * engine.model.scale
    found = guess(engine.model, latents, [engine.embed(data.prompt(label)) for label in labels], [seed] * len(images))
    return [labels[index] for index in found]


def _run(state: PaperState, name: str) -> tuple[Run, dict[str, Any]]:
    if name not in state.runs:
        raise ValueError(f"run {name} was not made")
    return state.runs[name], state.metrics[name]


def _judge(state: PaperState, name: str) -> Judge:
    judge = run_judge(state.runs[name])
    if judge is None:
        raise ValueError("the model has no judge")
    return judge


STUDIES = {
    "tableS8": grid_table,
    "tableS9": other_table,
    "tableS10": reflection_table,
    "tableS11": place_table,
}
