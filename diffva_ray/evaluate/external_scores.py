"""``diffva score``: scores external attribution maps like those of a run, together with trivial baselines.

Every map, baseline and ground truth mask is resized to one square grid, so that the scores can be compared.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.images import BadImage, decode, to_square
from diffva_ray.evaluate import tables
from diffva_ray.evaluate.annotations import lesion_shapes, read_thresholds
from diffva_ray.evaluate.baselines import Baselines, fit_baselines, normal_images, with_own
from diffva_ray.evaluate.external_maps import (
    Encoding,
    MapFile,
    MapFolder,
    Matched,
    first_paths,
    is_sixteen_bit,
    match,
    open_maps,
    read_map_values,
)
from diffva_ray.evaluate.records import Lesions, grey, image_truth
from diffva_ray.evaluate.scores import LocalizationScores, score_image
from diffva_ray.metrics.localization import SALIENCY, on_grid, smooth
from diffva_ray.model.training_images import TrainingImages
from diffva_ray.schema import TableRow
from diffva_ray.storage.opening import open_file

DEFAULT_GRID = 256
MIN_GRID = 32  # smaller maps (a class activation map of 7 x 7) are enlarged, or lesions would vanish
MID_GREY = (32_000 / 65535, 33_536 / 65535)  # range of the zero of a signed 16-bit map that is read as unsigned
THREADS, SAMPLED_MAPS = 8, 16


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How maps are read and scored."""

    boxes: str | None = None  # CSV with lesion boxes; None: those of the data set
    encoding: Encoding = "auto"  # of 16-bit maps
    signed: bool | None = None  # score max(M, 0) and |M|; False: max(M, 0); None: |M| only if a value is negative
    smoothing: float | None = None  # Gaussian sigma as a fraction of the side, for maps and baselines
    size: int | None = None  # side of the grid; None: that of the maps
    threshold_from: str | None = None  # reduced run, earlier --out, or .json file with thresholds
    model: str | None = None  # model whose training images are refused; for maps of a run, the run's model
    allow_training_images: bool = False
    data: DataConfig = field(default_factory=DataConfig)  # how a table of images is read


@dataclass(frozen=True)
class ScoreGrid:
    """The grid and the smoothing with which all images are scored."""

    size: int  # side in pixels
    smoothing: float  # of the baselines without validation images, as a fraction of the side
    map_smoothing: float  # of the maps; 0 for a run's maps, which are already smoothed
    signed16: bool  # how 16-bit maps are read


@dataclass
class Scored:
    """The result of scoring maps."""

    metrics: dict[str, Any]  # counts, settings, table rows and notes, as in tables/metrics.json
    images: list[TableRow]  # one row per image and map


LEFT_OUT = {  # kinds of outcomes that are noted
    "image_problem": "images cannot be read and are left out",
    "other_image": "images are not those the run was made from (same name, other bytes) and are left out",
    "no_truth": "matched images have no known lesion and are left out",
    "nothing_to_find": "matched images have nothing to find: the lesion is empty or fills the region",
    "resized": "maps had another size and were resized to the grid",
    "flat": "maps have no positive value, which gives AUROC 0.5; is their sign inverted?",
}


@dataclass(frozen=True)
class _Outcome:
    """The result of one map."""

    kinds: frozenset[str] = frozenset()  # keys of LEFT_OUT; negative: the map has negative values; trained_on
    rows: list[TableRow] = field(default_factory=list)
    problem: str = ""  # why the map cannot be read


