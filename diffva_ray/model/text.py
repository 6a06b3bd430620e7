"""Prompts to embeddings: any BERT, RoBERTa or CLIP encoder in the place of Stable Diffusion's own."""

from __future__ import annotations

import string
import threading
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextModel,
    PretrainedConfig,
)

from diffva_ray.model.card import UnusableModel
from diffva_ray.storage import is_local, open_store

# Short names of model.text_encoder. Stanford's RadBERT is the paper's; UCSD's is a RoBERTa (Yan et al. 2022).
TEXT_ENCODERS = {
    "radbert": "StanfordAIMI/RadBERT",
    "radbert-roberta": "zzxslp/RadBERT-RoBERTa-4m",
    "biobert": "dmis-lab/biobert-v1.1",
    "cxr-bert": "microsoft/BiomedVLP-CXR-BERT-specialized",
    "pubmedclip": "flaviagiammarino/pubmed-clip-vit-base-patch32",
    "clip": "openai/clip-vit-large-patch14",
}
ROBERTA = ("roberta", "xlm-roberta")

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


def hub_snapshot(name: str) -> tuple[Path, dict[str, str]]:
    """The folder of a text encoder, and where it came from: ``source`` (hub id or folder) and, of the hub, ``commit``.

    ``name`` is one of TEXT_ENCODERS, a hub id (``owner/name`` or ``owner/name@revision``), a folder or s3://. Of a hub
    repository only the PyTorch weights at its root are fetched, safetensors where it has them. Raises UnusableModel.
    """
    if not is_local(name):
        return open_store(name).local_folder(), {"source": name}
    if Path(name).is_dir():
        return Path(name), {"source": name}
    source, _, revision = TEXT_ENCODERS.get(name, name).partition("@")
    wanted = ["*.json", "*.txt", "*.safetensors"]
    try:
        folder = Path(
            snapshot_download(source, revision=revision or None, allow_patterns=wanted, ignore_patterns="*/*")
        )
        if not _weights(folder, "safetensors"):
            wanted = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
            snapshot_download(source, revision=folder.name, allow_patterns=wanted)
    except (OSError, ValueError) as error:
        raise UnusableModel(
            f"text encoder {name}: neither a folder here nor to be had from the hub ({first_line(error)}); the names "
            f"are {', '.join(TEXT_ENCODERS)}"
        ) from None
    return folder, {"source": source, "commit": folder.name}


def _weights(folder: Path, suffix: str) -> list[Path]:
    return [
        file
        for file in folder.iterdir()
        if file.name.startswith(("model", "pytorch_model")) and file.suffix == f".{suffix}"
    ]


def starting_text_encoder(name: str, length: int, attention_mask: bool) -> tuple[Any, Any, dict[str, str]]:
    """A published text encoder to train from, its tokenizer, and where it came from; see ``hub_snapshot``.

    Several medical ones (RadBERT, BioBERT) exist as ``pytorch_model.bin`` alone: those are read by PyTorch's loader
    that builds tensors and nothing else (``weights_only``), and saved as safetensors from then on. Raises
    UnusableModel.
    """
    folder, origin = hub_snapshot(name)
    safetensors, pickled = _weights(folder, "safetensors"), _weights(folder, "bin")
    if not safetensors and not pickled:
        raise UnusableModel(f"text encoder {name}: neither model.safetensors nor pytorch_model.bin in {folder}")
    if not safetensors and tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise UnusableModel(
            f"text encoder {name}: only pickled weights, which torch {torch.__version__} cannot read safely "
            "(CVE-2025-32434); install torch 2.6 or newer"
        )
    encoder, tokenizer = _load(name, str(folder), length, attention_mask, bool(safetensors), {}, {})
    return encoder, tokenizer, origin


def load_text_encoder(source: str, length: int, attention_mask: bool) -> tuple[Any, Any]:
    """The text encoder and tokenizer of a diffusers folder or hub id; safetensors only. Raises UnusableModel."""
    parts = {"subfolder": "text_encoder"}, {"subfolder": "tokenizer"}
    return _load(source, source, length, attention_mask, True, *parts)


def _load(
    name: str, source: str, length: int, attention_mask: bool, safetensors: bool, model_at: Any, tokenizer_at: Any
) -> tuple[Any, Any]:
    """Without pooler (its weights never see a gradient, which DDP refuses) and in float32, whatever the file holds.
    The token length is forced (RadBERT's tokenizer states none, and padding to 1e30 overflows), and kept."""
    try:
        values, _ = PretrainedConfig.get_config_dict(source, **model_at)
        loader: Any = AutoModel
        tokenizers: Any = AutoTokenizer
        extra: dict[str, Any] = {}
        kind = str(values.get("model_type", ""))
        if kind == "cxr-bert":  # a BERT under a name that only its own remote code knows
            names = {key: value for key, value in values.items() if key not in ("model_type", "auto_map")}
            loader, tokenizers, extra["config"] = BertModel, BertTokenizer, BertConfig(**names)
        if kind.startswith("clip"):
            loader = CLIPTextModel  # AutoModel would bring the image half along
        elif kind in ("bert", "cxr-bert", *ROBERTA):
            extra["add_pooling_layer"] = False
        encoder, report = loader.from_pretrained(
            source,
            use_safetensors=safetensors,
            weights_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **extra,
            **model_at,
        )
        tokenizer = tokenizers.from_pretrained(source, trust_remote_code=False, **tokenizer_at)
    except UnpicklingError:
        raise UnusableModel(
            f"text encoder {name}: its pickled weights are damaged or hold more than tensors, which would run code"
        ) from None
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as error:
        if "mismatched_sizes" in str(error):  # transformers' own words are about its options
            raise UnusableModel(f"text encoder {name}: its weights have other shapes than its config.json") from None
        raise UnusableModel(f"text encoder {name}: {first_line(error)}") from None
    if missing := sorted(report["missing_keys"]):
        raise UnusableModel(f"text encoder {name}: its file lacks {len(missing)} weights, such as {missing[0]}")
    encoder = encoder.float()
    words = tokenizer("normal chest scan", add_special_tokens=False).input_ids
    if len(tokenizer) > encoder.config.vocab_size or set(words) <= {tokenizer.unk_token_id}:
        raise UnusableModel(
            f"text encoder {name}: its tokenizer does not fit it (is vocab.txt, vocab.json or merges.txt missing?)"
        )
    longest = encoder.config.max_position_embeddings
    if kind in ROBERTA:
        longest -= encoder.config.pad_token_id + 1  # its positions start behind the padding index
    if length > longest:
        raise UnusableModel(f"text encoder {name}: holds {longest} tokens, model.tokenizer_length is {length}")
    tokenizer.model_max_length = length
    encoder.config.use_attention_mask = attention_mask
    return encoder, tokenizer


# A fast tokenizer keeps padding and truncation in an object that all its calls share: a call of another thread in
# between leaves a prompt unpadded, or cut (huggingface/transformers#47085).
ONE_AT_A_TIME = threading.Lock()


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, each int64 [n, length], padded to the model's length as diffusers does it."""
    with ONE_AT_A_TIME:
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
    with ONE_AT_A_TIME:
        return len(tokenizer(prompt, truncation=False).input_ids) <= tokenizer.model_max_length


def embed(encoder: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Last hidden state [n, length, width]. The mask reaches the encoder only when the model was made so: the
    diffusers pipelines follow the same rule (``config.use_attention_mask``), and training and sampling must agree."""
    used = mask if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(ids, attention_mask=used)[0]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for one-line messages."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
