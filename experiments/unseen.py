"""Score the maps of one model on lesions that training has not shown, and on faint lesions: by class and by contrast.

    make demo && python experiments/unseen.py [--model runs/demo/model] [--images 48]

Uses phantoms of a separate seed, ``--images`` per class, and the recipe's method. A pneumothorax is darker than lung,
so the positive part of a map cannot find it, and the negative part should. A mass is a ball, unlike any opacity in
training. Cardiomegaly lies outside the lungs and is scored over the whole image. Contrast is the mean |image -
ground-truth counterfactual| inside the lesion, in thirds of the images of the trained classes.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from diffva_ray.counterfactual.attribution import attribution
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.phantoms import Phantom, phantom
from diffva_ray.metrics.baselines import brightness
from diffva_ray.metrics.localization import absolute, positive, score, smooth
from diffva_ray.model.bundle import load
from diffva_ray.progress import LOG, set_up_logging
from diffva_ray.provenance import code_revision, version

TRAINED = ("Lung_Opacity", "COVID", "Viral Pneumonia")
NEVER = ("Pneumothorax", "Mass", "Cardiomegaly")
SEED = 5301
Image = NDArray[np.float32]


def negative(signed: Image) -> Image:
    """Return max(-M, 0): where generation brightened the image, as for air in the wrong place."""
    return np.maximum(-signed, 0)


PARTS = {"positive": positive, "negative": negative, "absolute": absolute}


def maps_of(engine: CounterfactualEngine, images: list[Phantom]) -> tuple[list[Image], list[str]]:
    """Return signed maps, and the class that the model guessed for each image."""
    maps: list[Image] = []
    sources: list[str] = []
    size = engine.config.micro_batch
    for start in range(0, len(images), size):
        some = images[start : start + size]
        made = engine([image.image for image in some], list(range(start, start + len(some))))
        sources += made.source_prompts
        maps += [
            attribution(image.image, rebuilt, counterfactual, engine.config)
            for image, rebuilt, counterfactual in zip(some, made.reconstructions, made.counterfactuals, strict=True)
        ]
    return maps, sources


def aurocs(image: Phantom, signed: Image, smoothing: float) -> dict[str, float]:
    region = None if image.label == "Cardiomegaly" else image.lungs
    found = {name: score(part(signed), image.lesion, region) for name, part in PARTS.items()}
    found["brightness"] = score(brightness(smooth(image.image, smoothing)), image.lesion, region)
    return {name: one.auroc for name, one in found.items() if one is not None}


@click.command()
@click.option("--model", default="runs/demo/model", show_default=True)
@click.option("--images", "count", default=48, show_default=True, help="Images per class.")
@click.option("--result", default="experiments/results/unseen.json", type=click.Path(path_type=Path))
def main(model: str, count: int, result: Path) -> None:
    set_up_logging()
    bundle = load(model)
    engine = CounterfactualEngine(bundle, device="cpu")
    rows: list[dict[str, Any]] = []
    contrasts: list[tuple[float, float]] = []
    for label in (*TRAINED, *NEVER):
        images = [phantom(label, n, SEED, engine.size) for n in range(count)]
        maps, sources = maps_of(engine, images)
        found = [aurocs(image, signed, engine.config.smoothing) for image, signed in zip(images, maps, strict=True)]
        if label in TRAINED:
            contrasts += [
                (float(np.abs(image.image - image.ground_truth)[image.lesion].mean()), each["positive"])
                for image, each in zip(images, found, strict=True)
                if "positive" in each
            ]
        means = {
            name: float(np.mean([each[name] for each in found if name in each])) for name in (*PARTS, "brightness")
        }
        rows.append(
            {"class": label, "trained": label in TRAINED, "taken_for_healthy": sources.count("") / count, **means}
        )
        LOG.info("%s", rows[-1])
    contrasts.sort()
    thirds = np.array_split(np.array(contrasts), 3)
    about = {
        "command": f"python experiments/unseen.py --model MODEL --images {count}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {key: version(key) for key in ("torch", "diffusers")},
        "code_revision": code_revision(),
        "model_digest": bundle.digest,
        "rows": rows,
        "by_contrast": [
            {"from": float(third[0, 0]), "to": float(third[-1, 0]), "auroc": float(third[:, 1].mean())}
            for third in thirds
        ],
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
