"""The scripts for a bare GPU machine, on this one: every section with toy networks, and a training in two legs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffva_ray.config.recipe import Recipe, to_yaml
from diffva_ray.model.bundle import load

ROOT = Path(__file__).parents[2]
SECTIONS = ["setup", "ceilings", "correctness", "networks", "images", "worker", "training"]


def run(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_every_section_runs_with_toy_networks(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    run("benchmarks/gpu.py", "--device", "cpu", "--tiny", "--model", model, "--out", out)
    found = json.loads(out.read_text())
    assert found["finished"]
    assert list(found["sections"]) == SECTIONS
    failed = [row for section in found["sections"].values() for row in section["rows"] if "failed" in row]
    assert [row for row in failed if "attention" not in row["name"]] == []  # two of its backends are a GPU's
    assert not any("failed" in section for section in found["sections"].values())
    rows = {row["name"]: row for section in found["sections"].values() for row in section["rows"]}
    assert rows["sdedit, bfloat16"]["auroc"] is not None
    assert rows["compiled, warm cache"]["sha256"] == rows["compiled, cold cache"]["sha256"][:1]
    assert rows["run_shard, 4 steps, micro-batch 2"]["ok"] == 4
    left_out = [gap for section in found["sections"].values() for gap in section["left_out"]]
    assert not any("no time left" in gap or "stopped" in gap for gap in left_out)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_two_legs_end_with_the_weights_of_one_training(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    recipe, pack, script = tmp_path / "tiny.yaml", tmp_path / "pack.zip", "benchmarks/gpu_train.py"
    recipe.write_text(to_yaml(tiny))
    run(script, "pack", "--data", images, "--side", 32, "--out", pack)
    train = (script, "train", "--pack", pack, "--recipe", recipe, "--threads", 1)
    run(*train, "--out", tmp_path / "whole")
    run(*train, "--out", tmp_path / "leg1", "--seconds", 1)  # it ends at the first checkpoint
    first = json.loads((tmp_path / "leg1/leg.json").read_text())
    assert (first["finished"], first["reached"]) == (False, "checkpoint-00-0000002")
    run(*train, "--from", tmp_path / "leg1", "--out", tmp_path / "leg2", "--seconds", 1)
    run(*train, "--from", tmp_path / "leg2", "--out", tmp_path / "leg3")
    last, whole = (json.loads((tmp_path / name / "leg.json").read_text()) for name in ("leg3", "whole"))
    assert (last["finished"], last["leg"]) == (True, 3)
    assert last["model_digest"] == whole["model_digest"]
    assert [entry["loss"] for entry in last["history"]] == [entry["loss"] for entry in whole["history"]]
    run(script, "unpack", "--from", tmp_path / "leg3", "--to", tmp_path / "model")
    assert load(str(tmp_path / "model")).digest == whole["model_digest"]
