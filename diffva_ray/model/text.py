"""Prompts to embeddings: any BERT, RoBERTa or CLIP encoder in the place of Stable Diffusion's own."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer, CLIPTextModel

from diffva_ray.model.card import UnusableModel

# Words a radiology prompt is made of; anything else falls apart into characters, so that every word is tokenised.
RADIOLOGY = """
normal healthy abnormal chest scan x ray film image lung lungs opacity covid 19 viral pneumonia bacterial heart enlarged
cardiomegaly pneumothorax mass nodule effusion pleural edema oedema consolidation atelectasis infiltrate fibrosis
emphysema hernia fracture carcinoma tumour tumor ground glass reticular interstitial bilateral unilateral peripheral
central diffuse focal patchy left right upper middle lower zone lobe side base apex small mild moderate severe large
no not with without of in on the a and or patient older younger male female man woman child adult year old device wire
marker pacemaker tube catheter finding findings disease infection
""".split()


def build_tokenizer(length: int) -> BertTokenizer:
    """A WordPiece tokenizer over radiology words and, for all others, characters."""
    characters = string.ascii_lowercase + string.digits + ".,:;!?'\"()[]{}<>+-*/=%&#@_|~^$\\`"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(RADIOLOGY), *characters]
    words += [f"##{character}" for character in string.ascii_lowercase + string.digits]
    return BertTokenizer(vocab={word: n for n, word in enumerate(dict.fromkeys(words))}, model_max_length=length)


def build_text_encoder(tokenizer: BertTokenizer, config: dict[str, Any], attention_mask: bool) -> BertModel:
    """A BERT from scratch for that tokenizer, without the pooler (its weights would never see a gradient)."""
    settings = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **config,
    )
    settings.use_attention_mask = attention_mask
    return BertModel(settings, add_pooling_layer=False)


def load_text_encoder(
    source: str, length: int, attention_mask: bool, subfolders: bool = False
) -> tuple[torch.nn.Module, Any]:
    """A text encoder and its tokenizer from a hub id or local snapshot; ``subfolders``: from a diffusers folder.

    The token length is forced (RadBERT's tokenizer states none, and padding to 1e30 overflows) and kept with the
    model. Raises UnusableModel for encoders without safetensors.
    """
    model_folder = {"subfolder": "text_encoder"} if subfolders else {}
    tokenizer_folder = {"subfolder": "tokenizer"} if subfolders else {}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **model_folder)
        loader: Any = AutoModel
        extra: dict[str, Any] = {}
        if config.model_type.startswith("clip"):
            loader = CLIPTextModel  # AutoModel would bring the image half along
        elif config.model_type in ("bert", "roberta", "xlm-roberta"):
            extra["add_pooling_layer"] = False
        encoder = loader.from_pretrained(source, use_safetensors=True, trust_remote_code=False, **extra, **model_folder)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **tokenizer_folder)
    except OSError as error:
        raise UnusableModel(f"text encoder {source}: {first_line(error)}") from None
    longest = getattr(encoder.config, "max_position_embeddings", length)
    if encoder.config.model_type in ("roberta", "xlm-roberta"):
        longest -= 2  # RoBERTa's positions start behind the padding index
    if length > longest:
        raise UnusableModel(f"text encoder {source}: holds {longest} tokens, model.tokenizer_length is {length}")
    tokenizer.model_max_length = length
    encoder.config.use_attention_mask = attention_mask
    return encoder, tokenizer


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, each int64 [n, length], padded to the model's length as diffusers does it."""
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return tokens.input_ids, tokens.attention_mask


def fits(tokenizer: Any, prompt: str) -> bool:
    """Whether the whole prompt fits the model's token length; a longer one would be cut without a word."""
    return len(tokenizer(prompt, truncation=False).input_ids) <= tokenizer.model_max_length


def embed(encoder: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Last hidden state [n, length, width]. The mask reaches the encoder only when the model was made so: the
    diffusers pipelines follow the same rule (``config.use_attention_mask``), and training and sampling must agree."""
    used = mask if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(ids, attention_mask=used)[0]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for one-line messages."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
