"""Chooses which sets of a run are compared: images, counterfactuals and references, by class and setting, within
classes and within source archives, with the features of every requested extractor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.evaluate.annotations import read_sources
from diffva_ray.evaluate.distances import Embed, distance_row, embed_here, reference_features, run_features
from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.records import under
from diffva_ray.evaluate.run_index import RunIndex, index_run
from diffva_ray.generate.run import Run, find_run
from diffva_ray.metrics.feature_set import FeatureSet
from diffva_ray.metrics.fid import SMALL, frechet_distance_features
from diffva_ray.metrics.fid_controls import conditional
from diffva_ray.metrics.intervals import group_bootstrap
from diffva_ray.metrics.realism import directions, interpolation, verisimilitude
from diffva_ray.schema import TableRow
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store

if TYPE_CHECKING:  # loads torch
    from diffva_ray.metrics.features import Extractor

MIN_SET_SIZE = 4  # images


@dataclass(frozen=True)
class Reference:
    """A reference set and its features."""

    label: str  # its class
    features: FeatureSet
    dataset: Dataset | None = None  # None: the counterfactuals of another run


def choose_extractors(run: Run, options: Options, notes: list[str]) -> list[Extractor]:
    """The extractors of ``options``, in their order. Raises UnusableData, one line, for an unknown name, a missing path
    and weights of another network."""
    from diffva_ray.metrics.features import stand_in  # loads torch

    if not options.extractors and options.weights is None:
        notes.append(
            "no Inception weights given (--inception-weights PATH): distances are of the stand-in extractor and are "
            "not FID"
        )
        return [replace(stand_in(), asked="stand-in")]
    return [open_extractor(text, run, options) for text in options.extractors or ("inception",)]


def open_extractor(text: str, run: Run, options: Options, device: str | None = None) -> Extractor:
    """Open the extractor ``text`` (NAME or NAME=PATH) on ``device`` (default: a GPU if there is one). Raises
    UnusableData, one line."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return replace(_extractor(text, run, options, device), asked=text)


def _extractor(text: str, run: Run, options: Options, device: str) -> Extractor:
    from diffva_ray.metrics.extractors import EXTRACTORS

    name, _, path = text.partition("=")
    option = f"--extractor {text}"
    if name not in EXTRACTORS:
        raise UnusableData(f"{option}: no such extractor; there are {', '.join(EXTRACTORS)}")
    if name == "judge" and not path:
        path = str(run.about["model"])
    if name == "inception" and not path and options.weights:
        option, path = "--inception-weights", options.weights
    if name != "stand-in" and not path:
        raise UnusableData(f"{option}: give its weights as {name}=PATH; nothing is downloaded")
    try:
        return EXTRACTORS[name](path, device, options.resize, run.recipe.model.resolution)
    except (OSError, ValueError) as error:
        raise UnusableData(f"{option}: {error}") from None


def distances(
    run: Run, data_uri: str, options: Options, records: RunIndex, notes: list[str], spread: Embed = embed_here
) -> tuple[list[TableRow], list[TableRow]]:
    """The rows of the distance table, and those of the table of distances within conditions.

    For each extractor, setting and class: images to counterfactuals, and each reference to both. Of several samples of
    an image only the first is used, so that no image is in a set twice."""
    samples = records.frame["sample"]
    if samples.nunique() > 1:
        notes.append(f"distances use only sample {samples.min()} of each image")
    sources = read_sources(options.sources, records.images.to_pylist()) if options.sources else {}
    if options.sources and not sources:
        raise UnusableData(f"--sources {options.sources}: none of its files is an image of the run")
    rows, within = list[TableRow](), list[TableRow]()
    for number, extractor in enumerate(choose_extractors(run, options, notes)):
        comparison = _Comparison(run, options, records, extractor, spread)
        wanted = options.references or ((run.recipe.data.healthy_class, data_uri),)
        opened = [
            reference(run, label, uri, extractor, options, notes if number == 0 else [], spread)
            for label, uri in wanted
        ]
        references = [reference for reference in opened if reference is not None]
        rows += comparison.by_condition(references)
        rows += comparison.by_source(references, sources)
        within += comparison.within_conditions(references)
    if rows and min(min(row["n1"], row["n2"]) for row in rows) < SMALL:
        notes.append(f"sets of fewer than {SMALL} images: prefer KID to the Fréchet distance, whose bias grows as 1/N")
    return rows, within


