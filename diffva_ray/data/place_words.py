"""Words of a prompt for places in the lungs: what they ask for, where that is, and the prompt without them."""

from __future__ import annotations

import re

import numpy as np

from diffva_ray.config.prompts import wanted
from diffva_ray.data.places import SIDES, SIZES, ZONES, middle_of, zone_rows_of
from diffva_ray.schema import Mask

FACTORS = {"side": (*SIDES, "bilateral"), "zone": ZONES, "size": SIZES}
_SIDE, _ZONE = "|".join(SIDES), "|".join(ZONES)
# "in the left upper zone", "on the right", "of the left lung", "left", "bilateral"
_PLACE = re.compile(
    rf"\s*\b(?:(?:in|on|of)\s+(?:the\s+)?)?(?:(?:{_SIDE}|{_ZONE})\b\s*)+(?:zones?|lungs?|side)?(?!\w)|\s*\bbilateral\b",
    re.IGNORECASE,
)


def asked(prompt: str) -> dict[str, str]:
    """The factors that a prompt names, by name; one that it names in two ways (left and right) is left out."""
    words = set(re.findall(r"\w+", wanted(prompt).casefold()))
    named = {factor: [value for value in values if value in words] for factor, values in FACTORS.items()}
    return {factor: values[0] for factor, values in named.items() if len(values) == 1}


def place_mask(prompt: str, lungs: Mask) -> Mask:
    """The part of a lung mask [H, W] on the side and in the third that a prompt names; all of it for neither."""
    wishes, part = asked(prompt), np.array(lungs, np.bool_)
    left = np.arange(part.shape[1]) + 0.5 > middle_of(lungs)  # the patient's left is on the image's right
    if wishes.get("side") in SIDES:
        part &= left if wishes["side"] == "left" else ~left
    if "zone" in wishes:
        rows = zone_rows_of(wishes["zone"], lungs, len(part))
        part[: rows.start], part[rows.stop :] = False, False
    return part


def without_place(prompt: str) -> str:
    """The prompt without its words for side and zone.

    >>> without_place("severe Mass in the left upper zone, 60 year old woman")
    'severe Mass, 60 year old woman'
    >>> without_place("mild Mass on the left TO severe Mass on the left :0.3")
    'mild Mass TO severe Mass :0.3'
    """
    return re.sub(r"\s+(?=[\s,.;]|$)", "", _PLACE.sub(" ", prompt)).strip(" ,")
