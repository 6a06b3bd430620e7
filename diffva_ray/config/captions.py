"""Settings of captions that are made of what a data set says about its images."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from diffva_ray.config.stages import Section

PARTS = ("finding", "count", "severity", "size", "side", "zone", "place", "other", "age", "sex", "view", "report")
NAMED = re.compile(r"\{(\w*)\}")


class CaptionConfig(Section):
    """Training captions from class, lesion masks or boxes, and table (docs/training.md). Every caption is a function of
    seed, image and step."""

    templates: tuple[str, ...] = Field(
        (
            "{count} {severity} {size} {finding} {place} {other}, {age} {sex}, {view}",
            "{age} {sex}, {view}, {size} {severity} {finding} {place} {other}",
        ),
        min_length=1,
    )
    """Texts with names in braces, one chosen at random for each caption. Names without a value vanish, and so do the
    parts between commas in which no name has one. Names: ``finding``, ``count``, ``severity``, ``size``, ``side``,
    ``zone``, ``place`` (side and zone), ``other`` (further findings), ``age``, ``sex``, ``view``, ``report`` (the
    report's impression, cut after the last sentence with which the caption fits into ``model.tokenizer_length``)."""

    dropout: float = Field(0.3, ge=0, le=1)
    """Probability of leaving out each name but ``finding``."""

    bare: float = Field(0.2, ge=0, le=1)
    """Fraction of captions that are the prompt of the class alone, which counterfactuals are asked for with."""

    unnamed: float = Field(0.1, ge=0, le=1)
    """Fraction of captions of abnormal images that say "finding" for the class, so that side and zone are also learnt
    without it."""

    shuffle: bool = True
    """Shuffle the parts between commas."""

    synonyms: float = Field(0.3, ge=0, le=1)
    """Probability of saying a word of the lexicon (``data/lexicon.py``) by one of its synonyms."""

    numbers: Literal["digits", "words"] = "digits"
    """How ages and counts are written."""

    findings: int = Field(2, ge=1, le=8)
    """Largest number of findings that a caption names."""

    @field_validator("templates")
    @classmethod
    def _known(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            names = NAMED.findall(template)
            if unknown := [name for name in names if name not in PARTS]:
                raise ValueError(f"no such name: {{{unknown[0]}}}; there are {', '.join(PARTS)}")
            if "finding" not in names:
                raise ValueError(f"{template!r} lacks {{finding}}")
        return templates
