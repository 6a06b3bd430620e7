"""Checkpoints by time, written while the steps go on; an export that reads no image; state of the gradient scaler."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from trainings import different, killed, run, weights, with_stages

from diffva_ray.config.recipe import Recipe
from diffva_ray.model.bundle import load
from diffva_ray.model.card import UnusableModel
from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.store import StoreError
from diffva_ray.train import loop, saving, training_step
from diffva_ray.train.checkpoint import Checkpoints, read_state

STAGE = {"name": "joint", "trains": "denoiser", "steps": 4, "batch_size": 2, "learning_rate": 1e-3}
PARTS = ("vae", "unet", "text_encoder")
Steps = Callable[[Callable[[int], None]], None]


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Call a function with the number of every step that begins, counted from 0."""

    def watch(seen: Callable[[int], None]) -> None:
        rate, count = training_step.learning_rate, iter(range(1000))

        def counted(*arguments: Any) -> float:
            seen(next(count))
            return rate(*arguments)

        monkeypatch.setattr(training_step, "learning_rate", counted)

    return watch


def test_checkpoints_come_by_time(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    kept: list[tuple[float, float]] = []

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        kept.append((metrics["stage_index"], metrics["step"]))

    for minutes, expected in ((1e-9, [(0, 1), (0, 2), (0, 3), (1, 0)]), (60, [(1, 0)])):
        kept.clear()
        recipe = with_stages(tiny, STAGE, checkpoint_every=None, checkpoint_minutes=minutes)
        loop.train(recipe, str(images), str(tmp_path), fingerprint="x", provenance={}, report=report, threads=1)
        assert kept == expected


def test_steps_go_on_while_a_checkpoint_is_written(
    tiny: Recipe, images: Path, tmp_path: Path, at_step: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint, after two steps, can only be written once the fourth step has begun."""
    gone_on, write, late = threading.Event(), saving.save_checkpoint, list[bool]()

    def slow(*arguments: Any) -> None:
        late.append(gone_on.wait(60))
        write(*arguments)

    monkeypatch.setattr(saving, "save_checkpoint", slow)
    at_step(lambda step: gone_on.set() if step == 3 else None)
    recipe = with_stages(tiny, {**STAGE, "ema_decay": 0.9}, checkpoint_every=2)
    run(recipe, images, tmp_path / "late")
    assert late == [True, True]
    monkeypatch.undo()
    # what was written is the state of the second step, not that of the fourth
    run(with_stages(tiny, {**STAGE, "ema_decay": 0.9}, checkpoint_every=2), images, tmp_path / "plain")
    late_one, plain = (sorted((tmp_path / name / ".train").glob("checkpoint-00-*"))[0] for name in ("late", "plain"))
    assert read_state(late_one).files == read_state(plain).files


def test_a_training_killed_while_it_writes_resumes_from_the_checkpoint_before(
    tiny: Recipe, images: Path, tmp_path: Path, at_step: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_stages(tiny, {**STAGE, "steps": 6}, checkpoint_every=2)
    run(recipe, images, tmp_path / "whole")

    dead, write = threading.Event(), saving.save_checkpoint

    def torn(folder: Path, state: Any, *rest: Any) -> None:
        if state.step == 4:
            dead.wait(60)  # until the step after it has failed
        write(folder, state, *rest)

    def die(step: int) -> None:
        if step == 5:
            dead.set()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_checkpoint", torn)
        at_step(die)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, images, tmp_path / "killed")
    monkeypatch.undo()
    newest = Checkpoints(tmp_path / "killed/.train", 2).latest()
    assert newest is not None
    assert newest.name == "checkpoint-00-0000002"
    assert not list((tmp_path / "killed").rglob(".tmp-*"))
    run(recipe, images, tmp_path / "killed")
    assert different(*(weights(tmp_path / name, *PARTS) for name in ("whole", "killed"))) == []


def test_a_checkpoint_that_cannot_be_written_ends_the_training(
    tiny: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise StoreError("no space")

    monkeypatch.setattr(saving, "save_checkpoint", full)
    with pytest.raises(StoreError, match="no space"):
        run(with_stages(tiny, STAGE, checkpoint_every=1), images, tmp_path)


@pytest.mark.parametrize("label", ["Normal", "*"])
def test_the_export_reads_no_image(
    label: str, tiny: Recipe, images: Path, tmp_path: Path, at_step: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 6 and of 24 images, four are trained on; the other workers wait for the export, for half an hour at most."""
    for path in images.glob(f"{label}/images/*.png"):
        (copy := tmp_path / "data" / path.relative_to(images)).parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    read, reads, counting = LocalStore.read, list[str](), threading.Event()

    def counted(store: LocalStore, path: str) -> bytes:
        if counting.is_set() and path.endswith(".png"):
            reads.append(path)
        return read(store, path)

    monkeypatch.setattr(LocalStore, "read", counted)
    at_step(lambda step: counting.set() if step == 1 else None)  # the last one, whose images are read already
    stage = {**STAGE, "steps": 2, "classes": {"Normal": 1}}
    run(with_stages(tiny, stage, cache_megabytes=0), tmp_path / "data", tmp_path / "model")
    assert counting.is_set()
    assert reads == []
    card = json.loads((tmp_path / "model/diffva.json").read_text())
    assert len(card["training_images"]) == 4


def test_a_resumed_training_knows_the_images_that_were_read_before(
    tiny: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_stages(tiny, STAGE, checkpoint_every=2, cache_megabytes=0)
    run(recipe, images, tmp_path / "whole")
    killed(recipe, images, tmp_path / "killed", 3, monkeypatch)
    run(recipe, images, tmp_path / "killed")
    whole, resumed = (
        json.loads((tmp_path / name / "diffva.json").read_text())["training_images"] for name in ("whole", "killed")
    )
    assert len(whole) == 8  # four steps of two images
    assert resumed == whole


def test_the_gradient_scaler_resumes(
    tiny: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16's scaler, on the CPU: its scale doubles after every second step, over both stages."""

    class Scaled(Accelerator):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)

    monkeypatch.setattr(loop, "Accelerator", Scaled)
    recipe = with_stages(tiny, STAGE, {**STAGE, "name": "second"}, checkpoint_every=1)
    run(recipe, images, tmp_path / "whole")
    killed(recipe, images, tmp_path / "killed", 5, monkeypatch)
    run(recipe, images, tmp_path / "killed")
    whole, resumed = (read_state(tmp_path / name / ".train/checkpoint-02-0000000") for name in ("whole", "killed"))
    assert whole.scaler["scale"] == 2.0 ** (8 + 4)
    assert resumed.scaler == whole.scaler
    assert load(str(tmp_path / "whole")).digest == load(str(tmp_path / "killed")).digest


def test_checkpoints_leave_out_what_is_not_trained(
    tiny: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_stages(tiny, STAGE, checkpoint_every=1)
    run(recipe, images, tmp_path / "whole")
    killed(recipe, images, tmp_path / "killed", 3, monkeypatch)
    latest = Checkpoints(tmp_path / "killed/.train", 2).latest()
    assert latest is not None
    assert not (latest / "vae.safetensors").exists()
    assert (latest / "unet.safetensors").exists()
    file = latest / "state.json"
    before = file.read_text()

    # On another base model it is refused; on the same one the training goes on, bit for bit.
    state = json.loads(before)
    file.write_text(json.dumps({**state, "unchanged": {**state["unchanged"], "vae": "0" * 64}}))
    with pytest.raises(UnusableModel, match=r"the base model has other weights \(vae\)"):
        run(recipe, images, tmp_path / "killed")
    file.write_text(before)
    run(recipe, images, tmp_path / "killed")
    assert load(str(tmp_path / "whole")).digest == load(str(tmp_path / "killed")).digest
