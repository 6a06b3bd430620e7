"""Find what limits the attribution maps of one model: each row removes one limit, or changes one setting.

    make demo && python experiments/limits.py [--model runs/demo/model] [--images 96] [--told-steps 3000]

Uses abnormal phantoms of a separate seed and the recipe's method. *True class as source*: the image is encoded under
the prompt of its label instead of the model's guess. *Autoencoder alone*: the map D(E(image)) - D(E(ground truth)), the
result of a perfect denoiser, so its error comes from autoencoder and smoothing. *Told the ground-truth
counterfactuals*: not a method but an upper reference, a UNet in pixel space that is trained with supervision to remove
the lesion of TOLD_IMAGES phantoms; such pairs do not exist for patients. Dice uses the set's best threshold; lesion
error left is the error inside the lesion as a share of the unedited image's error.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import UNet2DModel
from numpy.typing import NDArray

from diffva_ray.config.recipe import GenerateConfig
from diffva_ray.counterfactual.attribution import attribution
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.phantoms import Phantom, phantom
from diffva_ray.metrics.localization import positive, score
from diffva_ray.metrics.ssim import psnr
from diffva_ray.model.bundle import load
from diffva_ray.progress import LOG, set_up_logging
from diffva_ray.provenance import code_revision, version

ABNORMAL = ("Lung_Opacity", "COVID", "Viral Pneumonia")
SEED = 5101
TOLD_IMAGES, TOLD_SEED = 4000, 100
OWN = "<own>"  # encode under the image's own class instead of the model's guess
ROWS: dict[str, dict[str, Any]] = {
    "as the recipe has it": {},
    "true class as source": {"source_prompt": OWN},
    "true class as source, twice the steps": {"source_prompt": OWN, "num_inference_steps": 40},
    "true class as source, guidance 1.5": {"source_prompt": OWN, "guidance_scale": 1.5},
    "true class as source, guidance 4": {"source_prompt": OWN, "guidance_scale": 4.0},
    "true class as source, strength 0.45": {"source_prompt": OWN, "strength": 0.45},
    "true class as source, strength 0.75": {"source_prompt": OWN, "strength": 0.75},
    "true class as source, twice the smoothing": {"source_prompt": OWN, "smoothing": 0.048},
}
Pair = tuple[NDArray[np.float32], NDArray[np.float32]]  # reconstruction and counterfactual


def generated(
    engine: CounterfactualEngine, images: list[Phantom], config: GenerateConfig
) -> tuple[list[Pair], list[str]]:
    """Return reconstruction and counterfactual of every image, and the prompt that the model guessed."""
    pairs: dict[int, Pair] = {}
    sources: dict[int, str] = {}
    groups = {"": list(range(len(images)))}
    if config.source_prompt == OWN:
        groups = {label: [n for n, image in enumerate(images) if image.label == label] for label in ABNORMAL}
    for label, members in groups.items():
        prompt = engine.bundle.recipe.data.prompt(label) if label else config.source_prompt
        engine.config = config.model_copy(update={"source_prompt": prompt})
        for start in range(0, len(members), config.micro_batch):
            some = members[start : start + config.micro_batch]
            made = engine([images[n].image for n in some], some)
            for n, rebuilt, ground_truth, source in zip(
                some, made.reconstructions, made.counterfactuals, made.source_prompts
            ):
                pairs[n], sources[n] = (rebuilt, ground_truth), source
    return [pairs[n] for n in range(len(images))], [sources[n] for n in range(len(images))]


@torch.inference_mode()
def autoencoder_alone(engine: CounterfactualEngine, images: list[Phantom]) -> list[Pair]:
    """Return the result of a perfect denoiser: image and ground-truth counterfactual through the autoencoder."""

    def through(pixels: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        mean, _ = engine.model.encode(torch.from_numpy(np.stack(pixels)))
        return engine.model.decode(mean.float() * engine.model.scale).numpy()

    return list(
        zip(through([image.image for image in images]), through([image.ground_truth for image in images]), strict=True)
    )


def told_the_counterfactuals(images: list[Phantom], steps: int) -> list[Pair]:
    """Return images and the counterfactuals of a network that was trained on ground-truth pairs of other images.

    The network sees the recipe's own classes, as many images of each as the denoiser.
    """
    torch.manual_seed(0)
    size = images[0].image.shape[0]
    shown = [phantom(("Normal", *ABNORMAL)[n % 4], n, TOLD_SEED, size) for n in range(TOLD_IMAGES)]
    pixels = torch.from_numpy(np.stack([one.image for one in shown]))[:, None] * 2 - 1
    lesions = torch.from_numpy(np.stack([one.image - one.ground_truth for one in shown]))[:, None]
    network = UNet2DModel(
        sample_size=size, in_channels=1, out_channels=1, block_out_channels=(16, 32, 64, 64), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D",) * 4, up_block_types=("UpBlock2D",) * 4,
    )  # fmt: skip
    network.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps)
    for step in range(steps):
        chosen = torch.randint(len(shown), (16,))
        batch = pixels[chosen].contiguous(memory_format=torch.channels_last)
        loss = (network(batch, 0).sample - lesions[chosen]).square().mean()  # with |.| an empty prediction is a minimum
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 250 == 0:
            LOG.info("told the ground-truth counterfactuals: step %d, loss %.6f", step, loss.item())
    with torch.no_grad():
        given = torch.from_numpy(np.stack([image.image for image in images]))[:, None] * 2 - 1
        found = torch.cat([network(some, 0).sample for some in given.split(32)])[:, 0].numpy()
    return [(image.image, image.image - lesion) for image, lesion in zip(images, found, strict=True)]


def row_of(name: str, images: list[Phantom], pairs: list[Pair], config: GenerateConfig) -> dict[str, Any]:
    scored, left, likeness = [], [], []
    for image, (rebuilt, ground_truth) in zip(images, pairs, strict=True):
        found = score(positive(attribution(image.image, rebuilt, ground_truth, config)), image.lesion, image.lungs)
        if found is None:
            continue
        scored.append((image.label, found))
        inside = image.lesion
        left.append(
            np.abs(ground_truth - image.ground_truth)[inside].mean()
            / np.abs(image.image - image.ground_truth)[inside].mean()
        )
        likeness.append(psnr(ground_truth, image.ground_truth))
    return {
        "row": name,
        "auroc": float(np.mean([found.auroc for _, found in scored])),
        "auprc": float(np.mean([found.auprc for _, found in scored])),
        "dice_best": float(np.mean([found.dice_curve for _, found in scored], axis=0).max()),
        "lesion_error_left": float(np.mean(left)),
        "psnr_counterfactual": float(np.mean(likeness)),
        **{
            f"auroc {label}": float(np.mean([found.auroc for of, found in scored if of == label])) for label in ABNORMAL
        },
    }


@click.command()
@click.option("--model", default="runs/demo/model", show_default=True)
@click.option("--images", "count", default=96, show_default=True, help="Abnormal phantoms.")
@click.option(
    "--told-steps",
    default=0,
    show_default=True,
    help="Training steps of the supervised reference; 3000 take 20 minutes.",
)
@click.option("--result", default="experiments/results/limits.json", type=click.Path(path_type=Path))
def main(model: str, count: int, told_steps: int, result: Path) -> None:
    set_up_logging()
    bundle = load(model)
    engine, base = CounterfactualEngine(bundle, device="cpu"), bundle.recipe.generate
    images = [phantom(ABNORMAL[n % 3], n, SEED, bundle.recipe.model.resolution) for n in range(count)]
    rows, guessed_right = [], float("nan")
    for name, changes in ROWS.items():
        config = base.model_copy(update=changes)
        pairs, sources = generated(engine, images, config)
        if not changes:
            own = [bundle.recipe.data.prompt(image.label) for image in images]
            guessed_right = float(np.mean([a == b for a, b in zip(own, sources, strict=True)]))
        rows.append(row_of(name, images, pairs, config))
        LOG.info("%s", rows[-1])
    rows.append(row_of("autoencoder alone (a perfect denoiser)", images, autoencoder_alone(engine, images), base))
    if told_steps:
        raw = base.model_copy(update={"difference": "raw"})
        rows.append(
            row_of(
                f"told the ground-truth counterfactuals, {told_steps} steps",
                images,
                told_the_counterfactuals(images, told_steps),
                raw,
            )
        )
    about = {
        "command": f"python experiments/limits.py --model MODEL --images {count} --told-steps {told_steps}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {key: version(key) for key in ("torch", "diffusers")},
        "code_revision": code_revision(),
        "model_digest": bundle.digest,
        "class_guessed_right": guessed_right,
        "rows": rows,
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
