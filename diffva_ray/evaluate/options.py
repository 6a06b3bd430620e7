"""What changes the tables of a run, and none of its records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffva_ray.data.dataset import UnusableData
from diffva_ray.storage.store import open_file


@dataclass(frozen=True, kw_only=True)
class Options:
    """``references``: (label, data or run); ``weights``: pytorch-fid's state dict; ``cache``: where features of
    references are kept, when several runs share them (by default the run); ``extractors``: NAME or NAME=PATH, by
    default Inception if ``weights`` are given and the stand-in otherwise; ``lpips``: torchvision's AlexNet state dict;
    ``brixia``, ``sources``: CSV files as in ``evaluate.annotations``; ``judges``: NAME=PATH as in
    ``metrics.external_judges``."""

    references: tuple[tuple[str, str], ...] = ()
    boxes: str | None = None
    weights: str | None = None
    resize: Literal["clean", "legacy"] = "clean"
    threshold_from: str | None = None
    cache: str | None = None
    extractors: tuple[str, ...] = ()
    lpips: str | None = None
    brixia: str | None = None
    sources: str | None = None
    judges: tuple[str, ...] = ()


def parse_references(texts: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """``LABEL=DATA_OR_RUN`` options. Raises UnusableData for one without a label."""
    pairs = []
    for text in texts:
        label, equals, uri = text.partition("=")
        if not (equals and label and uri):
            raise UnusableData(f"--reference {text}: write LABEL=DATA or LABEL=RUN, as in Normal=data/test")
        pairs.append((label, uri))
    return tuple(pairs)


def inception_path(option: str | None) -> str | None:
    """Where Inception's weights are: the path given, a download when asked for, pytorch-fid's cache, or nowhere."""
    from diffva_ray.metrics.features import download_inception, inception_cache

    if option == "download":
        try:
            return str(download_inception())
        except RuntimeError as error:
            raise UnusableData(f"--inception-weights download: {error} and pass --inception-weights PATH") from None
    if option is None:
        cached = inception_cache()
        return str(cached) if cached else None
    store, name = open_file(option)
    if not store.exists(name):
        raise UnusableData(f"--inception-weights {option}: no such file")
    return option
