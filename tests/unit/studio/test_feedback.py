"""Verdicts are a data set that the other commands read, and corrected regions move the threshold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from diffva_ray.cli import main
from diffva_ray.data.boxes import read_boxes
from diffva_ray.data.datasets import open_dataset
from diffva_ray.studio.feedback import save_verdict
from diffva_ray.studio.workspace import Question, Reply, Workspace


def diffva(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def workspace(model: Path, tmp_path: Path) -> Workspace:
    return Workspace(str(tmp_path / "studio"), str(model), "cpu")


def ask(workspace: Workspace, path: Path) -> Reply:
    return workspace.ask(Question(path.name, path.read_bytes(), "", ("generate.strength=1.0",)))


def region(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((512, 512), bool)
    mask[rows, columns] = True
    return mask


def test_a_verdict_is_a_row_with_mask_and_box(workspace: Workspace, images: Path) -> None:
    paths = sorted((images / "COVID" / "images").iterdir())[:2]
    Image.open(paths[0]).resize((64, 40)).save(paths[0].parent.parent / "wide.png")
    wide = paths[0].parent.parent / "wide.png"
    try:
        replies = [ask(workspace, wide), ask(workspace, paths[1])]
    finally:
        wide.unlink()
    save_verdict(workspace, replies[0], "accepted", "COVID", None)
    save_verdict(workspace, replies[1], "rejected", "=cmd()", None)
    manifest = save_verdict(workspace, replies[0], "rejected", "COVID", region(slice(128, 256), slice(256, 512)))
    rows = pd.read_csv(manifest, keep_default_na=False)
    assert rows["verdict"].tolist() == ["rejected", "rejected"], "the later verdict replaces the earlier"
    assert rows["record_id"].tolist() == [replies[1].record["record_id"], replies[0].record["record_id"]]
    dataset = open_dataset(manifest)
    (first,) = (image for image in dataset.images if image.lesion_mask)
    mask = np.asarray(Image.open(Path(dataset.store.uri) / first.lesion_mask)) > 0
    assert mask.shape == (40, 64)
    assert mask[10:20, 32:].all()
    assert mask.sum() == 10 * 32
    boxes = read_boxes((Path(manifest).parent / "boxes.csv").read_bytes(), dataset.images)
    (box,) = boxes[first.path]
    assert (box.x, box.y, box.w, box.h) == (32, 10, 32, 10)
    assert "'=cmd()" in rows["label"].tolist(), "a spreadsheet must not execute a label"


def test_corrected_regions_change_threshold_and_dice(workspace: Workspace, images: Path, model: Path) -> None:
    """Regions where the map is strong move the best threshold away from the one for the phantoms' own lesions, and
    the fixed Dice of another run with it."""
    paths = sorted((images / "COVID" / "images").iterdir())
    for path in paths[:3]:
        reply = ask(workspace, path)
        strongest = np.abs(reply.images.signed_map)
        save_verdict(workspace, reply, "rejected", "COVID", strongest > np.quantile(strongest, 0.9))
    root = Path(workspace.uri).parent
    common = ("--model", model, "--executor", "inline", "--strength", 1)
    diffva(
        "generate", "--data", Path(workspace.uri) / "feedback" / "manifest.csv", "--out", root / "corrected", *common
    )
    diffva("generate", "--data", images, "--out", root / "run", *common)
    thresholds = {}
    for name in ("corrected", "run"):
        diffva("reduce", root / name, "--executor", "inline")
        thresholds[name] = json.loads((root / name / "tables" / "thresholds.json").read_text())["absolute"]
    assert thresholds["corrected"] != pytest.approx(thresholds["run"], rel=0.05)
    dice = {}
    for name in ("corrected", "run"):
        diffva("reduce", root / "run", "--executor", "inline", "--threshold-from", root / name)
        rows = json.loads((root / "run" / "tables" / "localization.json").read_text())["rows"]
        row = next(row for row in rows if row["map"] == "absolute" and row["label"] == "all")
        assert row["threshold"] == pytest.approx(thresholds[name])
        dice[name] = row["dice_fixed"]
    assert dice["corrected"] != dice["run"]
