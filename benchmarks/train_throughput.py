"""Speed of the joint fine-tune at the paper's size: Stable Diffusion v1.4's architecture with a BERT-base encoder,
random weights, 512 px, one GPU.

    python benchmarks/train_throughput.py [--batch 2 --batch 8 ...] [--set train.compile=true ...]

For every batch size: images a second, peak memory, and the share of the GPU's dense bf16 peak that the model's own
arithmetic takes (MFU): a training step costs three forwards of the UNet (0.803 TFLOP each at 64 x 64 latents), and one
encoding (1.117 TFLOP) where latents are not cached; the text encoder is left out (0.02). ``--tiny`` is the same path at
toy size, to see that it runs.
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

from diffva_ray.config.recipe import Recipe, load_recipe, make_recipe
from diffva_ray.data.phantoms import phantom_set
from diffva_ray.provenance import code_revision, version
from diffva_ray.storage.store import LocalStore
from diffva_ray.train import loop
from diffva_ray.train.checkpoint import discard

UNET_TFLOP, ENCODE_TFLOP = 0.803, 1.117
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0}  # dense bf16 TFLOP/s, as the vendor states them
ARCHITECTURE = str(Path(__file__).with_name("sd14_random.yaml"))


def recipe_of(tiny: bool, batch: int, steps: int, overrides: tuple[str, ...]) -> Recipe:
    """The denoiser's stage alone."""
    values = load_recipe("phantom" if tiny else ARCHITECTURE).model_dump(mode="json")
    stage = {"name": "joint", "trains": "denoiser", "steps": steps, "batch_size": batch, "learning_rate": 5e-5,
             "classes": {"Normal": 1}}  # fmt: skip
    values["train"] |= {"stages": [stage], "log_every": 1000, "checkpoint_every": 100_000}
    return make_recipe(values, overrides)


def measure(recipe: Recipe, images: str, out: Path) -> dict[str, Any]:
    """Median seconds of the steps after the first five, and the memory they took."""
    stamps: list[float] = []
    rate = loop.learning_rate
    cuda = torch.cuda.is_available()

    def ticking(*arguments: Any) -> float:
        if cuda:
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        return rate(*arguments)

    loop.learning_rate = ticking
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        loop.train(recipe, images, str(out), fingerprint="bench", provenance={}, report=discard)
    finally:
        loop.learning_rate = rate
    seconds = statistics.median(later - now for now, later in itertools.pairwise(stamps[5:]))
    batch = recipe.train.stages[0].batch_size
    tflop = batch * (3 * UNET_TFLOP + (0 if recipe.train.cache_latents else ENCODE_TFLOP))
    name = torch.cuda.get_device_name() if cuda else platform.machine()
    peak = next((value for key, value in PEAKS.items() if key in name), None)
    return {
        "batch": batch,
        "seconds_a_step": round(seconds, 4),
        "images_a_second": round(batch / seconds, 2),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "mfu": round(tflop / seconds / peak, 3) if peak else None,
    }


@click.command()
@click.option("--batch", "batches", multiple=True, type=int, default=(2, 8, 16, 32), show_default=True)
@click.option("--steps", default=30, show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE")
@click.option("--tiny", is_flag=True, help="The phantom model: the path, not the numbers.")
@click.option("--result", default="benchmarks/results/train_throughput.json", type=click.Path(path_type=Path))
def main(batches: tuple[int, ...], steps: int, overrides: tuple[str, ...], tiny: bool, result: Path) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in phantom_set(LocalStore(str(folder / "images")), 64, 64 if tiny else 512, 1, classes=("Normal",)):
            pass
        for batch in batches:
            recipe = recipe_of(tiny, batch, steps, overrides)
            try:
                row = measure(recipe, str(folder / "images"), folder / f"model-{batch}")
            except torch.cuda.OutOfMemoryError:
                row = {"batch": batch, "error": "out of memory"}
                torch.cuda.empty_cache()
            rows.append(row)
            click.echo(row)
    about = {
        "command": "python benchmarks/train_throughput.py " + " ".join(f"--set {text}" for text in overrides),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "size": "phantom model, 64 px" if tiny else "Stable Diffusion v1.4 + BERT-base, 512 px",
        "versions": {key: version(key) for key in ("torch", "diffusers", "transformers")},
        "code_revision": code_revision(),
        "rows": rows,
    }
    result.write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
