"""Damaged checkpoints are passed over, and a failed training does not block the corrected one."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffva_ray.cli import main
from diffva_ray.config.recipe import Recipe, to_yaml
from diffva_ray.model.card import UnusableModel
from diffva_ray.train.checkpoint import Checkpoints


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("name", ["unet.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(name: str, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model / ".train", tmp_path / "kept")
    checkpoints = Checkpoints(tmp_path / "kept", 2)
    newest = checkpoints.latest()
    assert newest is not None
    truncate(newest / name)
    before = checkpoints.latest()
    assert before is not None
    assert before.name < newest.name
    truncate(before / name)
    with pytest.raises(UnusableModel, match="no checkpoint there is sound"):
        checkpoints.latest()


def test_a_training_that_failed_at_once_leaves_no_block(images: Path, tiny: Recipe, tmp_path: Path) -> None:
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "model"
    recipe.write_text(to_yaml(tiny))
    words = ["train", "--data", str(images), "--out", str(out), "--recipe", str(recipe), "--executor", "inline"]
    wrong = [*words, "--set", "model.resolution=36"]
    dry, real = CliRunner().invoke(main, [*wrong, "--dry-run"]), CliRunner().invoke(main, wrong)
    assert dry.exit_code == real.exit_code == 2
    assert dry.stderr.splitlines()[-1] == real.stderr.splitlines()[-1]
    assert CliRunner().invoke(main, [*words, "--dry-run"]).exit_code == 0
    assert not (out / ".train/training.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("full", ["TMPDIR", "--out"])
def test_a_full_disk_ends_a_training_with_one_line(
    full: str, small_disk: Path, images: Path, tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "model" if full == "TMPDIR" else small_disk / "model"
    recipe.write_text(to_yaml(tiny))
    words = ["train", "--data", str(images), "--out", str(out), "--recipe", str(recipe), "--executor", "inline"]
    with monkeypatch.context() as patch:
        if full == "TMPDIR":
            patch.setattr(tempfile, "tempdir", str(small_disk))
        ended = CliRunner().invoke(main, words)
    assert ended.exit_code == 5, ended.output
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("diffva train: ")
    assert str(small_disk) in last
    assert len(last) < 500
    assert not [file for file in small_disk.rglob("*.safetensors") if full == "TMPDIR"]
    if full == "TMPDIR":
        assert CliRunner().invoke(main, words).exit_code == 0, "with space, the same command goes on"
