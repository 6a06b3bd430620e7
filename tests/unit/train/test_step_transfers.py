"""No training step makes the CPU wait for the GPU: its inputs are made ahead and copied without a wait."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from trainings import with_stages
from transfers import GPU, Transfers

from diffva_ray.config.recipe import Recipe
from diffva_ray.data.datasets import open_dataset
from diffva_ray.model.bundle import build
from diffva_ray.storage.local import LocalStore
from diffva_ray.train import training_step
from diffva_ray.train.ahead import Ahead, inputs_of
from diffva_ray.train.kinds import make_stage
from diffva_ray.train.sampling import ImageSet
from diffva_ray.train.stage import StageContext, Worker

COMMON = {"name": "stage", "steps": 16, "batch_size": 4, "learning_rate": 1e-3}
DENOISER = {**COMMON, "trains": "denoiser", "ema_decay": 0.9, "prompt_dropout": 0.3}
STAGES = {
    "autoencoder": {**COMMON, "trains": "autoencoder", "adversarial_weight": 0.5, "perceptual_weight": 0.5},
    "denoiser": {**DENOISER, "snr_gamma": 5.0},
    "denoiser in shares": {**DENOISER, "micro_batch_size": 3},
    "denoiser with a class set": {**DENOISER, "classes": {"COVID": 1}, "prior_class": "Normal"},
    "denoiser with pairs": {**DENOISER, "pairs": 0.8},
    "controlnet": {**COMMON, "trains": "controlnet"},
    "classifier": {**COMMON, "trains": "classifier"},
    "judge": {**COMMON, "trains": "judge"},
    "healthy-unet": {**COMMON, "trains": "healthy-unet"},
    "textual-inversion": {**COMMON, "trains": "textual-inversion"},
    "image-classifier": {**COMMON, "trains": "image-classifier"},
    "va-gan": {**COMMON, "trains": "va-gan"},
    "vant-gan": {**COMMON, "trains": "vant-gan"},
    "ant-gan": {**COMMON, "trains": "ant-gan"},
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device as Accelerate's; it has neither AdamW's fused kernel, which copies nothing, nor autocast."""
    monkeypatch.setattr(Accelerator, "device", property(lambda self: GPU))
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())
    adamw = torch.optim.AdamW

    def unfused(*arguments: Any, fused: bool, **options: Any) -> torch.optim.AdamW:
        return adamw(*arguments, **options)

    monkeypatch.setattr(torch.optim, "AdamW", unfused)


def transfers_of(recipe: Recipe, images: Path, folder: Path, kept: int, steps: int) -> Counter[str]:
    """Transfers of the first steps of a recipe's stage, apart from what the very first one copies once."""
    (config,) = recipe.train.stages
    bundle, image_set = build(recipe), ImageSet(open_dataset(images), recipe.model.resolution)
    stage = make_stage(StageContext(bundle, image_set, 0, LocalStore(str(folder)), kept), config)
    accelerator = Accelerator(cpu=True)
    for module in bundle.modules.values():
        module.to(GPU).requires_grad_(False)
    stage.begin(Worker(GPU))
    with Transfers():
        stage.fill(GPU)
    trainables = [
        training_step.prepare_trainable(recipe.train, accelerator, config, trainable) for trainable in stage.trainables
    ]
    counts = Counter[str]()
    with Ahead(inputs_of(0, config, stage.trainables), range(steps + 1), GPU) as ahead:
        for step, inputs in ahead:
            with Transfers() as transfers:
                for trainable, shares in zip(trainables, inputs, strict=True):
                    training_step.train_step(accelerator, config, trainable, step, shares)
            if step:
                counts.update(transfers.counts)
    return counts


READ_FROM_MEMORY = ("denoiser", "classifier", "judge")  # latents and reconstructions; the others make them in each step


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("name", "kept"), [*((name, 0) for name in STAGES), *((name, 100) for name in READ_FROM_MEMORY)]
)
def test_no_step_waits(name: str, kept: int, tiny: Recipe, images: Path, tmp_path: Path) -> None:
    counts = transfers_of(with_stages(tiny, STAGES[name]), images, tmp_path, kept, steps=2)
    assert set(counts) == {"to the GPU, without a wait"}
