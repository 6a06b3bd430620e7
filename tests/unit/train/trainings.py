"""Helpers: run trainings in this process, complete or killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffva_ray.config.recipe import Recipe, make_recipe
from diffva_ray.train import loop, training_step
from diffva_ray.train.checkpoint import Checkpoints


class Killed(Exception):
    pass


def with_stages(recipe: Recipe, *stages: dict, **changes: object) -> Recipe:
    values = recipe.model_dump(mode="json")
    values["train"] |= {"stages": list(stages), "log_every": 1, **changes}
    return make_recipe(values)


def weights(folder: Path, *parts: str) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value
        for part in parts
        for file in (folder / part).glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the weights that are not bitwise the same."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def run(recipe: Recipe, images: Path, out: Path, **options: object) -> list[dict]:
    """Train, from the latest checkpoint if there is one; returns the history."""
    keep = Checkpoints(out / ".train", 2)
    settings = {"fingerprint": "x", "provenance": {}, "report": keep, "resume": keep.latest(), "threads": 1}
    loop.train(recipe, str(images), str(out), **settings, **options)
    return json.loads((out / ".train/progress.json").read_text())["history"]


def killed(recipe: Recipe, images: Path, out: Path, kill_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and raise before step ``kill_at``, counted over all stages; changes the global random state."""
    done, rate = 0, training_step.learning_rate

    def dying(*arguments: object) -> float:
        nonlocal done
        done += 1
        if done == kill_at + 1:
            raise Killed
        return rate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training_step, "learning_rate", dying)
        with pytest.raises(Killed):
            run(recipe, images, out)
    torch.manual_seed(999)
