"""Reads the files of a run's data set, but none that was written since the run was planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from diffva_ray.storage.store import Modified, Store


@dataclass(frozen=True)
class PlannedFiles:
    """The data set's files as they were when the run was planned."""

    store: Store
    planned: float | None  # Unix time of planning; None: the times of the files do not tell, because they were copied

    @classmethod
    def of(cls, about: Mapping[str, Any], store: Store) -> PlannedFiles:
        """``about``: the content of ``run.json``. The times count if one of the sampled images has kept its own."""
        try:
            planned = datetime.fromisoformat(about["started"]).timestamp() + 1  # it has whole seconds
        except (LookupError, TypeError, ValueError):
            return cls(store, None)
        kept = any(_kept(store, path, planned) for path in about.get("data_sample", {}))
        return cls(store, planned if kept else None)

    def read(self, path: str) -> bytes:
        """Read a file. Raises Modified for one that was written since the run was planned, OSError, StoreError."""
        return self.store.read(path) if self.planned is None else self.store.read(path, self.planned)


def _kept(store: Store, path: str, planned: float) -> bool:
    try:
        store.read(path, planned)
    except (OSError, Modified):
        return False
    return True
