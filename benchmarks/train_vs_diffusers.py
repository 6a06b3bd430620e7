"""Compare DreamBooth with prior preservation in diffusers' recipe and in ours, on one small CLIP model.

    python benchmarks/train_vs_diffusers.py [--size 64] [--steps 40] [--device cpu]

``script_loss`` and ``diffusers_curve`` repeat a step of examples/dreambooth/train_dreambooth.py with the same library
calls (the script itself needs a hub for its base and class images). Both sides see the same images, noise and initial
weights, so at equal settings their loss curves must agree; then ours runs with its recommended settings. Speeds are
ratios of medians from one process, one side after the other.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import DDPMScheduler
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from diffva_ray.config.recipe import Recipe, load_recipe, make_recipe
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.phantoms import phantom_set
from diffva_ray.model import text
from diffva_ray.model.bundle import Bundle, build, save
from diffva_ray.provenance import code_revision, version
from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.opening import open_store
from diffva_ray.train import loop, training_step
from diffva_ray.train.checkpoint import Checkpoints
from diffva_ray.train.denoiser import DenoiserStage
from diffva_ray.train.sampling import ImageSet, step_generator
from diffva_ray.train.stage import Batch, StageContext, Worker, three_channels

LEARNING_RATE, BATCH = 5e-4, 4
STAGE = {"name": "covid", "trains": "denoiser", "steps": 40, "batch_size": BATCH, "learning_rate": LEARNING_RATE,
         "classes": {"COVID": 1}, "prior_class": "Normal", "weight_decay": 0.01}  # fmt: skip


def small_clip_model(folder: Path, size: int) -> Recipe:
    """Write a diffusers folder with a random CLIP text encoder; return the recipe to train it.

    The VAE is as deep as Stable Diffusion's (8 pixels per latent).
    """
    scratch = load_recipe("phantom", [
        "name=clip-base", f"model.resolution={size}", "model.tokenizer_length=16", "model.attention_mask=false",
        "model.vae.block_out_channels=[16, 32, 32, 32]",
        "model.vae.down_block_types=[DownEncoderBlock2D, DownEncoderBlock2D, DownEncoderBlock2D, DownEncoderBlock2D]",
        "model.vae.up_block_types=[UpDecoderBlock2D, UpDecoderBlock2D, UpDecoderBlock2D, UpDecoderBlock2D]",
        "model.unet.block_out_channels=[32, 64]", f"model.unet.sample_size={size // 8}",
    ])  # fmt: skip
    bundle = build(scratch)
    torch.manual_seed(1)
    bundle.text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(bundle.tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=16,
        )
    )  # fmt: skip
    save(bundle, LocalStore(str(folder)), {})
    values = scratch.model_dump(mode="json")
    values["model"] = {"resolution": size, "base": str(folder), "tokenizer_length": 16}
    values["train"] = {"stages": [STAGE], "log_every": 1, "checkpoint_every": 100_000, "cache_latents": False}
    return make_recipe(values)


def script_loss(
    bundle: Bundle, noise_scheduler: Any, pixels: torch.Tensor, prompts: list[str], generator: torch.Generator
) -> torch.Tensor:
    """Compute the loss of train_dreambooth.py --train_text_encoder --with_prior_preservation.

    ``pixels`` are [2B, 3, H, W] in [-1, 1] with their ``prompts``, instances first.
    """
    device = pixels.device
    latents = bundle.vae.encode(pixels).latent_dist.sample(generator) * bundle.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator).to(device)
    steps = noise_scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, steps, (len(latents),), generator=generator).long().to(device)
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    ids, _ = text.tokenize(bundle.tokenizer, prompts)
    states = bundle.text_encoder(ids.to(device), attention_mask=None, return_dict=False)[0]
    prediction = bundle.unet(noisy, timesteps, states, return_dict=False)[0]
    prediction, prior_prediction = torch.chunk(prediction, 2, dim=0)
    target, prior_target = torch.chunk(noise, 2, dim=0)
    prior_loss = functional.mse_loss(prior_prediction.float(), prior_target.float(), reduction="mean")
    return functional.mse_loss(prediction.float(), target.float(), reduction="mean") + 1.0 * prior_loss


class DiffusersSide:
    """The script's step: both networks trainable, AdamW with its defaults, gradients clipped together."""

    def __init__(self, recipe: Recipe, images: ImageSet, device: torch.device) -> None:
        self.bundle, self.images, self.device = build(recipe), images, device
        for module in self.bundle.modules.values():
            module.to(device)
        self.bundle.vae.requires_grad_(False)
        unet, encoder = self.bundle.unet.train(), self.bundle.text_encoder.train()
        self.parameters = list(itertools.chain(unet.parameters(), encoder.parameters()))
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=1e-2)
        self.noise_scheduler = DDPMScheduler.from_config(self.bundle.scheduler)
        self.stage = DenoiserStage(context(recipe, self.bundle, images), recipe.train.stages[0])  # the same images
        self.seed = recipe.seed

    def step(self, step: int) -> float:
        positions = range(step * BATCH, (step + 1) * BATCH)
        assert self.stage.prior is not None
        indices = [self.stage.order[n] for n in positions] + [self.stage.prior.order[n] for n in positions]
        prompts = [self.bundle.recipe.data.prompt(self.images.images[index].label) for index in indices]
        pixels = three_channels(self.images.batch(indices)).to(self.device)
        generator = step_generator(self.seed, STAGE["name"], step)
        loss = script_loss(self.bundle, self.noise_scheduler, pixels, prompts, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def context(recipe: Recipe, bundle: Bundle, images: ImageSet) -> StageContext:
    return StageContext(bundle, images, recipe.seed, open_store("."), 0)


def our_loss(recipe: Recipe, images: ImageSet, step: int) -> torch.Tensor:
    """Compute the loss of our stage in a step, on a newly built model."""
    stage = DenoiserStage(context(recipe, build(recipe), images), recipe.train.stages[0])
    stage.begin(Worker(torch.device("cpu")))
    batch = Batch(step, BATCH, list(range(BATCH)), step_generator(recipe.seed, STAGE["name"], step))
    return stage.loss(stage.trainables[0].network, stage.inputs(batch))


def our_run(recipe: Recipe, images: str, out: Path) -> tuple[list[float], float]:
    """Return loss curve and seconds per step of our loop; the first steps (caches, compilers) are separate."""
    stamps: list[float] = []

    rate = training_step.learning_rate

    def ticking(*arguments: Any) -> float:
        stamps.append(time.perf_counter())
        return rate(*arguments)

    training_step.learning_rate = ticking
    try:
        loop.train(
            recipe,
            images,
            str(out),
            fingerprint="bench",
            provenance={},
            report=Checkpoints(out / ".train", 1),
            threads=torch.get_num_threads(),
        )
    finally:
        training_step.learning_rate = rate
    history = json.loads((out / ".train/progress.json").read_text())["history"]
    return [entry["loss"] for entry in history], statistics.median(
        later - now for now, later in itertools.pairwise(stamps[3:])
    )


@click.command()
@click.option("--size", default=64, show_default=True, help="Side of the images in pixels.")
@click.option("--steps", default=40, show_default=True)
@click.option("--images", default=240, show_default=True)
@click.option("--result", default="benchmarks/results/train_vs_diffusers.json", type=click.Path(path_type=Path))
def main(size: int, steps: int, images: int, result: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in phantom_set(LocalStore(str(folder / "images")), images, size, seed=5):
            pass
        equal = small_clip_model(folder / "base", size)
        values = equal.model_dump(mode="json")
        values["train"]["stages"][0]["steps"] = steps
        equal = make_recipe(values)
        values["train"] |= {"cache_latents": True}
        recommended = make_recipe(values)

        theirs = DiffusersSide(equal, ImageSet(open_dataset(str(folder / "images")), size, 1024), device)
        curve, stamps = [], []
        for step in range(steps):
            began = time.perf_counter()
            curve.append(theirs.step(step))
            stamps.append(time.perf_counter() - began)
        seconds = statistics.median(stamps[3:])
        ours, equal_seconds = our_run(equal, str(folder / "images"), folder / "equal")
        _, best_seconds = our_run(recommended, str(folder / "images"), folder / "recommended")
    about = {
        "command": f"python benchmarks/train_vs_diffusers.py --size {size} --steps {steps}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device.type}",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")},
        "code_revision": code_revision(),
        "instances_a_step": BATCH,
        "loss_first_last": {"diffusers": [curve[0], curve[-1]], "ours": [ours[0], ours[-1]]},
        "largest_difference_of_losses": max(abs(a - b) for a, b in zip(curve, ours, strict=True)),
        "seconds_a_step": {"diffusers": seconds, "ours_equal": equal_seconds, "ours_recommended": best_seconds},
        "speed_ratio": {"equal settings": seconds / equal_seconds, "recommended": seconds / best_seconds},
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(about, indent=1))
    click.echo(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
