"""A run for a notebook: its records as a data frame."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pandas as pd

from diffva_ray.evaluate.records import RecordImages, read_images, read_records
from diffva_ray.generate import run as runs


class OpenRun(runs.Run):
    """A ``Run`` with its records and their images. ``len`` is the number of planned records; iteration yields the
    committed ones as dictionaries."""

    def records(self) -> pd.DataFrame:
        """Read all committed records; see ``read_records``.

        Returns:
            A row for each record, in plan order.

        Raises:
            StoreError: The store fails.
        """
        return read_records(self)

    def images(self, record: dict[str, Any] | pd.Series[Any]) -> RecordImages:
        """Read the images of a record; see ``read_images``.

        Args:
            record: A row of ``records()``, or an item of the iteration.

        Returns:
            The images as stored.

        Raises:
            BadImage: The record has no images, or a file is damaged.
        """
        return read_images(self, dict(record))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return int(self.about["records"])

    def __iter__(self) -> Iterator[dict[Any, Any]]:
        return iter(self.records().to_dict("records"))

    def __repr__(self) -> str:
        recipe, method = self.about["recipe"]["name"], self.about["recipe"]["generate"]["method"]
        done = f"{len(self.done())} of {self.shards} shards committed"
        return f"run {self.store.uri}: {len(self)} records, {done}; recipe {recipe}, method {method}"


def open_run(uri: str | os.PathLike[str]) -> OpenRun:
    """Open an existing run for reading.

        >>> run = open_run("runs/demo/run")
        >>> len(run) == len(run.records())
        True

    Args:
        uri: A folder or an address such as ``s3://bucket/runs/first``.

    Returns:
        The run; nothing is written.

    Raises:
        UnusableData: No run was planned there, ``run.json`` is damaged, or the scheme of ``uri`` is unknown.
        StoreError: The store fails.
    """
    run = runs.open_run(os.fspath(uri))
    return OpenRun(run.store, run.about)
