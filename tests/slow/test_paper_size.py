"""Stable Diffusion v1.4's own configuration with a BERT-base encoder, randomly initialised, 512 px: one training step
and a two-step generation of two films on whatever machine this is. Minutes, and about 20 GB of memory on a CPU.

    make slow
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from diffva_ray.config import Recipe, load_recipe, make_recipe
from diffva_ray.data.phantoms import phantom_set
from diffva_ray.generate.plan import Request
from diffva_ray.pipeline import Execution, generate_run
from diffva_ray.storage import LocalStore
from diffva_ray.train.loop import train

# CompVis/stable-diffusion-v1-4: vae/config.json and unet/config.json; BERT-base is transformers' default BertConfig
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def paper_sized() -> Recipe:
    """Recipe ``paper`` with the base's architecture in the place of its weights, and one step."""
    values = load_recipe("paper").model_dump(mode="json")
    values["model"] |= {"base": None, "text_encoder": None, "vae": VAE, "unet": UNET, "text": {}}
    stage = {**values["train"]["stages"][0], "steps": 1, "batch_size": 1}
    values["train"] |= {"stages": [stage], "mixed_precision": "bf16", "gradient_checkpointing": True}
    values["generate"] |= {"num_inference_steps": 2, "strength": 1.0, "micro_batch": 1, "cpu_threads": 2}
    return make_recipe(values)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_step_and_two_films_at_full_size(tmp_path: Path) -> None:
    recipe = paper_sized()
    for _ in phantom_set(LocalStore(str(tmp_path / "films")), 4, 512, seed=1, classes=("Normal", "COVID")):
        pass
    model = tmp_path / "model"
    # no checkpoint is kept: 13 GB of optimizer state are not what this test is about
    train(recipe, str(tmp_path / "films"), str(model), "slow", {}, lambda metrics, folder: None)
    progress = json.loads((model / ".train" / "progress.json").read_text())
    assert progress["history"][0]["loss"] == pytest.approx(1.0, abs=0.3)  # an untrained network predicts no noise
    assert sum(file.stat().st_size for file in (model / "unet").glob("*.safetensors")) > 3e9

    run = tmp_path / "run"
    counts = generate_run(recipe, str(tmp_path / "films"), str(model), str(run), Request(limit=2), Execution("inline"))
    assert counts == {"shards": 1, "records": 2, "ok": 2}
    frame = pd.read_parquet(run / "records")
    assert (frame["ms_ssim_scales"] == 5).all()
    assert frame["ssim"].between(-1, 1).all()
