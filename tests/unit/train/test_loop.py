"""The loop: what it trains moves, and a killed training ends with the same weights as an undisturbed one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffva_ray.config import Recipe, make_recipe
from diffva_ray.model.bundle import build, load
from diffva_ray.train.loop import keep_checkpoints, latest_checkpoint, train


class Killed(Exception):
    pass


def weights(folder: Path) -> dict[str, torch.Tensor]:
    parts = ("vae", "unet", "text_encoder", "judge")
    return {
        f"{part}.{name}": value
        for part in parts
        for file in (folder / part).glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def test_every_network_moved(tiny: Recipe, model: Path) -> None:
    start, trained = build(tiny), load(str(model))
    for name in ("vae", "unet", "text_encoder"):
        before, after = start.modules[name].state_dict(), trained.modules[name].state_dict()
        moved = [key for key in before if not torch.equal(before[key], after[key])]
        assert len(moved) > 0.9 * len(before), name
    assert trained.vae.config.scaling_factor != start.vae.config.scaling_factor
    history = json.loads((model / ".train" / "progress.json").read_text())["history"]
    assert [entry["stage"] for entry in history] == ["autoencoder", "joint", "judge"]


@pytest.mark.parametrize("kill_at", range(1, 6))
def test_killed_and_resumed_is_bitwise_the_undisturbed_run(
    kill_at: int, tiny: Recipe, films: Path, model: Path, tmp_path: Path
) -> None:
    """Killed right after its ``kill_at``-th checkpoint, in the middle of stages and between them."""
    out = tmp_path / "model"
    keep = keep_checkpoints(out / ".train", 2)
    seen = 0

    def dying(metrics: dict[str, float], folder: Path | None) -> None:
        nonlocal seen
        keep(metrics, folder)
        seen += 1
        if seen == kill_at:
            raise Killed

    with pytest.raises(Killed):
        train(tiny, str(films), str(out), "tiny", {}, dying, threads=1)
    torch.manual_seed(999)  # the resumed process comes with another random state
    train(tiny, str(films), str(out), "tiny", {}, keep, latest_checkpoint(out / ".train"), threads=1)
    undisturbed, resumed = weights(model), weights(out)
    assert undisturbed.keys() == resumed.keys()
    assert [name for name in undisturbed if not torch.equal(undisturbed[name], resumed[name])] == []
    assert load(str(model)).digest == load(str(out)).digest


def test_prior_preservation_and_min_snr_train(tiny: Recipe, films: Path, tmp_path: Path) -> None:
    values = tiny.model_dump(mode="json")
    stage = values["train"]["stages"][1]
    stage |= {"classes": {"COVID": 1}, "prior_class": "Normal", "snr_gamma": 5.0, "steps": 1}
    values["train"]["stages"] = [stage]
    train(make_recipe(values), str(films), str(tmp_path / "m"), "x", {}, keep_checkpoints(tmp_path / "c", 1), threads=1)
    assert load(str(tmp_path / "m")).digest
