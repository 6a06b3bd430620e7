"""Builds, loads and saves the networks of a model.

A saved model is an ordinary diffusers folder (``DiffusionPipeline.from_pretrained`` loads it) plus ``diffva.json``.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffva_ray.config.recipe import Recipe, RecipeError, make_recipe
from diffva_ray.model import lora, text
from diffva_ray.model.card import CARD, COMPONENTS, CONTROLNETS, FORMAT, LORA, UnusableModel, folder_digest, read_card
from diffva_ray.model.cross_attention import fit_text_width, text_width
from diffva_ray.model.extras import load_extra
from diffva_ray.model.image_conditioning import reads_image
from diffva_ray.model.packaged import model_address
from diffva_ray.storage.foreign_writes import foreign_writes
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store, is_local

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

PREDICTION_TYPES = ("epsilon", "v_prediction")  # what the network predicts

REWRITTEN = ".kernel_00"  # buffer name of upsamplers that counterfactual.latent_diffusion.FourPhases has replaced


@dataclass(kw_only=True)
class Bundle:
    """The parts of a latent diffusion model.

    Attributes:
        vae: The autoencoder, an ``AutoencoderKL`` (diffusers' lazy imports hide its type).
        unet: The denoiser, a ``UNet2DConditionModel``.
        text_encoder: A transformers text encoder.
        tokenizer: Its tokenizer.
        scheduler: Configuration of the noise schedule, as in ``scheduler_config.json``.
        recipe: The recipe that the model was built from.
        digest: Digest of the saved folder; empty for a model that was built from a recipe.
        card: Content of ``diffva.json``; empty without one.
        folder: Local folder that the model was loaded from.
        extras: Loaded networks of single methods, by name; see ``extra``.
        text_source: Origin of the text encoder: ``source`` and, from the hub, ``commit``.
    """

    vae: Any
    unet: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: dict[str, Any]
    recipe: Recipe
    digest: str = ""
    card: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    text_source: dict[str, str] = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """The pipeline's own networks, by folder name."""
        return {"vae": self.vae, "unet": self.unet, "text_encoder": self.text_encoder}

    def extra(self, name: str) -> Any:
        """The extra network ``name`` (see ``extras.py``), loaded at the first call. Raises UnusableModel."""
        if name not in self.extras:
            self.extras[name] = load_extra(self.folder, name)
        return self.extras[name]

    @property
    def controlnets(self) -> list[Any]:
        """The model's ControlNets, in the order of their folders. Raises UnusableModel without one."""
        names = itertools.takewhile(self._has, CONTROLNETS[1:])
        return [self.extra(name) for name in (CONTROLNETS[0], *names)]

    def _has(self, name: str) -> bool:
        return name in self.extras or (self.folder is not None and (self.folder / name / "config.json").exists())

    @property
    def latent_scale(self) -> int:
        """Side of a latent cell in pixels."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def check(self) -> None:
        """Raises UnusableModel when the parts do not fit together or do not fit the recipe's resolution."""
        width, expected = self.text_encoder.config.hidden_size, text_width(self.unet)
        if width != expected:
            raise UnusableModel(f"the text encoder's width is {width}, the UNet's {expected}; export the model again")
        channels, latent = self.unet.config.in_channels, self.vae.config.latent_channels
        if channels != latent * (2 if reads_image(self.unet) else 1):
            raise UnusableModel(
                f"the base's UNet takes {channels} channels and its autoencoder gives {latent}; inpainting and other "
                "conditional bases are not supported, use Stable Diffusion 1 or 2"
            )
        if (kind := self.scheduler.get("prediction_type", "epsilon")) not in PREDICTION_TYPES:
            raise UnusableModel(f"prediction_type {kind}: not supported; there are {', '.join(PREDICTION_TYPES)}")
        resolution = self.recipe.model.resolution
        stride = self.latent_scale * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if resolution % stride:
            raise UnusableModel(f"model.resolution {resolution} is not a multiple of {stride}, the model's stride")


def quiet() -> None:
    """Disables the progress bars and warnings of diffusers and transformers (such as: a BERT is not a CLIP)."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()


def build(recipe: Recipe) -> Bundle:
    """Builds the untrained model of a recipe.

    Without ``model.base``, all networks are initialised from ``recipe.seed``. Otherwise they are those of the base; if
    ``model.text_encoder`` is given it replaces the base's, with a projection when the widths differ.

    Args:
        recipe: The recipe; its ``model`` part describes the networks.

    Returns:
        The networks, without a digest.

    Raises:
        UnusableModel: The base or the text encoder cannot be loaded, or the parts do not fit together.
        RecipeError: The networks cannot be built from the options in ``model``.
    """
    # networks from scratch, or those of the base
    quiet()
    model = recipe.model
    if model.base is None:
        scheduler = {**SD_SCHEDULER, **model.scheduler}
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
        vae, unet, encoder, tokenizer, scheduler, origin = _pretrained(model.base, recipe)
    # match the widths of text encoder and UNet
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
    _check_prompts(bundle)
    return bundle


def _check_prompts(bundle: Bundle) -> None:
    """Raises RecipeError for a prompt of the recipe that training would cut."""
    data, limit = bundle.recipe.data, bundle.tokenizer.model_max_length
    prompts = {f"data.prompts.{label}": prompt for label, prompt in data.prompts.items()}
    for key, prompt in {**prompts, "data.healthy_prompt": data.healthy_prompt}.items():
        if not text.fits(bundle.tokenizer, prompt):
            raise RecipeError(
                f"{key} {prompt!r}: more than the {limit} tokens of model.tokenizer_length; make one of them fit"
            )


def base_source(base: str) -> str:
    """The argument of ``from_pretrained`` for ``model.base``: a local folder or hub id unchanged, or a local copy of a
    folder in another store, such as a packaged model's."""
    base = model_address(base)
    return base if is_local(base) else str(open_store(base).local_folder())


def _networks(source: str | Path) -> tuple[Any, Any, dict[str, Any]]:
    """Autoencoder, UNet and scheduler configuration of a diffusers folder or hub id."""
    if (Path(source) / "transformer").is_dir() and not (Path(source) / "unet").is_dir():
        raise UnusableModel(
            f"model.base {source}: has a transformer and no UNet (SD3, Flux); use Stable Diffusion 1 or 2"
        )
    parts: dict[str, Any] = {"vae": AutoencoderKL, "unet": UNet2DConditionModel}
    vae, unet = (
        loader.from_pretrained(source, subfolder=part, use_safetensors=True, variant=text.variant(source, part)).float()
        for part, loader in parts.items()
    )
    config = PNDMScheduler.load_config(source, subfolder="scheduler")
    return vae, unet, {key: config[key] for key in config if not key.startswith("_")}


def _pretrained(base: str, recipe: Recipe) -> tuple[Any, ...]:
    """Autoencoder, UNet, text encoder, tokenizer, scheduler configuration and text source of ``model.base``."""
    # networks of the base
    model = recipe.model
    source = base_source(base)
    if Path(source).is_file():
        raise UnusableModel(
            f"model.base {base}: a single file; diffusers makes a folder of it (StableDiffusionPipeline."
            f"from_single_file({base!r}).save_pretrained('base')), then --set model.base=base"
        )
    try:
        vae, unet, scheduler = _networks(source)
    except (OSError, ValueError) as error:
        if base.count("/") != 1 and not Path(source).is_dir():  # no hub id
            raise UnusableModel(
                f"model.base {base}: no such folder (diffva demo makes runs/demo/model); name another diffusers folder "
                "with --set model.base=FOLDER, or train from scratch with --recipe phantom"
            ) from None
        raise UnusableModel(
            f"model.base {base}: neither a local diffusers folder nor available from the hub ({text.first_line(error)})"
        ) from None
    # the text encoder: the recipe's, or the base's own
    card = read_card(open_store(source)) if Path(source).is_dir() else None
    options = (model.tokenizer_length, model.attention_mask)
    if model.text_encoder:
        encoder, tokenizer, origin = text.starting_text_encoder(model.text_encoder, *options)
    else:
        encoder, tokenizer = text.load_text_encoder(source, *options)
        origin = (card or {}).get("text_source", {})
    lora.load(unet, None if model.text_encoder else encoder, Path(source) / LORA)
    return vae, unet, encoder, tokenizer, {**scheduler, **model.scheduler}, origin


def save(bundle: Bundle, store: Store, card: dict[str, Any]) -> str:
    """Writes the diffusers folder, and last ``diffva.json``, which marks the model as complete.

    LoRA adapters are merged into the weights; with ``train.lora.merge: false`` they are written to ``lora/`` beside the
    unchanged weights. In both cases the weights in the bundle are merged afterwards.

    Args:
        bundle: The networks.
        store: The folder of the model.
        card: Further keys of ``diffva.json``; they override the standard ones.

    Returns:
        The digest of the folder.

    Raises:
        ValueError: A ``CounterfactualEngine`` has rewritten the bundle; its weights have names that no loader knows.
    """
    # refuse a rewritten bundle
    buffers = (name for module in bundle.modules.values() for name, _ in module.named_buffers())
    if any(name.endswith(REWRITTEN) for name in buffers):
        raise ValueError("a CounterfactualEngine has rewritten this bundle in place; load the model again to save it")
    quiet()
    backend = getattr(bundle.tokenizer, "backend_tokenizer", None)
    if backend is not None:  # the padding of the last call would be saved, and change the digest
        backend.no_padding()
        backend.no_truncation()
    # write to a temporary folder, then to the store
    with foreign_writes(Path(tempfile.gettempdir()), "the model"), tempfile.TemporaryDirectory() as name:
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
    # the card completes the model
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
    """A pipeline of these networks, without a safety checker: ``StableDiffusionInstructPix2PixPipeline`` where the UNet
    reads an image, else ``StableDiffusionPipeline``."""
    pipeline = StableDiffusionInstructPix2PixPipeline if reads_image(bundle.unet) else StableDiffusionPipeline
    return pipeline(
        vae=bundle.vae,
        text_encoder=bundle.text_encoder,
        tokenizer=bundle.tokenizer,
        unet=bundle.unet,
        scheduler=PNDMScheduler.from_config(bundle.scheduler),
        safety_checker=None,  # it would black out images
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load(uri: str, recipe: Recipe | None = None) -> Bundle:
    """Loads a saved model.

    Args:
        uri: A local folder or an ``s3://`` address.
        recipe: Overrides the recipe in ``diffva.json``; required for a plain diffusers folder.

    Returns:
        The networks, with their digest and card.

    Raises:
        UnusableModel: No model there, pickled weights, no recipe, or weights that differ from ``diffva.json``.
    """
    # check the folder before anything is loaded
    quiet()
    store = open_store(uri)
    card = read_card(store)
    if card is None and not any(store.exists(f"{part}/config.json") for part in COMPONENTS):
        raise UnusableModel(
            f"--model {uri}: no model found (no {CARD}, no diffusers folder); train one with diffva train (one of "
            "the hub is a base for that: --set model.base=ID)"
        )
    folder = store.local_folder()
    digest = folder_digest(folder)
    if card is not None and card.get("digest") != digest:
        raise UnusableModel(f"--model {uri}: its weights are not those of its {CARD}; export it again")
    if recipe is None:
        if card is None:
            raise UnusableModel(f"--model {uri}: a diffusers folder without {CARD}; name a recipe with --recipe")
        recipe = make_recipe(card["recipe"])
    # load the networks; the text options are those that the model was saved with
    vae, unet, scheduler = _networks(folder)
    saved = (card or {}).get("recipe", {}).get("model", {})
    encoder, tokenizer = text.load_text_encoder(
        str(folder),
        saved.get("tokenizer_length", recipe.model.tokenizer_length),
        saved.get("attention_mask", recipe.model.attention_mask),
    )
    lora.load(unet, encoder, folder / LORA)
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
        text_source=(card or {}).get("text_source", {}),
    )
    bundle.check()
    return bundle
