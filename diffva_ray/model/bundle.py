"""The networks of one model and the folder they live in: build, load, save.

The folder is an ordinary diffusers folder (``DiffusionPipeline.from_pretrained`` loads it) plus ``diffva.json``.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffva_ray.config.recipe import Recipe, RecipeError, make_recipe
from diffva_ray.model import lora, text
from diffva_ray.model.card import CARD, COMPONENTS, FORMAT, LORA, UnusableModel, folder_digest, read_card
from diffva_ray.model.cross_attention import fit_text_width, text_width
from diffva_ray.model.extras import load_extra
from diffva_ray.storage.store import Store, is_local, open_store

# Stable Diffusion v1.4's own scheduler_config.json
SD_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


REWRITTEN = ".kernel_00"  # of an upsampler that counterfactual.latent_diffusion.FourPhases has replaced


@dataclass(kw_only=True)
class Bundle:
    """The parts of a latent diffusion model. ``digest`` is empty until the model has been saved or loaded."""

    vae: Any  # AutoencoderKL; diffusers' lazy imports hide its types
    unet: Any  # UNet2DConditionModel
    text_encoder: Any
    tokenizer: Any
    scheduler: dict[str, Any]
    recipe: Recipe
    digest: str = ""
    card: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    extras: dict[str, Any] = field(default_factory=dict)  # networks of some methods; see extras.py
    text_source: dict[str, str] = field(default_factory=dict)  # where the text encoder came from; see text.py

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        return {"vae": self.vae, "unet": self.unet, "text_encoder": self.text_encoder}

    def extra(self, name: str) -> Any:
        """The network of that name beside the pipeline's own, loaded when first asked for. Raises UnusableModel."""
        if name not in self.extras:
            self.extras[name] = load_extra(self.folder, name)
        return self.extras[name]

    @property
    def latent_scale(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def check(self) -> None:
        """Raises UnusableModel when the parts do not fit each other or the recipe's resolution."""
        width, expected = self.text_encoder.config.hidden_size, text_width(self.unet)
        if width != expected:
            raise UnusableModel(f"the text encoder's width is {width}, the UNet takes {expected}; export it again")
        if self.recipe.model.resolution % (self.latent_scale * 2 ** (len(self.unet.config.block_out_channels) - 1)):
            raise UnusableModel(f"model.resolution {self.recipe.model.resolution} does not divide into whole latents")


def quiet() -> None:
    """No loading bars, and no warning that a BERT is not a CLIP."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()


def build(recipe: Recipe) -> Bundle:
    """The model a recipe describes, before training: from scratch (seeded), or a base with its text encoder swapped
    (and a projection of the text where their widths differ).

    Raises UnusableModel (a base or text encoder that cannot be loaded) or RecipeError.
    """
    quiet()
    model = recipe.model
    scheduler = {**SD_SCHEDULER, **model.scheduler}
    if model.base is None:
        torch.manual_seed(recipe.seed)
        try:
            vae = AutoencoderKL(in_channels=3, out_channels=3, sample_size=model.resolution, **(model.vae or {}))
            unet = UNet2DConditionModel(**(model.unet or {}))
            tokenizer = text.build_tokenizer(model.tokenizer_length)
            encoder = text.build_text_encoder(tokenizer, model.text or {}, model.attention_mask)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"model: {text.first_line(error)}") from None
        origin: dict[str, str] = {}
    else:
        vae, unet, encoder, tokenizer, scheduler, origin = _pretrained(model.base, recipe, scheduler)
    fit_text_width(unet, encoder.config.hidden_size, recipe.seed)
    bundle = Bundle(
        vae=vae,
        unet=unet,
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        recipe=recipe,
        text_source=origin,
    )
    bundle.check()
    return bundle


def base_source(base: str) -> str:
    """What ``from_pretrained`` takes for ``model.base``: a folder or hub id as it is, a private copy of another store's
    folder."""
    return base if is_local(base) else str(open_store(base).local_folder())


def _pretrained(base: str, recipe: Recipe, scheduler: dict[str, Any]) -> tuple[Any, ...]:
    model = recipe.model
    source = base_source(base)
    try:
        vae = AutoencoderKL.from_pretrained(source, subfolder="vae", use_safetensors=True)
        unet = UNet2DConditionModel.from_pretrained(source, subfolder="unet", use_safetensors=True)
        config = PNDMScheduler.load_config(source, subfolder="scheduler")
    except (OSError, ValueError) as error:
        raise UnusableModel(
            f"model.base {base}: neither a diffusers folder here nor to be had from the hub ({text.first_line(error)})"
        ) from None
    scheduler = {**{key: config[key] for key in config if not key.startswith("_")}, **model.scheduler}
    about = read_card(open_store(source)) if Path(source).is_dir() else None
    wanted = (model.tokenizer_length, model.attention_mask)
    if model.text_encoder:
        encoder, tokenizer, origin = text.starting_text_encoder(model.text_encoder, *wanted)
    else:
        encoder, tokenizer = text.load_text_encoder(source, *wanted)
        origin = (about or {}).get("text_source", {})
    lora.load(unet, None if model.text_encoder else encoder, Path(source) / LORA)
    return vae, unet, encoder, tokenizer, scheduler, origin


def save(bundle: Bundle, store: Store, card: dict[str, Any]) -> str:
    """Write the diffusers folder, then ``diffva.json`` (whose appearance completes it); returns the digest.

    Adapters of LoRA are merged into the weights, or with ``train.lora.merge: false`` written beside the untouched ones
    (``lora/``); the bundle has merged weights afterwards in either case. Raises ValueError for a bundle that an engine
    has taken over: its weights have names that no loader knows.
    """
    buffers = (name for module in bundle.modules.values() for name, _ in module.named_buffers())
    if any(name.endswith(REWRITTEN) for name in buffers):
        raise ValueError(
            "an engine (CounterfactualEngine) has rewritten this bundle in place; load the model again to save"
        )
    quiet()
    backend = getattr(bundle.tokenizer, "backend_tokenizer", None)
    if backend is not None:  # a used tokenizer would save the padding of its last call, and change the digest
        backend.no_padding()
        backend.no_truncation()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = bundle.recipe.train.lora
        beside = config is not None and not config.merge and lora.attached(bundle.unet)
        if beside:
            lora.save(bundle.unet, bundle.text_encoder, folder / LORA)
        for module in (bundle.unet, bundle.text_encoder):
            lora.detach(module, merge=not beside)
        pipeline_of(bundle).save_pretrained(folder, safe_serialization=True)
        for extra, network in bundle.extras.items():
            network.save_pretrained(folder / extra, safe_serialization=True)
        digest = folder_digest(folder)
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                store.put(file.relative_to(folder).as_posix(), file.read_bytes())
        lora.load(bundle.unet, bundle.text_encoder, folder / LORA)
    card = {
        "format": FORMAT,
        "digest": digest,
        "extras": sorted(bundle.extras),
        "text_source": bundle.text_source,
        "recipe": bundle.recipe.model_dump(mode="json"),
        **card,
    }
    store.put(CARD, json.dumps(card, indent=1).encode())
    return digest


def pipeline_of(bundle: Bundle) -> Any:
    """The ordinary pipeline of these networks, without a safety checker."""
    return StableDiffusionPipeline(
        vae=bundle.vae,
        text_encoder=bundle.text_encoder,
        tokenizer=bundle.tokenizer,
        unet=bundle.unet,
        scheduler=PNDMScheduler.from_config(bundle.scheduler),
        safety_checker=None,  # it blacks out images
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load(uri: str, recipe: Recipe | None = None) -> Bundle:
    """A saved model, from a local folder or s3://. ``recipe`` overrides the one in its card.

    Raises UnusableModel: no such folder, pickled weights, a plain diffusers folder without a recipe given, weights
    that are not the ones ``diffva.json`` was written for.
    """
    quiet()
    store = open_store(uri)
    card = read_card(store)
    if card is None and not any(store.exists(f"{part}/config.json") for part in COMPONENTS):
        raise UnusableModel(
            f"--model {uri}: no model there (no {CARD}, no diffusers folder); train one with diffva train"
        )
    folder = store.local_folder()
    digest = folder_digest(folder)
    if card is not None and card.get("digest") != digest:
        raise UnusableModel(f"--model {uri}: its weights are not those {CARD} was written for; export it again")
    if recipe is None:
        if card is None:
            raise UnusableModel(f"--model {uri}: a diffusers folder without {CARD}; name a recipe with --recipe")
        recipe = make_recipe(card["recipe"])
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", use_safetensors=True)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
    saved = (card or {}).get("recipe", {}).get("model", {})
    encoder, tokenizer = text.load_text_encoder(
        str(folder),
        saved.get("tokenizer_length", recipe.model.tokenizer_length),
        saved.get("attention_mask", recipe.model.attention_mask),
    )
    lora.load(unet, encoder, folder / LORA)
    config = PNDMScheduler.load_config(folder, subfolder="scheduler")
    scheduler = {key: config[key] for key in config if not key.startswith("_")}
    bundle = Bundle(
        vae=vae,
        unet=unet,
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        recipe=recipe,
        digest=digest,
        card=card or {},
        folder=folder,
    )
    bundle.text_source = bundle.card.get("text_source", {})
    bundle.check()
    return bundle
