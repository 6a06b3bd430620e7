"""Which images a model was trained on, by content: a score on those says nothing about images it has not seen.

The list is part of ``diffva.json``; images are known by the bytes of their files, so an image saved anew is another
one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from diffva_ray.model.card import read_card
from diffva_ray.storage.store import StoreError, open_store

IMAGE_DIGITS = 16  # of sha256 kept for each image: 64 bits, so a million images meet another one with odds of 1e-7


@dataclass(frozen=True)
class TrainingImages:
    """The list in a model's ``diffva.json`` (``training_images``)."""

    hashes: frozenset[str]

    @classmethod
    def of_model(cls, uri: str, digest: str | None = None) -> TrainingImages | None:
        """The list of the model at ``uri``; None without one, when there is no such model any more, or when it is not
        the one of that ``digest``."""
        try:
            card = read_card(open_store(uri))
        except (OSError, ValueError, StoreError):
            return None
        return None if digest is not None and (card or {}).get("digest") != digest else cls.of(card)

    @classmethod
    def of(cls, card: dict[str, Any] | None) -> TrainingImages | None:
        """The card's list; None for a model that has none (made elsewhere, or before lists were kept)."""
        listed = (card or {}).get("training_images")
        return None if listed is None else cls(frozenset(listed))

    def holds(self, data: bytes) -> bool:
        """Whether the file with these bytes was trained on."""
        return self.has(hashlib.sha256(data).hexdigest())

    def has(self, sha256: str | None) -> bool:
        """Whether the file with this sha256 (hex) was trained on; an image without one (not read) was not."""
        return bool(sha256) and str(sha256)[:IMAGE_DIGITS] in self.hashes