def conditions(records: RunIndex) -> dict[tuple[str, str], NDArray[np.intp]]:
    """Rows of ``RunIndex.frame`` of each (setting, class): the first sample of each image, in the order of images, so
    that comparisons of the same two sets under different settings have the same interval."""
    frame = records.frame
    labels = sorted(frame["label"].unique())
    settings = list(frame["setting"].unique()) if "setting" in frame else [""]
    first = (frame["sample"] == frame["sample"].min()).to_numpy()
    image, rows_of = frame["image"].to_numpy(), dict[tuple[str, str], NDArray[np.intp]]()
    for setting in settings:
        of_setting = first & (frame["setting"] == setting).to_numpy() if setting else first
        for label in labels:
            rows = np.flatnonzero(of_setting & (frame["label"] == label).to_numpy())
            rows_of[setting, label] = rows[np.argsort(image[rows], kind="stable")]
    return rows_of


class _Comparison:
    """Compares the sets of one run with the features of one extractor."""

    def __init__(self, run: Run, options: Options, records: RunIndex, extractor: Extractor, spread: Embed) -> None:
        self.run, self.options, self.records, self.extractor, self.spread = run, options, records, extractor, spread
        self.features = run_features(run, records, extractor, spread)
        self.conditions = conditions(records)

    def by_condition(self, references: Sequence[Reference]) -> list[TableRow]:
        """Distances of each class and setting: images, counterfactuals and references to each other."""
        rows = list[TableRow | None]()
        seen = set[str]()
        for (setting, label), chosen in self.conditions.items():
            before, after = self.features.source.take(chosen), self.features.counterfactual.take(chosen)
            names = f"{label} (source)", under(f"{label} (counterfactual)", setting)
            rows.append(self._row(*names, before, after, paired=True))
            for other in references:
                features, name = other.features, f"{other.label} (reference)"
                if label not in seen:  # the same two sets under every setting
                    rows.append(self._row(name, names[0], features, before))
                row = self._row(name, names[1], features, after)
                if row is not None:
                    group = "group" if "group" in self.records.frame else "image"
                    groups = self.records.frame[group].to_numpy()[chosen]
                    row |= self._realism(label, other.label, before, after, features, groups)
                rows.append(row)
            seen.add(label)
        return [row for row in rows if row is not None]

    def _realism(
        self, label: str, reference: str, before: FeatureSet, after: FeatureSet, real: FeatureSet,
        groups: NDArray[np.integer],
    ) -> TableRow:  # fmt: skip
        """Whether counterfactuals resemble images of the reference, and whether they moved towards it."""
        scores: TableRow = {"verisimilitude": asdict(verisimilitude(after, real))}
        if len(real) > 6:
            scores["interpolation"] = asdict(interpolation(after, real))
        if reference == self.run.recipe.data.healthy_class != label:
            cosines = directions(before, after, real)
            low, high = group_bootstrap(cosines, groups)
            scores["direction"] = {"mean": float(np.nanmean(cosines)), "low": low, "high": high}
        return scores

    def by_source(self, references: Sequence[Reference], sources: dict[str, str]) -> list[TableRow]:
        """Distances between counterfactuals and reference images of the same source archive.

        ``sources``: archive by image path. For example, images of children are compared with images of children."""
        rows = list[TableRow | None]()
        if not sources:
            return []
        for (setting, label), chosen in self.conditions.items():
            for source in sorted(set(sources.values())):
                of_source = chosen[np.array([sources.get(path) == source for path in self.records.paths(chosen)], bool)]
                for other in references:
                    if len(of_source) >= MIN_SET_SIZE and other.dataset is not None:
                        real, edited = self._of_source(other, source), self.features.counterfactual.take(of_source)
                        name = under(f"{label} of {source} (counterfactual)", setting)
                        row = self._row(f"{other.label} of {source} (reference)", name, real, edited)
                        rows.append(row if row is None else row | {"source": source})
        return [row for row in rows if row is not None]

    def _of_source(self, other: Reference, source: str) -> FeatureSet:
        assert other.dataset is not None
        assert self.options.sources is not None
        source_of = read_sources(self.options.sources, [image.path for image in other.dataset.images])
        images = [image for image in other.dataset.images if source_of.get(image.path) == source]
        cache, size, data = _cache(self.run, self.options), self.run.recipe.model.resolution, other.dataset
        return reference_features(cache, size, data.store, images, self.extractor, self.spread, data.bits)[0]

    def within_conditions(self, references: Sequence[Reference]) -> list[TableRow]:
        """Mean of the distances within each class (and setting), and the distance of the pooled sets."""
        settings = list(dict.fromkeys(setting for setting, _ in self.conditions))
        groups = [(setting, [key for key in self.conditions if key[0] == setting]) for setting in settings]
        if len(settings) > 1:
            groups.append(("every setting", list(self.conditions)))
        rows = []
        for setting, keys in groups:
            sets = {key: self.conditions[key] for key in keys if len(self.conditions[key]) >= MIN_SET_SIZE}
            if len(sets) < 2:
                continue
            counterfactuals = {key: self.features.counterfactual.take(chosen) for key, chosen in sets.items()}
            images = {key: self.features.source.take(chosen) for key, chosen in sets.items()}
            rows.append(self._within("images", setting, {key: (images[key], counterfactuals[key]) for key in sets}))
            for other in references:
                real = other.features
                if len(real) >= MIN_SET_SIZE:
                    name = f"{other.label} (reference)"
                    rows.append(self._within(name, setting, {key: (real, counterfactuals[key]) for key in sets}))
        return rows

    def _within(self, name: str, setting: str, sets: dict[tuple[str, str], tuple[FeatureSet, FeatureSet]]) -> TableRow:
        first = [x for x, _ in sets.values()]
        pooled = first[0] if all(x is first[0] for x in first) else FeatureSet.together(first)
        counterfactuals = FeatureSet.together([y for _, y in sets.values()])
        return {
            "set1": name,
            "set2": under("counterfactuals", setting),
            "conditions": ", ".join(under(label, at if setting == "every setting" else "") for at, label in sets),
            "n1": len(pooled),
            "n2": len(counterfactuals),
            "within": conditional({under(label, at): pair for (at, label), pair in sets.items()}),
            "pooled": frechet_distance_features(pooled, counterfactuals),
            "extractor": self.extractor.name,
            "weights_sha256": self.extractor.weights_sha256,
            "resize": self.extractor.resize,
        }

    def _row(self, first: str, second: str, x: FeatureSet, y: FeatureSet, paired: bool = False) -> TableRow | None:
        return distance_row(first, second, x, y, self.extractor, self.run.recipe.evaluate.fid_subsets, paired)


