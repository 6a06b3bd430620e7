"""Stage ``classifier``: it learns from labels, does not change other networks, and resumes exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainings import different, killed, run, weights, with_stages

from diffva_ray.config.recipe import Recipe, RecipeError
from diffva_ray.model.bundle import build, load
from diffva_ray.train.latents import Latents

CLASSIFIER = {
    "name": "classifier", "trains": "classifier", "steps": 4, "batch_size": 6, "learning_rate": 3e-3,
    "block_out_channels": [8, 16], "norm_num_groups": 4, "ema_decay": 0.9,
}  # fmt: skip
JUDGE = {"name": "judge", "trains": "judge", "steps": 2, "batch_size": 4, "learning_rate": 1e-3}


@pytest.mark.parametrize("kill_at", [1, 3, 5])
def test_killed_and_resumed_is_bitwise_the_undisturbed_training(
    kill_at: int, tiny: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 0-3 are the classifier's, 4-5 the judge's: killed there, the finished classifier must be kept."""
    recipe = with_stages(tiny, CLASSIFIER, JUDGE, checkpoint_every=2)
    run(recipe, images, tmp_path / "whole")
    killed(recipe, images, tmp_path / "killed", kill_at, monkeypatch)
    run(recipe, images, tmp_path / "killed")
    whole, resumed = (weights(tmp_path / name, "classifier") for name in ("whole", "killed"))
    assert different(whole, resumed) == []
    assert load(str(tmp_path / "whole")).digest == load(str(tmp_path / "killed")).digest


def test_it_learns_and_does_not_change_other_networks(
    tiny: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It learns a label that the latents contain, through the noise; autoencoder and UNet keep their weights. The
    latents are made up, because those of an untrained autoencoder contain nothing."""

    def informative(self: Latents, indices: list[int]) -> dict[str, torch.Tensor]:
        signs = torch.tensor([1.0 if self.images.images[n].label == "COVID" else -1.0 for n in indices])
        mean = 10 * signs[:, None, None, None].expand(-1, 4, 8, 8)
        return {"mean": mean, "std": torch.full_like(mean, 0.1)}

    monkeypatch.setattr(Latents, "inputs", informative)
    stage = {**CLASSIFIER, "steps": 40, "batch_size": 8, "classes": {"Normal": 1, "COVID": 1}, "ema_decay": None}
    losses = [metrics["loss"] for metrics in run(with_stages(tiny, stage), images, tmp_path)]
    assert losses[-1] < 0.5 * losses[0]
    trained, start = load(str(tmp_path)), build(tiny)
    assert trained.extra("classifier").classes == ("COVID", "Normal")
    for name in ("vae", "unet", "text_encoder"):
        before, after = start.modules[name].state_dict(), trained.modules[name].state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before), name


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"classes": {"COVID": 1, "Lung_Opacity": 1}}, "healthy class 'Normal'"), ({"norm_num_groups": 5}, "divisible")],
)
def test_a_stage_that_cannot_be_built_is_named(
    change: dict, reason: str, tiny: Recipe, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=f"stage classifier: .*{reason}"):
        run(with_stages(tiny, {**CLASSIFIER, **change}), images, tmp_path)
