"""Replaces the names of files in what leaves a run, because names of files may be names of patients."""

from __future__ import annotations

import re
from typing import Any, cast

from diffva_ray.config.stages import CONDITION
from diffva_ray.generate.run import Run
from diffva_ray.schema import Record, digest

FILES = ("image_path", "lung_mask_path", "lesion_mask_path", "ground_truth_path")
EXAMPLE = re.compile(r" \(first: .*?\)(?=[;,.]|$)")  # of a note that names a file


def image_id(path: str) -> str:
    """The id of an image: a digest, from which nobody reads the name; who knows the name can find the image."""
    return f"image-{digest(path)[:12]}"


def without_names(run: Run, record: Record) -> Record:
    """A record with ids for its image and masks, and without what the data set's further columns say; a reason that
    names a file is cut to the status."""
    values: dict[str, Any] = {**record, **dict.fromkeys(run.about.get("columns", ()))}
    paths = {key: values[key] for key in FILES if isinstance(values[key], str) and values[key]}  # NaN in a data frame
    values |= {key: image_id(path) for key, path in paths.items()}
    conditions = [str(value) for column, value in record.items() if column.startswith(CONDITION) and value]
    if any(path.rpartition("/")[2] in str(values["error"]) for path in (*paths.values(), *conditions)):
        values["error"] = values["status"]
    return cast("Record", values)


def without_examples(notes: list[str]) -> list[str]:
    """Notes without the file that they name as the first one."""
    return [EXAMPLE.sub("", note) for note in notes]
