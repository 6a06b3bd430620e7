"""``diffva score``: anybody's maps under the scores of our own tables, with the trivial baselines beside them.

Every map, baseline and truth mask is brought to one square grid, so that all of them answer the same question.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.images import BadImage, decode, to_square
from diffva_ray.evaluate import tables
from diffva_ray.evaluate.annotations import lesion_boxes, read_thresholds
from diffva_ray.evaluate.external_maps import (
    Encoding,
    MapFile,
    MapFolder,
    Matched,
    first_paths,
    is_sixteen_bit,
    match,
    on_grid,
    open_maps,
    read_map_values,
)
from diffva_ray.evaluate.records import Boxes, grey, image_truth
from diffva_ray.evaluate.scores import LocalizationScores, score_image
from diffva_ray.metrics.localization import SALIENCY, baselines, smooth
from diffva_ray.model.training_images import TrainingImages
from diffva_ray.schema import Row
from diffva_ray.storage.store import open_file

DEFAULT_GRID = 256
SMALLEST_GRID = 32  # a class activation map of 7 x 7 is enlarged: lesions would vanish on its own grid
MID_GREY = (32_000 / 65535, 33_536 / 65535)  # where the zero of a signed 16-bit map comes out, read as unsigned
THREADS, SAMPLED = 8, 16


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How maps are read and scored.

    ``signed``: score max(M, 0) and |M| (True), max(M, 0) alone (False), or |M| only where any value is negative
    (None). ``smoothing``: Gaussian sigma as a fraction of the side, of maps and baselines alike. ``size``: side of the
    grid; None: the maps' own.
    """

    boxes: str | None = None
    encoding: Encoding = "auto"
    signed: bool | None = None
    smoothing: float | None = None
    size: int | None = None
    threshold_from: str | None = None
    model: str | None = None  # whose training images are refused; a run names its own
    allow_training_images: bool = False


@dataclass(frozen=True)
class Grid:
    """What all images are scored with. ``smoothing`` is of the baselines, ``map_smoothing`` of the maps: a run's maps
    come smoothed already."""

    size: int
    smoothing: float
    map_smoothing: float
    signed16: bool


@dataclass
class Scored:
    """``metrics`` is for people and scripts (``tables/metrics.json``), ``images`` one row per image and map."""

    metrics: dict[str, Any]
    images: list[Row]


@dataclass(frozen=True)
class _Outcome:
    """One map: its rows, or why there are none; and what has to be counted."""

    rows: list[Row] = field(default_factory=list)
    problem: str = ""  # the map cannot be read
    image_problem: bool = False
    other_image: bool = False  # the run was made of another image of this name
    no_truth: bool = False  # no lesion of this image is known
    nothing_to_find: bool = False  # its lesion is empty or fills the region
    resized: bool = False
    negative: bool = False
    flat: bool = False  # no positive value at all
    trained_on: bool = False  # the image is in the model's training list


def score_maps(maps_uri: str, data_uri: str, options: ScoreOptions = ScoreOptions()) -> Scored:
    """Score the maps at ``maps_uri`` on the images of ``data_uri``.

    Raises UnusableData, one line, when no map fits an image, when one fits several, when no matched image has lesion
    truth, and for options that cannot be used.
    """
    folder = open_maps(maps_uri)
    run = folder.run
    if run is not None and (options.smoothing is not None or options.encoding == "unsigned"):
        wrong = "--smoothing" if options.smoothing is not None else "--encoding unsigned"
        raise UnusableData(
            f"{wrong}: {maps_uri} is a run; its maps are signed 16-bit and smoothed by its recipe, the baselines alike"
        )
    dataset = open_dataset(data_uri, run.recipe.data if run is not None else DataConfig())
    notes: list[str] = []
    boxes = dataset.boxes if options.boxes is None else lesion_boxes(data_uri, options.boxes, notes)
    thresholds, source = _thresholds(options.threshold_from)
    matched = match(folder.maps, dataset.images, maps_uri, records=run is not None)
    if not matched.pairs:
        hint = f"as in {folder.maps[0].path} for image {dataset.images[0].path}"
        raise UnusableData(
            f"{maps_uri}: none of its {len(folder.maps)} maps is named like one of the {len(dataset.images)} images of "
            f"{data_uri} ({hint}); for the maps of a diffva run, give the run itself"
        )
    grid = _choose_grid(folder, matched, options)
    notes += _said_of_input(folder, matched, grid, options)

    seen = _training_images(folder, options, notes)
    with ThreadPoolExecutor(THREADS) as pool:  # waits on the store, mostly
        outcomes = list(pool.map(lambda pair: _score_one(folder, dataset, boxes, grid, seen, *pair), matched.pairs))
    trained = sum(outcome.trained_on for outcome in outcomes)
    if trained and not options.allow_training_images:
        raise UnusableData(
            f"{data_uri}: {trained} of {len(outcomes)} matched images were in the model's training list; score images "
            "that it has not seen, or give --allow-training-images, which the tables then say"
        )
    images = [row for outcome in outcomes for row in outcome.rows]
    if not images:
        raise UnusableData(_why_nothing(data_uri, matched, outcomes))
    signed = options.signed
    if signed is None:
        signed = run is not None or any(outcome.negative for outcome in outcomes)
    if not signed:
        images = [row for row in images if row["map"] != "absolute"]
    notes += _said_of_outcomes(matched, outcomes, options, signed, run is not None)
    try:
        rows = tables.localization_rows(LocalizationScores.of(images), thresholds, source)
    except ValueError as error:  # a threshold off the grid
        raise UnusableData(f"--threshold-from {options.threshold_from}: {error}") from None
    if trained:
        notes.append(f"{trained} of {len(outcomes)} matched images were in the model's training list: this is no test")
        for row in rows:
            labels = {row["label"]} if row["label"] != tables.ALL else {image.label for _, image in matched.pairs}
            row["training_images"] = sum(
                outcome.trained_on and image.label in labels for outcome, (_, image) in zip(outcomes, matched.pairs)
            )
    with_truth = {image.path for image in dataset.images if image.lesion_mask or image.path in boxes}
    metrics = {
        "maps": {
            "found": len(folder.maps),
            "scored": sum(bool(outcome.rows) for outcome in outcomes),
            "without_image": len(matched.maps_without_image),
            "unreadable": sum(bool(outcome.problem) for outcome in outcomes),
        },
        "images": {
            "found": len({image.path for image in dataset.images}),
            "with_lesion_truth": len(with_truth),
            "scored": len({row["image_path"] for row in images}),
            "without_map": len(matched.images_without_map),
            "with_lesion_truth_without_map": len(with_truth & set(matched.images_without_map)),
        },
        "grid": grid.size,
        "smoothing": grid.smoothing,
        "matched_by": "record" if run is not None else matched.by,
        "localization": rows,
        "notes": notes,
    }
    return Scored(metrics, images)


