"""Loads the networks of single methods, such as a ControlNet. Each is a folder of the model with ``config.json`` and
safetensors, is trained by a stage of the same name, and is part of the digest; ``DiffusionPipeline`` ignores it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import ControlNetModel, UNet2DModel

from diffva_ray.config.references import reference
from diffva_ray.model.card import CONTROLNETS, UnusableModel
from diffva_ray.model.classifier import LatentClassifier
from diffva_ray.model.gan_generator import GanGenerator

NETWORKS: dict[str, Any] = {  # diffusers ModelMixins by folder
    "controlnet": ControlNetModel,
    "classifier": LatentClassifier,
    "vant_gan": GanGenerator,
    "ant_gan": GanGenerator,
    **dict.fromkeys(CONTROLNETS[1:], ControlNetModel),
    "va_gan": GanGenerator,
    "healthy_unet": UNet2DModel,
    "textual_inversion": "textual_inversion.ConceptVectors",  # by name, see config/references.py
    "image_classifier": "image_classifier.ImageClassifier",
    "singla": GanGenerator,
    "charachon": "charachon.Pair",
}


def load_extra(folder: Path | None, name: str) -> Any:
    """Loads the network ``name`` (a key of NETWORKS) from a local model folder; None: the model is not saved yet.

    Raises ValueError for an unknown name, UnusableModel when the model has no such network.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; there are {', '.join(NETWORKS)}")
    if folder is None or not (folder / name / "config.json").exists():
        kind = name.replace("_", "-")
        raise UnusableModel(f"the model has no {name}; train it with a stage that `trains: {kind}`")
    network = NETWORKS[name]
    kind = reference(network) if isinstance(network, str) else network
    return kind.from_pretrained(folder / name, use_safetensors=True)
