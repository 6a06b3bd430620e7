"""What changes the tables of a run, and none of its records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