def _thresholds(uri: str | None) -> tuple[dict[str, float] | None, str | None]:
    """Thresholds by map, and where they are from: a reduced run, an ``--out`` of this verb, or a ``.json`` file."""
    if uri is None:
        return None, None
    name = uri.rstrip("/").rpartition("/")[2]
    try:
        if uri.lower().endswith(".json"):
            store, file = open_file(uri)
            found = json.loads(store.read(file))
        else:
            found = read_thresholds(uri)
    except UnusableData:
        raise
    except (OSError, ValueError) as error:  # no such file, no JSON, an unknown scheme
        raise UnusableData(f"--threshold-from {uri}: cannot be read ({error})") from None
    if not isinstance(found, dict) or not all(isinstance(value, (int, float)) for value in found.values()):
        raise UnusableData(f"--threshold-from {uri}: expected thresholds by map, as in tables/thresholds.json")
    return found, name


def _choose_grid(folder: MapFolder, matched: Matched, options: ScoreOptions) -> Grid:
    """The maps' own grid where the most common shape of a few is a square of at least 32 px, else 256 px."""
    if folder.run is not None:
        recipe = folder.run.recipe
        return Grid(options.size or recipe.model.resolution, recipe.generate.smoothing, 0.0, True)
    smoothing, signed16 = options.smoothing or 0.0, options.encoding == "signed16"
    shapes: Counter[tuple[int, ...]] = Counter()
    for file in _sampled(matched) if options.size is None else []:
        try:
            shapes[read_map_values(folder.store.read(file.path), file.path, signed16).shape] += 1
        except (OSError, BadImage):
            continue  # counted when it is scored
    height, width = shapes.most_common(1)[0][0] if shapes else (0, 0)
    own = width if height == width >= SMALLEST_GRID else DEFAULT_GRID
    return Grid(options.size or own, smoothing, smoothing, signed16)


