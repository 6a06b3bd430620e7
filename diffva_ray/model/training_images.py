"""Tells which images a model was trained on, because scores on them do not show how the model does on new images.

``diffva.json`` lists the sha256 of every training file. An image that was saved again has another hash.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from diffva_ray.model.card import read_card
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import StoreError

IMAGE_DIGITS = 16  # hex digits of each sha256 (64 bits); a collision among a million images has probability 3e-8


@dataclass(frozen=True)
class TrainingImages:
    """The list ``training_images`` in a model's ``diffva.json``."""

    hashes: frozenset[str]  # the first IMAGE_DIGITS digits of each sha256

    @classmethod
    def of_model(cls, uri: str, digest: str | None = None) -> TrainingImages | None:
        """The list of the model at ``uri``; None when the model has none, was deleted, or has another digest than
        ``digest``."""
        try:
            card = read_card(open_store(uri))
        except (OSError, ValueError, StoreError):
            return None
        return None if digest is not None and (card or {}).get("digest") != digest else cls.of(card)

    @classmethod
    def of(cls, card: dict[str, Any] | None) -> TrainingImages | None:
        """The list in a card; None without one (a model from elsewhere, or of an earlier version)."""
        hashes = (card or {}).get("training_images")
        return None if hashes is None else cls(frozenset(hashes))

    def holds(self, data: bytes) -> bool:
        """Whether the model was trained on a file with these bytes."""
        return self.has(hashlib.sha256(data).hexdigest())

    def has(self, sha256: str | None) -> bool:
        """Whether the model was trained on the file with this sha256 (hex); False without one (a file not read)."""
        return bool(sha256) and str(sha256)[:IMAGE_DIGITS] in self.hashes