def score_maps(maps_uri: str, data_uri: str, options: ScoreOptions = ScoreOptions()) -> Scored:
    """Score attribution maps (a folder of map files named like their images, a run, or a run's ``attributions``)
    against the lesion masks or boxes of a data set.

    Raises UnusableData, one line, if no map fits an image, a map fits several images, no matched image has a known
    lesion, the model was trained on matched images, or an option cannot be used."""
    # inputs
    folder = open_maps(maps_uri)
    run = folder.run
    if run is not None and (options.smoothing is not None or options.encoding == "unsigned"):
        wrong = "--smoothing" if options.smoothing is not None else "--encoding unsigned"
        raise UnusableData(
            f"{wrong}: {maps_uri} is a run; its maps are signed 16-bit, and its recipe sets the smoothing"
        )
    config = run.recipe.data if run is not None else options.data
    dataset = open_dataset(data_uri, config)
    notes: list[str] = []
    lesions: Lesions = dataset.shapes
    if options.boxes is not None:
        lesions = lesion_shapes(data_uri, config, options.boxes, notes)
    thresholds, source = _thresholds(options.threshold_from)
    matched = match(folder.maps, dataset.images, maps_uri, records=run is not None)
    if not matched.pairs:
        hint = f"as in {folder.maps[0].path} for image {dataset.images[0].path}"
        raise UnusableData(
            f"{maps_uri}: none of its {len(folder.maps)} maps is named like one of the {len(dataset.images)} images of "
            f"{data_uri} ({hint}); for the maps of a diffva run, give the run itself"
        )
    grid = _choose_grid(folder, matched, options)
    notes += _input_notes(folder, matched, grid, options)

    # scores
    seen = _training_images(folder, options, notes)
    normals = normal_images(data_uri, config, notes)
    baselines = fit_baselines(normals, grid.size, grid.smoothing, options.threshold_from, notes)
    thresholds = with_own(thresholds, baselines) if thresholds is not None else None
    inputs = _Inputs(folder, dataset, lesions, grid, baselines, seen)
    with ThreadPoolExecutor(THREADS) as pool:  # waits on the store, mostly
        outcomes = list(pool.map(lambda pair: _score_one(inputs, *pair), matched.pairs))
    kinds = Counter(kind for outcome in outcomes for kind in outcome.kinds)
    trained = kinds["trained_on"]
    if trained and not options.allow_training_images:
        raise UnusableData(
            f"{data_uri}: {trained} of {len(outcomes)} matched images were in the model's training list; score other "
            "images, or give --allow-training-images, which is then noted in the tables"
        )
    # tables
    images = [row for outcome in outcomes for row in outcome.rows]
    if not images:
        raise UnusableData(_nothing_scored(data_uri, matched, outcomes, kinds))
    signed = run is not None or kinds["negative"] > 0 if options.signed is None else options.signed
    if not signed:
        images = [row for row in images if row["map"] != "absolute"]
    if options.signed is None and run is None:
        how = "some values are negative: max(M, 0) and |M| are scored" if signed else "no value is negative"
        notes.append(f"{how} (--signed and --positive choose)")
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    if problems:
        notes.append(f"{len(problems)} maps cannot be read and are left out (first: {problems[0]})")
    notes += [f"{kinds[kind]} {text}" for kind, text in LEFT_OUT.items() if kinds[kind]]
    if without := matched.images_without_map:
        notes.append(f"{len(without)} images have no map ({first_paths(without)})")
    try:
        rows = tables.localization_rows(LocalizationScores.of(images), thresholds, source)
    except ValueError as error:  # a threshold off the grid
        raise UnusableData(f"--threshold-from {options.threshold_from}: {error}") from None
    if trained:
        notes.append(f"{trained} of {len(outcomes)} matched images were in the model's training list: this is no test")
        for row in rows:
            labels = {row["label"]} if row["label"] != tables.ALL else {image.label for _, image in matched.pairs}
            row["training_images"] = sum(
                "trained_on" in outcome.kinds and image.label in labels
                for outcome, (_, image) in zip(outcomes, matched.pairs)
            )
    # counts and settings
    with_truth = {image.path for image in dataset.images if image.lesion_mask or image.path in lesions}
    metrics = {
        "maps": {
            "found": len(folder.maps),
            "scored": sum(bool(outcome.rows) for outcome in outcomes),
            "without_image": len(matched.maps_without_image),
            "unreadable": len(problems),
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
    """Thresholds by map, and the name of their source: a reduced run, an ``--out`` of ``diffva score``, or a JSON
    file."""
    if uri is None:
        return None, None
    name = uri.rstrip("/").rpartition("/")[2]
    try:
        if uri.lower().endswith(".json"):
            store, file = open_file(uri)
            thresholds = json.loads(store.read(file))
        else:
            thresholds = read_thresholds(uri)
    except UnusableData:
        raise
    except (OSError, ValueError) as error:  # no such file, no JSON, an unknown scheme
        raise UnusableData(f"--threshold-from {uri}: cannot be read ({error})") from None
    if not isinstance(thresholds, dict) or not all(isinstance(value, (int, float)) for value in thresholds.values()):
        raise UnusableData(f"--threshold-from {uri}: expected thresholds by map, as in tables/thresholds.json")
    return thresholds, name


def _choose_grid(folder: MapFolder, matched: Matched, options: ScoreOptions) -> ScoreGrid:
    """The size of the maps if the most common shape of some of them is a square of at least MIN_GRID, else
    DEFAULT_GRID."""
    if folder.run is not None:
        recipe = folder.run.recipe
        return ScoreGrid(options.size or recipe.model.resolution, recipe.generate.smoothing, 0.0, True)
    smoothing, signed16 = options.smoothing or 0.0, options.encoding == "signed16"
    shapes: Counter[tuple[int, ...]] = Counter()
    for file in _sampled(matched) if options.size is None else []:
        try:
            shapes[read_map_values(folder.store.read(file.path), file.path, signed16).shape] += 1
        except (OSError, BadImage):
            continue  # counted when the map is scored
    height, width = shapes.most_common(1)[0][0] if shapes else (0, 0)
    size = width if height == width >= MIN_GRID else DEFAULT_GRID
    return ScoreGrid(options.size or size, smoothing, smoothing, signed16)


def _sampled(matched: Matched) -> list[MapFile]:
    """Some maps, evenly spaced over the folder."""
    step = max(len(matched.pairs) // SAMPLED_MAPS, 1)
    return [file for file, _ in matched.pairs[::step][:SAMPLED_MAPS]]


def _training_images(folder: MapFolder, options: ScoreOptions, notes: list[str]) -> TrainingImages | None:
    """The training list of the model that made the maps; a note if that model has none."""
    if options.model is not None:
        seen = TrainingImages.of_model(options.model)
        where = f"--model {options.model}"
    elif folder.run is not None:
        seen = TrainingImages.of_model(str(folder.run.about["model"]), folder.run.keys["model_digest"])
        where = "the run's model"
    else:
        return None
    if seen is None:
        notes.append(f"{where} has no list of training images: whether it was trained on these is not known")
    return seen


@dataclass(frozen=True)
class _Inputs:
    """What all maps are scored with."""

    folder: MapFolder
    dataset: Dataset
    lesions: Lesions
    grid: ScoreGrid
    baselines: Baselines
    seen: TrainingImages | None


def _score_one(inputs: _Inputs, file: MapFile, image: LabelledImage) -> _Outcome:
    folder, dataset, lesions, grid = inputs.folder, inputs.dataset, inputs.lesions, inputs.grid

    def signed(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return smooth(on_grid(values, grid.size), grid.map_smoothing)

    # read the map and the image
    if not image.lesion_mask and image.path not in lesions:
        return _Outcome(frozenset({"no_truth"}))
    try:
        values = read_map_values(folder.store.read(file.path), file.path, grid.signed16)
    except (OSError, BadImage) as error:
        return _Outcome(problem=f"{file.path}: {error}")
    try:
        data = dataset.store.read(image.path)
        if file.image_sha256 and hashlib.sha256(data).hexdigest() != file.image_sha256:
            return _Outcome(frozenset({"other_image"}))
        grey_image = decode(data)
        reconstruction = grey(folder.store, file.reconstruction) if file.reconstruction else None
    except (OSError, BadImage):
        return _Outcome(frozenset({"image_problem"}))
    # score
    found = {
        "trained_on": inputs.seen is not None and inputs.seen.holds(data),
        "resized": values.shape != (grid.size, grid.size),
        "negative": values.min() < 0,
        "flat": values.max() <= 0,
    }
    kinds = frozenset(kind for kind, holds in found.items() if holds)
    truth = image_truth(dataset.store, image, lesions, grey_image.shape[1], grey_image.shape[0], grid.size)
    if truth.lesion is None:
        return _Outcome(kinds | {"no_truth"})
    square = to_square(grey_image, grid.size)
    if reconstruction is not None:
        reconstruction = to_square(reconstruction, grid.size)
    maps = {name: transform(signed(values)) for name, transform in SALIENCY.items()}
    maps |= inputs.baselines.beside(maps["positive"], image.path) | inputs.baselines.maps(square, reconstruction)
    group = image.patient or image.path
    names = {"map_path": file.path, "image_path": image.path, "label": image.label, "group": group}
    rows = [{**names, **row} for row in score_image(maps, truth)]
    return _Outcome(kinds if rows else kinds | {"nothing_to_find"}, rows)


def _input_notes(folder: MapFolder, matched: Matched, grid: ScoreGrid, options: ScoreOptions) -> list[str]:
    """Notes on how the maps were found and read."""
    notes = []
    if folder.run is not None:
        notes.append(
            f"{folder.store.uri} is a run: its maps are matched through its records and read as signed 16-bit, and the "
            f"baselines are smoothed like them ({grid.smoothing:g} of the side)"
        )
    else:
        notes.append(
            "autoencoder difference is a baseline for runs only: it needs the model's reconstruction of an image"
        )
        if matched.by == "name":
            notes.append("maps and images are matched by file name alone: no map's path fits an image's")
        notes += _encoding_notes(folder, matched, options)
    if folder.ignored:
        notes.append(f"{folder.ignored} files of the folder are not maps, by their extension")
    if matched.maps_without_image:
        names = first_paths(matched.maps_without_image)
        notes.append(f"{len(matched.maps_without_image)} maps fit no image and are left out ({names})")
    return notes


def _encoding_notes(folder: MapFolder, matched: Matched, options: ScoreOptions) -> list[str]:
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


def _nothing_scored(data_uri: str, matched: Matched, outcomes: Sequence[_Outcome], kinds: Counter[str]) -> str:
    problem = next((outcome.problem for outcome in outcomes if outcome.problem), None)
    if problem is not None:
        return f"none of {len(matched.pairs)} matched maps can be scored; {problem}"
    if kinds["other_image"]:
        return f"{data_uri}: the run was made from other images: the names are the same, the bytes are not"
    return (
        f"{data_uri}: none of the {len(matched.pairs)} matched images has a known lesion; add lesions/ masks or a "
        "boxes.csv, or give --boxes CSV"
    )
