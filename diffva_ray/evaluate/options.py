"""The options of ``diffva reduce``, which change the tables of a run and none of its records."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from diffva_ray.data.dataset import UnusableData
from diffva_ray.provenance import missing
from diffva_ray.storage.opening import open_file

# Optional packages of extractors, judges and metrics: module and extra.
PACKAGES = {
    "inception": ("pytorch_fid", "fid"),
    "torchxrayvision": ("torchxrayvision", "xrv"),
    "lpips": ("lpips", "lpips"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a reduce. Paths may be local or addresses such as ``s3://bucket/file``."""

    references: tuple[tuple[str, str], ...] = ()  # reference sets (class, data set or run); none: the healthy class
    boxes: str | None = None  # CSV with lesion boxes; None: those of the data set
    weights: str | None = None  # state dict of pytorch-fid's Inception; None: the random-feature extractor
    resize: Literal["clean", "legacy"] = "clean"  # "legacy": as pytorch-fid, from the files at their stored size
    threshold_from: str | None = None  # reduced validation run whose Dice thresholds are used
    normals: str | None = None  # data set of normal images for the baselines; None: the reference sets
    cache: str | None = None  # folder for the features of reference sets, shared by several runs; None: the run
    extractors: tuple[str, ...] = ()  # NAME or NAME=PATH; none: Inception with ``weights``, else random features
    lpips: str | None = None  # state dict of torchvision's AlexNet, for LPIPS; None: no LPIPS
    brixia: str | None = None  # CSV with Brixia scores, as ``annotations.read_zones`` reads it
    sources: str | None = None  # CSV with the source archive of each image, as ``annotations.read_sources`` reads it
    judges: tuple[str, ...] = ()  # published classifiers, NAME=PATH as in ``metrics.external_judges``


def parse_references(texts: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Parse ``LABEL=DATA_OR_RUN`` options. Raises UnusableData for one without a label."""
    pairs = []
    for text in texts:
        label, equals, uri = text.partition("=")
        if not (equals and label and uri):
            raise UnusableData(f"--reference {text}: write LABEL=DATA or LABEL=RUN, as in Normal=data/test")
        pairs.append((label, uri))
    return tuple(pairs)


def check_packages(options: Options) -> None:
    """Raise UnusableData, one line, for the first option whose optional package is not installed."""
    asked = [("--extractor", text) for text in options.extractors] + [("--judge", text) for text in options.judges]
    asked += [("--inception-weights", "inception")] if options.weights else []
    asked += [("--lpips-weights", "lpips")] if options.lpips else []
    for option, text in asked:
        module, extra = PACKAGES.get(text.partition("=")[0], ("", ""))
        if module and find_spec(module) is None:
            raise UnusableData(missing(module.replace("_", "-"), option, extra))


def inception_path(option: str | None) -> str | None:
    """The path of Inception's weights: the given one, a download (``download``), pytorch-fid's cache, or None.

    Raises UnusableData when the file does not exist, the download fails, or pytorch-fid is not installed."""
    from diffva_ray.metrics.features import download_inception, inception_cache

    if option == "download":
        try:
            return str(download_inception())
        except RuntimeError as error:
            raise UnusableData(
                f"--inception-weights download: {error} and pass --inception-weights PATH, "
                "or leave the option out: distances are then not FID, and named so"
            ) from None
        except ValueError as error:
            raise UnusableData(f"--inception-weights download: {error}") from None
    if option is None:
        cached = inception_cache()
        return str(cached) if cached else None
    store, name = open_file(option)
    if not store.exists(name):
        raise UnusableData(f"--inception-weights {option}: no such file")
    return option