def reference(
    run: Run, label: str, uri: str, extractor: Extractor, options: Options, notes: list[str], spread: Embed = embed_here
) -> Reference | None:
    """Class ``label`` of the data set, or of the counterfactuals of the run, at ``uri``.

    Returns None and adds a note if the default reference does not exist; raises UnusableData for a given one."""
    other = find_run(open_store(uri)) if not uri.lower().endswith((".csv", ".parquet")) else None
    if other is not None:
        records = index_run(other)
        chosen = (records.frame["label"] == label).to_numpy()
        if not chosen.any():
            raise UnusableData(f"--reference {label}={uri}: that run has no finished record of class {label}")
        features_of_run = run_features(other, records, extractor, spread, chosen)
        return Reference(label, features_of_run.counterfactual.take(chosen))
    try:
        dataset = open_dataset(uri, run.recipe.data, [label])
    except UnusableData as error:
        if options.references:
            raise UnusableData(f"--reference {label}={uri}: {error}") from None
        notes.append(f"no reference set: {error}")
        return None
    size = run.recipe.model.resolution
    features, unreadable = reference_features(
        _cache(run, options), size, dataset.store, dataset.images, extractor, spread, dataset.bits
    )
    if unreadable:
        notes.append(f"{unreadable} images of reference {label} could not be read")
    return Reference(label, features, dataset)


def _cache(run: Run, options: Options) -> Store:
    return open_store(options.cache) if options.cache else run.store
