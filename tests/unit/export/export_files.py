"""What tests of exports share: the command, and the files of runs and exports."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from diffva_ray.cli import main


def diffva(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def expected(run: Path) -> dict[str, dict[str, Any]]:
    """The ``ok`` records by id, with their images, read with Pillow."""
    records = pd.read_parquet(run / "records")
    data = run.parent / "data"
    found = {}
    for row in records[records["status"] == "ok"].to_dict("records"):
        levels = np.asarray(Image.open(run / row["attribution_path"])).astype(np.float64)
        found[row["record_id"]] = row | {
            "image": pixels((data / row["image_path"]).read_bytes()),
            "counterfactual": pixels((run / row["counterfactual_path"]).read_bytes()),
            "reconstruction": pixels((run / row["reconstruction_path"]).read_bytes()),
            "ground_truth": pixels((data / row["ground_truth_path"]).read_bytes()),
            "lesion_mask": pixels((data / row["lesion_mask_path"]).read_bytes()),
            "lung_mask": pixels((data / row["lung_mask_path"]).read_bytes()),
            "attribution": (levels - 32768) / 32767,
        }
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def header(out: Path) -> dict[str, Any]:
    _, text, _ = (out / "README.md").read_text().split("---\n", 2)
    content: dict[str, Any] = yaml.safe_load(text)
    return content
