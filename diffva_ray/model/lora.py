"""LoRA adapters (Hu et al. 2022) in UNet and text encoder, with peft: attach, merge, save, load.

Unmerged adapters are saved in ``lora/``: ``pytorch_lora_weights.safetensors`` for ``pipeline.load_lora_weights`` and,
for text encoders other than CLIP (which diffusers' loader does not support), the peft adapter ``text_encoder/``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from safetensors.torch import save_file
from torch import nn

from diffva_ray.config.training import LoraConfig
from diffva_ray.model.card import UnusableModel
from diffva_ray.provenance import missing

ADAPTER = "default"  # peft's name of the adapter
FILE = "pytorch_lora_weights.safetensors"
UNET = ["to_q", "to_k", "to_v", "to_out.0"]  # layers with adapters
TEXT = {"clip": ["q_proj", "k_proj", "v_proj", "out_proj"], "bert": ["query", "key", "value"]}


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UnusableModel(missing("peft", "LoRA (train.lora, or a model with a lora folder)", "lora")) from None
    return peft


def _is_clip(text_encoder: Any) -> bool:
    return str(text_encoder.config.model_type).startswith("clip")


def attach(unet: Any, text_encoder: Any, config: LoraConfig, seed: int) -> None:
    """Adds adapters to the attention projections of both networks; their outputs do not change yet (B is zero).

    Only ``adapter_parameters`` stay trainable. Raises UnusableModel without peft, and for other text encoders.
    """
    peft = _peft()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module, targets in ((unet, UNET), (text_encoder, TEXT["clip" if _is_clip(text_encoder) else "bert"])):
            settings = peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha or config.rank,
                lora_dropout=config.dropout,
                target_modules=targets,
            )
            module.requires_grad_(False)
            try:
                peft.inject_adapter_in_model(settings, module, ADAPTER)
            except ValueError:  # peft finds no such layer
                raise UnusableModel(
                    f"train.lora: a {text_encoder.config.model_type} has no layers {', '.join(targets)}; LoRA takes "
                    "BERT, RoBERTa, ELECTRA and CLIP; remove train.lora, or take one of them"
                ) from None
            for parameter in adapter_parameters(module).values():
                parameter.requires_grad_(True)


def attached(module: nn.Module) -> bool:
    """Whether the network has adapters."""
    return hasattr(module, "peft_config")


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Weights to train, by name: those of the adapters, and a UNet's projection of the text (see ``fit_text_width``),
    which has no trained weights to adapt."""
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if ".lora_A." in name or ".lora_B." in name or name.startswith("encoder_hid_proj.")
    }


def detach(module: Any, merge: bool) -> None:
    """Removes the adapters, if any; with ``merge``, first adds alpha/rank * B A to the weights."""
    if not attached(module):
        return
    from peft.tuners.lora import LoraLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            if merge:
                layer.merge(safe_merge=True)  # raises for weights that are not finite
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, layer.get_base_layer())
    del module.peft_config
    module._hf_peft_config_loaded = False


def _weights(module: Any) -> dict[str, torch.Tensor]:
    """Adapter weights with alpha/rank multiplied into B: diffusers before 0.34 assumes alpha = rank."""
    config = module.peft_config[ADAPTER]
    state = _peft().get_peft_model_state_dict(module, adapter_name=ADAPTER, save_embedding_layers=False)
    scale = config.lora_alpha / config.r
    return {
        key: (value * scale if ".lora_B." in key else value).detach().cpu().contiguous() for key, value in state.items()
    }


def save(unet: Any, text_encoder: Any, folder: Path) -> None:
    """Writes the adapters of both networks to ``folder`` (a model's ``lora``)."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = {"unet_lora_layers": convert_state_dict_to_diffusers(_weights(unet))}
    if _is_clip(text_encoder):
        layers["text_encoder_lora_layers"] = convert_state_dict_to_diffusers(_weights(text_encoder))
    else:
        config = text_encoder.peft_config[ADAPTER]
        plain = _peft().LoraConfig(r=config.r, lora_alpha=config.r, target_modules=TEXT["bert"], inference_mode=True)
        plain.save_pretrained(folder / "text_encoder")
        weights = {f"base_model.model.{key}": value for key, value in _weights(text_encoder).items()}
        save_file(weights, folder / "text_encoder" / "adapter_model.safetensors", metadata={"format": "pt"})
    StableDiffusionPipeline.save_lora_weights(folder, weight_name=FILE, safe_serialization=True, **layers)


def load(unet: Any, text_encoder: Any | None, folder: Path) -> None:
    """Merges the adapters of ``folder``, if any, into the weights; ``text_encoder`` is None when it was replaced.

    Raises UnusableModel without peft.
    """
    if not (folder / FILE).exists():
        return
    peft = _peft()
    pipeline: Any = StableDiffusionPipeline
    state, alphas = pipeline.lora_state_dict(folder, weight_name=FILE, use_safetensors=True)
    pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet, adapter_name=ADAPTER)
    if text_encoder is not None and _is_clip(text_encoder):
        pipeline.load_lora_into_text_encoder(
            state, network_alphas=alphas, text_encoder=text_encoder, prefix="text_encoder", adapter_name=ADAPTER
        )
    elif text_encoder is not None:
        peft.PeftModel.from_pretrained(text_encoder, folder / "text_encoder", adapter_name=ADAPTER)
    for module in (unet, text_encoder):
        if module is not None:
            detach(module, merge=True)
