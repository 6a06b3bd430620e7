"""Stable Diffusion v1.4's own configuration with a BERT-base encoder, randomly initialised, 512 px: one training step
and a two-step generation of two images on whatever machine this is. Minutes, and about 20 GB of memory on a CPU.

    make slow
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from diffva_ray.config.recipe import load_recipe
from diffva_ray.data.phantoms import phantom_set
from diffva_ray.generate.plan import Request
from diffva_ray.storage.local import LocalStore
from diffva_ray.train.checkpoint import discard
from diffva_ray.train.loop import train
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run

ARCHITECTURE = Path(__file__).parents[2] / "benchmarks/sd14_random.yaml"
ONE_STEP = ("train.gradient_checkpointing=true", "generate.num_inference_steps=2", "generate.strength=1.0",
            "generate.micro_batch=1", "generate.cpu_threads=2")  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_step_and_two_images_at_full_size(tmp_path: Path) -> None:
    recipe = load_recipe(str(ARCHITECTURE), ONE_STEP)
    for _ in phantom_set(LocalStore(str(tmp_path / "images")), 4, 512, seed=1, classes=("Normal", "COVID")):
        pass
    model = tmp_path / "model"
    # no checkpoint is kept: 13 GB of optimizer state are not what this test is about
    train(recipe, str(tmp_path / "images"), str(model), fingerprint="slow", provenance={}, report=discard)
    progress = json.loads((model / ".train" / "progress.json").read_text())
    assert progress["history"][0]["loss"] == pytest.approx(1.0, abs=0.3)  # an untrained network predicts no noise
    assert sum(file.stat().st_size for file in (model / "unet").glob("*.safetensors")) > 3e9

    run = tmp_path / "run"
    counts = generate_run(
        recipe, str(tmp_path / "images"), str(model), str(run), Request(limit=2), Execution(executor="inline")
    )
    assert counts == {"shards": 1, "records": 2, "ok": 2}
    frame = pd.read_parquet(run / "records")
    assert (frame["ms_ssim_scales"] == 5).all()
    assert frame["ssim"].between(-1, 1).all()
