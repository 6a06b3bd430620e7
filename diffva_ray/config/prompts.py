"""Composed prompts: ``A AND B :0.5 NOT C`` and ``A TO B :0.3``, written in capitals in the text of one prompt.

A record's prompt is this text, so plans, ids, fingerprints and sweeps need no further columns. The words in small
letters compose nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from diffva_ray.config.methods import METHODS
from diffva_ray.config.sampling import SamplingSettings

_OPERATOR = re.compile(r"(?:^|\s+)(AND NOT|AND|NOT)(?=\s|$)\s*")
_NUMBER = re.compile(r"(?:^|\s+):\s*(\S*)$")
_TO = re.compile(r"\s+TO\s+")


@dataclass(frozen=True)
class Part:
    """One text of a composed prompt, which costs one network call in each guided step."""

    text: str
    weight: float = 1.0  # times the guidance scale; negative: away from the text
    towards: str | None = None  # the text is mixed with this one
    amount: float = 0.0  # of ``towards`` in the mixture, in [0, 1]

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that the text encoder reads."""
        return (self.text,) if self.towards is None else (self.text, self.towards)


def parts(prompt: str) -> tuple[Part, ...]:
    """Take a composed prompt apart.

        >>> [part.text for part in parts("Lung Opacity AND Mass on the left :0.5 NOT wires")]
        ['Lung Opacity', 'Mass on the left', 'wires']
        >>> parts("mild Mass TO severe Mass :0.3")[0].amount
        0.3

    Args:
        prompt: The text of a record's prompt.

    Returns:
        Its parts: the first is what guidance goes to, all others are added to it or subtracted.

    Raises:
        ValueError: A part is empty, a number is missing or outside its range, or the first part has a weight.
    """
    first, *rest = _OPERATOR.split(prompt)
    if not rest and not _TO.search(prompt):
        return (Part(prompt),)
    found = [_part(prompt, first, "")]
    for operator, text in zip(rest[::2], rest[1::2], strict=True):
        found.append(_part(prompt, text, operator))
    return tuple(found)


def _part(prompt: str, text: str, operator: str) -> Part:
    """The part behind an operator; "" for the first."""
    match = _NUMBER.search(text)
    number = None if match is None else _number(prompt, match[1])
    text = (text if match is None else text[: match.start()]).strip()
    if operator and not text:
        raise ValueError(f"prompt {prompt!r}: no text follows {operator}; write and, not in small letters as words")
    first, *others = _TO.split(text)
    if others:
        if len(others) > 1 or operator.endswith("NOT") or number is None or number > 1:
            raise ValueError(f"prompt {prompt!r}: write a mixture as A TO B :0.3, with a number from 0 to 1")
        return Part(first.strip(), towards=others[0].strip(), amount=number)
    if number is not None and not operator:
        raise ValueError(
            f"prompt {prompt!r}: the weight of the first text is the guidance scale; leave out :{number:g}"
        )
    weight = 1.0 if number is None else number
    return Part(text, -weight if operator.endswith("NOT") else weight)


def _number(prompt: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 100:
        raise ValueError(f"prompt {prompt!r}: {text!r} is not a number from 0 on; write AND TEXT :0.5")
    return number


def composed(prompt: str, also: Sequence[str] = (), without: Sequence[str] = ()) -> str:
    """The prompt with further texts to go to (``also``) and to go away from (``without``). Raises ValueError."""
    text = "".join([prompt, *(f" AND {one.strip()}" for one in also), *(f" NOT {one.strip()}" for one in without)])
    parts(text)
    return text


def texts_of(prompt: str) -> tuple[str, ...]:
    """All texts of a prompt that the text encoder reads. Raises ValueError."""
    return tuple(text for part in parts(prompt) for text in part.texts)


def wanted(prompt: str) -> str:
    """What a prompt asks for: its texts without those that it goes away from."""
    return ", ".join(text for part in parts(prompt) if part.weight > 0 for text in part.texts)


def check_composed(prompt: str, settings: SamplingSettings, accelerated: bool = False) -> int:
    """The number of texts that are added or subtracted, each a network call in every step.

    Raises ValueError, in one line, for a prompt that cannot be read and for settings that cannot compose."""
    further = len(parts(prompt)) - 1
    if not further:
        return 0
    if not METHODS[settings.method].composes:
        able = ", ".join(name for name, method in METHODS.items() if method.composes)
        raise ValueError(f"prompt {prompt!r}: method {settings.method} reads one text; AND and NOT need one of {able}")
    if settings.guidance_scale <= 1:
        raise ValueError(
            f"prompt {prompt!r}: AND and NOT need a guidance scale above 1, not {settings.guidance_scale:g}"
        )
    if accelerated:
        raise ValueError(f"prompt {prompt!r}: AND and NOT cannot be combined with generate.acceleration")
    return further
