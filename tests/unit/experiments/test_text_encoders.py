"""The comparison of text encoders runs from snapshots to its result, and continues."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import text_encoders
from click.testing import CliRunner, Result

sys.path.append(str(Path(__file__).parents[1] / "model"))

from hub_snapshots import snapshot

SCORES = {"auroc", "dice_best", "flip_rate", "lesion_error_left", "psnr_counterfactual"}


def test_it_compares_snapshots_and_continues(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot("radbert", tmp_path / "snapshots" / "radbert", 48)
    (tmp_path / "data").mkdir()
    (tmp_path / "model").symlink_to(model)
    for name in ("train", "validation"):
        (tmp_path / "data" / name).symlink_to(images)

    def compare(encoders: str) -> Result:
        return CliRunner().invoke(text_encoders.main, [
            "--demo", str(tmp_path), "--snapshots", str(tmp_path / "snapshots"), "--untrained", "--encoders", encoders,
            "--tokens", "32", "--quick", "--result", str(tmp_path / "result.json"),
        ])  # fmt: skip

    first = compare("radbert")
    assert first.exit_code == 0, first.output
    found = json.loads((tmp_path / "result.json").read_text())
    rows = {(row["training"], row["prompts"]): row for row in found["rows"]}
    assert set(rows) == {("frozen", "labels"), ("frozen", "sentences"), ("joint", "labels"), ("joint", "sentences")}
    assert all(set(row) >= SCORES and row["encoder"] == "radbert" for row in found["rows"])
    assert found["encoders"] == "snapshots of random weights"
    # each choice changes the counterfactuals
    assert len({row["psnr_counterfactual"] for row in rows.values()}) == 4
    # done rows are kept: nothing is trained again
    monkeypatch.setattr(text_encoders, "train", None)
    again = compare("radbert")
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == found["rows"]
