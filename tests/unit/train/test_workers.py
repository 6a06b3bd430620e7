"""Several workers: the same losses as one worker with the same global batch, also when their number changes."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from trainings import weights

from diffva_ray.config.recipe import Recipe, make_recipe

WORKER = Path(__file__).with_name("workers.py")


@pytest.fixture(scope="module")
def recipe(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder with its adversary, then DreamBooth with prior preservation on a shared text encoder."""
    values = tiny.model_dump(mode="json")
    common = {"batch_size": 2, "learning_rate": 2e-4}
    values["train"] |= {
        "stages": [
            {"name": "vae", "trains": "autoencoder", "steps": 2, "perceptual_weight": 0.5, **common},
            {"name": "joint", "trains": "denoiser", "steps": 4, "classes": {"COVID": 1}, "prior_class": "Normal",
             "ema_decay": 0.9, "prompt_dropout": 0.3, **common},
        ],
        "log_every": 1,
        "checkpoint_every": 2,
    }  # fmt: skip
    make_recipe(values)
    file = tmp_path_factory.mktemp("recipe") / "recipe.json"
    file.write_text(json.dumps(values))
    return file


def run(world: int, recipe: Path, images: Path, out: Path) -> list[dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world), port, str(recipe), str(images), str(out)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(outputs)
    return json.loads((out / ".train/progress.json").read_text())["history"]


def weights_differ_by(one: Path, other: Path) -> float:
    ours, theirs = (weights(model, "vae", "unet", "text_encoder") for model in (one, other))
    assert ours.keys() == theirs.keys()
    return max((value - theirs[key]).abs().max().item() for key, value in ours.items())


def test_two_workers_with_batch_one_equal_one_with_batch_two(recipe: Path, images: Path, tmp_path: Path) -> None:
    one, two = run(1, recipe, images, tmp_path / "one"), run(2, recipe, images, tmp_path / "two")
    for name in ("loss", "grad_norm", "adversary_loss"):
        ours, theirs = ([entry[name] for entry in history if name in entry] for history in (one, two))
        assert theirs == pytest.approx(ours, rel=1e-5 if name != "grad_norm" else 1e-4), name
    assert weights_differ_by(tmp_path / "one", tmp_path / "two") < 2e-4  # AdamW's first steps are signs of gradients
    # resume from the middle of the second stage, on another number of workers
    shutil.copytree(tmp_path / "two/.train", tmp_path / "three/.train")
    checkpoint = sorted((tmp_path / "three/.train").glob("checkpoint-*"))
    assert [file.name for file in checkpoint] == ["checkpoint-01-0000002", "checkpoint-02-0000000"]
    shutil.rmtree(checkpoint[1])
    resumed = run(1, recipe, images, tmp_path / "three")
    assert [entry["loss"] for entry in resumed] == pytest.approx([entry["loss"] for entry in one], rel=1e-5)


def test_sharded_workers_give_the_same_training(recipe: Path, images: Path, tmp_path: Path) -> None:
    """FSDP on two workers: the losses and weights of one worker without; resumed, the same to the last bit."""
    values = json.loads(recipe.read_text())
    plain, shards = tmp_path / "plain.json", tmp_path / "shards.json"
    values["train"]["stages"][1] |= {"micro_batch_size": 1, "batch_size": 4}
    plain.write_text(json.dumps(values))
    values["train"]["sharding"] = "fsdp"
    shards.write_text(json.dumps(values))
    one, two = run(1, plain, images, tmp_path / "one"), run(2, shards, images, tmp_path / "two")
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        ours, theirs = ([entry[name] for entry in history if name in entry] for history in (one, two))
        assert theirs == pytest.approx(ours, rel=tolerance), name
    assert weights_differ_by(tmp_path / "one", tmp_path / "two") < 2e-4
    shutil.copytree(tmp_path / "two/.train", tmp_path / "again/.train")
    shutil.rmtree(tmp_path / "again/.train/checkpoint-02-0000000")  # from the middle of the sharded stage
    assert [entry["loss"] for entry in run(2, shards, images, tmp_path / "again")] == [entry["loss"] for entry in two]
    assert weights_differ_by(tmp_path / "two", tmp_path / "again") == 0