def _sampled(matched: Matched) -> list[MapFile]:
    """A few maps from all over the folder."""
    step = max(len(matched.pairs) // SAMPLED, 1)
    return [file for file, _ in matched.pairs[::step][:SAMPLED]]


def _training_images(folder: MapFolder, options: ScoreOptions, notes: list[str]) -> TrainingImages | None:
    """The training list of the model that made the maps; without one, for maps of a run or model, that is said."""
    if options.model is not None:
        seen = TrainingImages.of_model(options.model)
        where = f"--model {options.model}"
    elif folder.run is not None:
        seen = TrainingImages.of_model(str(folder.run.about["model"]), folder.run.keys["model_digest"])
        where = "the run's model"
    else:
        return None
    if seen is None:
        notes.append(f"{where} has no list of training images: whether it has seen these is not known")
    return seen


def _score_one(
    folder: MapFolder,
    dataset: Dataset,
    boxes: Boxes,
    grid: Grid,
    seen: TrainingImages | None,
    file: MapFile,
    image: LabelledImage,
) -> _Outcome:
    if not image.lesion_mask and image.path not in boxes:
        return _Outcome(no_truth=True)
    try:
        values = read_map_values(folder.store.read(file.path), file.path, grid.signed16)
    except (OSError, BadImage) as error:
        return _Outcome(problem=f"{file.path}: {error}")
    try:
        data = dataset.store.read(image.path)
        if file.image_sha256 and hashlib.sha256(data).hexdigest() != file.image_sha256:
            return _Outcome(other_image=True)
        picture = decode(data)
        reconstruction = grey(folder.store, file.reconstruction) if file.reconstruction else None
    except (OSError, BadImage):
        return _Outcome(image_problem=True)
    found = _Outcome(
        trained_on=seen is not None and seen.holds(data),
        resized=values.shape != (grid.size, grid.size),
        negative=bool(values.min() < 0),
        flat=bool(values.max() <= 0),
    )
    truth = image_truth(dataset.store, image, boxes, picture.shape[1], picture.shape[0], grid.size)
    if truth.lesion is None:
        return replace(found, no_truth=True)
    signed = smooth(on_grid(values, grid.size), grid.map_smoothing)
    square = to_square(picture, grid.size)
    rendered = None if reconstruction is None else to_square(reconstruction, grid.size)
    maps = {name: transform(signed) for name, transform in SALIENCY.items()}
    maps |= baselines(square, rendered, grid.smoothing)
    about = {"map_path": file.path, "image_path": image.path, "label": image.label}
    rows = [{**about, **row} for row in score_image(maps, truth)]
    return replace(found, rows=rows, nothing_to_find=not rows)


def _said_of_input(folder: MapFolder, matched: Matched, grid: Grid, options: ScoreOptions) -> list[str]:
    """How the maps were found and read: what nobody should have to guess."""
    said = []
    if folder.run is not None:
        said.append(
            f"{folder.store.uri} is a run: its maps are matched through its records and read as signed 16-bit, and the "
            f"baselines are smoothed like them ({grid.smoothing:g} of the side)"
        )
    else:
        said.append(
            "autoencoder difference is a baseline for runs only: it needs the model's own rendering of an image"
        )
        if matched.by == "name":
            said.append("maps and images are matched by file name alone: no map's path fits an image's")
        said += _said_of_encoding(folder, matched, options)
    if folder.ignored:
        said.append(f"{folder.ignored} files of the folder are no maps by their names")
    if matched.maps_without_image:
        names = first_paths(matched.maps_without_image)
        said.append(f"{len(matched.maps_without_image)} maps fit no image and are left out ({names})")
    return said


def _said_of_encoding(folder: MapFolder, matched: Matched, options: ScoreOptions) -> list[str]:
    for file in _sampled(matched):
        try:
            data = folder.store.read(file.path)
            if not is_sixteen_bit(data, file.path):
                continue
            if options.encoding == "signed16":
                return ["16-bit maps are read as signed: level 32768 is zero (--encoding signed16)"]
            how = "16-bit maps are read as unsigned, level 0 as zero"
            if MID_GREY[0] <= float(np.median(read_map_values(data, file.path))) <= MID_GREY[1]:
                how += f"; {file.path} is mostly mid-grey: if level 32768 is its zero, give --encoding signed16"
            return [how]
        except (OSError, BadImage):
            continue
    return []


def _said_of_outcomes(
    matched: Matched, outcomes: Sequence[_Outcome], options: ScoreOptions, signed: bool, of_run: bool
) -> list[str]:
    """What became of the maps; nothing is left out without a word."""
    said = []
    if options.signed is None and not of_run:
        how = "some values are negative: max(M, 0) and |M| are scored" if signed else "no value is negative"
        said.append(f"{how} (--signed and --positive choose)")
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    if problems:
        said.append(f"{len(problems)} maps cannot be read and are left out (first: {problems[0]})")
    counted = (
        ("image_problem", "images cannot be read and are left out"),
        ("other_image", "images are not those the run was made of (same name, other bytes) and are left out"),
        ("no_truth", "matched images have no known lesion and are left out"),
        ("nothing_to_find", "matched images have nothing to find: the lesion is empty or fills the region"),
        ("resized", "maps had another size and were brought to the grid"),
        ("flat", "maps have no positive value: they point nowhere, which is AUROC 0.5; is their sign turned?"),
    )
    for name, text in counted:
        number = sum(getattr(outcome, name) for outcome in outcomes)
        if number:
            said.append(f"{number} {text}")
    if matched.images_without_map:
        said.append(f"{len(matched.images_without_map)} images have no map ({first_paths(matched.images_without_map)})")
    return said


def _why_nothing(data_uri: str, matched: Matched, outcomes: Sequence[_Outcome]) -> str:
    problem = next((outcome.problem for outcome in outcomes if outcome.problem), None)
    if problem is not None:
        return f"none of {len(matched.pairs)} matched maps can be scored; {problem}"
    if any(outcome.other_image for outcome in outcomes):
        return f"{data_uri}: the run was made of other images: the names are the same, the bytes are not"
    return (
        f"{data_uri}: none of the {len(matched.pairs)} matched images has a lesion to find; bring lesions/ masks, a "
        "boxes.csv, or --boxes CSV"
    )
