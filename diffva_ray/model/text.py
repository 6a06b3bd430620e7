"""Text encoders (BERT, RoBERTa or CLIP) that replace Stable Diffusion's own: builds, loads and applies them."""

from __future__ import annotations

import importlib.util
import string
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
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
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import is_local

# Short names for model.text_encoder. The paper uses Stanford's RadBERT; UCSD's is a RoBERTa (Yan et al. 2022).
TEXT_ENCODERS = {
    "radbert": "StanfordAIMI/RadBERT",
    "radbert-roberta": "zzxslp/RadBERT-RoBERTa-4m",
    "biobert": "dmis-lab/biobert-v1.1",
    "cxr-bert": "microsoft/BiomedVLP-CXR-BERT-specialized",
    "pubmedclip": "flaviagiammarino/pubmed-clip-vit-base-patch32",
    "clip": "openai/clip-vit-large-patch14",
}
ROBERTA = ("roberta", "xlm-roberta")

# Words of radiology prompts. All other words are tokenised as characters.
RADIOLOGY = """
normal healthy abnormal chest scan x ray film image lung lungs opacity covid 19 viral pneumonia bacterial heart enlarged
cardiomegaly pneumothorax mass nodule effusion pleural edema oedema consolidation atelectasis infiltrate fibrosis
emphysema hernia fracture carcinoma tumour tumor ground glass reticular interstitial bilateral unilateral peripheral
central diffuse focal patchy left right upper middle lower zone lobe side base apex small mild moderate severe large
no not with without of in on the a and or patient older younger male female man woman child adult year old device wire
marker pacemaker tube catheter finding findings disease infection
""".split()


def build_tokenizer(length: int) -> BertTokenizer:
    """A WordPiece tokenizer of RADIOLOGY words and, for all other words, characters; ``length`` in tokens."""
    characters = string.ascii_lowercase + string.digits + ".,:;!?'\"()[]{}<>+-*/=%&#@_|~^$\\`"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(RADIOLOGY), *characters]
    words += [f"##{character}" for character in string.ascii_lowercase + string.digits]
    return BertTokenizer(vocab={word: n for n, word in enumerate(dict.fromkeys(words))}, model_max_length=length)


def build_text_encoder(tokenizer: BertTokenizer, config: dict[str, Any], attention_mask: bool) -> BertModel:
    """An untrained BERT for the tokenizer, without the pooler, whose weights would never get a gradient."""
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
    """The local folder of a text encoder, and its origin: ``source`` (hub id or folder) and, from the hub, ``commit``.

    ``name`` is one of TEXT_ENCODERS, a hub id (``owner/name`` or ``owner/name@revision``), a folder or s3://. From the
    hub, only the PyTorch weights at the root are downloaded, as safetensors if available. Raises UnusableModel.
    """
    # another store, or a local folder
    if not is_local(name):
        return open_store(name).local_folder(), {"source": name}
    if Path(name).is_dir():
        return Path(name), {"source": name}
    # the hub
    source, _, revision = TEXT_ENCODERS.get(name, name).partition("@")
    patterns = ["*.json", "*.txt", "*.safetensors"]
    download = partial(snapshot_download, source, local_files_only=constants.HF_HUB_OFFLINE)  # hub 1.33 needs telling
    try:
        folder = Path(download(revision=revision or None, allow_patterns=patterns, ignore_patterns="*/*"))
        if not _weights(folder, "safetensors"):
            patterns = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
            download(revision=folder.name, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        raise UnusableModel(
            f"text encoder {name}: neither a local folder nor available from the hub ({first_line(error)}); the short "
            f"names are {', '.join(TEXT_ENCODERS)}"
        ) from None
    return folder, {"source": source, "commit": folder.name}


def _weights(folder: Path, suffix: str) -> list[Path]:
    """Weight files of the text encoder in a folder."""
    return [
        file
        for file in folder.iterdir()
        if file.name.startswith(("model", "pytorch_model")) and file.suffix == f".{suffix}"
    ]


def starting_text_encoder(name: str, length: int, attention_mask: bool) -> tuple[Any, Any, dict[str, str]]:
    """A published text encoder, its tokenizer, and its origin; see ``hub_snapshot``.

    Some medical encoders (RadBERT, BioBERT) are published only as ``pytorch_model.bin``. These are read with
    ``weights_only``, which loads nothing but tensors, and saved as safetensors later. Raises UnusableModel.
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


def variant(source: str | Path, part: str) -> str | None:
    """``fp16`` if the folder ``part`` of a local diffusers folder has its weights in that variant alone."""
    files = [file.name for file in (Path(source) / part).glob("*.safetensors")]
    return "fp16" if files and all(".fp16." in name or ".fp16-" in name for name in files) else None


def _load(
    name: str, source: str, length: int, attention_mask: bool, safetensors: bool, model_at: Any, tokenizer_at: Any
) -> tuple[Any, Any]:
    """Loads text encoder and tokenizer.

    The encoder has no pooler (its weights never get a gradient, which DDP refuses) and is float32 for any file. The
    token length is set to ``length``: RadBERT's tokenizer has none, and padding to the default of 1e30 overflows.
    """
    # choose the classes
    try:
        values, _ = PretrainedConfig.get_config_dict(source, **model_at)
        loader: Any = AutoModel
        tokenizers: Any = AutoTokenizer
        extra: dict[str, Any] = {}
        kind = str(values.get("model_type", ""))
        if kind == "cxr-bert":  # a BERT whose type only its remote code defines
            names = {key: value for key, value in values.items() if key not in ("model_type", "auto_map")}
            loader, tokenizers, extra["config"] = BertModel, BertTokenizer, BertConfig(**names)
        if kind.startswith("clip"):
            loader = CLIPTextModel  # AutoModel would also load the image encoder
        elif kind in ("bert", "cxr-bert", *ROBERTA):
            extra["add_pooling_layer"] = False
        # load; remote code is never run
        encoder, report = loader.from_pretrained(
            source,
            use_safetensors=safetensors,
            weights_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            variant=variant(source, model_at.get("subfolder", "")),
            **extra,
            **model_at,
        )
        tokenizer = tokenizers.from_pretrained(source, trust_remote_code=False, **tokenizer_at)
    except UnpicklingError:
        raise UnusableModel(
            f"text encoder {name}: its pickled weights are damaged or hold more than tensors, which would run code"
        ) from None
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as error:
        if "mismatched_sizes" in str(error):  # transformers' message is about its own options
            raise UnusableModel(f"text encoder {name}: its weights have other shapes than its config.json") from None
        raise UnusableModel(f"text encoder {name}: {first_line(error)}") from None
    if getattr(encoder.config, "is_encoder_decoder", False) or hasattr(encoder, "decoder"):
        raise UnusableModel(
            f"text encoder {name}: {kind} is an encoder with a decoder; models of one stack are taken, such as BERT, "
            "RoBERTa, ELECTRA, DistilBERT, DeBERTa and CLIP"
        )
    if missing := sorted(report["missing_keys"]):
        raise UnusableModel(f"text encoder {name}: its file lacks {len(missing)} weights, such as {missing[0]}")
    encoder = encoder.float()
    # check that tokenizer and encoder fit together
    words = tokenizer("normal chest scan", add_special_tokens=False).input_ids
    if len(tokenizer) > encoder.config.vocab_size or set(words) <= {tokenizer.unk_token_id}:
        raise UnusableModel(
            f"text encoder {name}: its tokenizer does not fit it (is vocab.txt, vocab.json or merges.txt missing?)"
        )
    max_length = encoder.config.max_position_embeddings
    if kind in ROBERTA:
        max_length -= encoder.config.pad_token_id + 1  # positions start behind the padding index
    if length > max_length:
        raise UnusableModel(f"text encoder {name}: takes {max_length} tokens, but model.tokenizer_length is {length}")
    tokenizer.model_max_length = length
    encoder.config.use_attention_mask = attention_mask
    return encoder, tokenizer


# A fast tokenizer keeps padding and truncation in shared state: concurrent calls can return a prompt unpadded or
# truncated (huggingface/transformers#47085).
TOKENIZER_LOCK = threading.Lock()


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, each int64 [n, length], padded to the model's token length as in diffusers."""
    with TOKENIZER_LOCK:
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
    return tokens.input_ids, tokens.attention_mask


def tokens_of(tokenizer: Any, prompt: str) -> int:
    """Number of tokens of the whole prompt, with the special ones."""
    with TOKENIZER_LOCK:
        return len(tokenizer(prompt, truncation=False).input_ids)


def fits(tokenizer: Any, prompt: str) -> bool:
    """Whether the prompt fits the model's token length; a longer one would be truncated silently."""
    return bool(tokens_of(tokenizer, prompt) <= tokenizer.model_max_length)


def embed(encoder: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Last hidden state [n, length, width].

    The mask is used only with ``config.use_attention_mask``, as in diffusers' pipelines, so that training and sampling
    agree.
    """
    used = getattr(encoder.config, "use_attention_mask", False)
    if used and mask.device.type != "cpu" and _reads_prepared_mask(encoder.config):
        mask = mask[:, None, None, :].bool().expand(-1, 1, mask.shape[1], -1)
    states: torch.Tensor = encoder(ids, attention_mask=mask if used else None)[0]
    return states


@torch.no_grad()
def distance(tokenizer: Any, encoder: torch.nn.Module, prompts: Sequence[str]) -> float:
    """The largest distance between the embeddings of two of the prompts, relative to the mean length of all: 0 for an
    encoder to which all are the same."""
    device = next(encoder.parameters()).device
    ids, mask = (tensor.to(device) for tensor in tokenize(tokenizer, prompts))
    states = embed(encoder, ids, mask).flatten(1).double()
    return float(torch.cdist(states, states).max() / states.norm(dim=1).mean())


def _reads_prepared_mask(config: Any) -> bool:
    """Whether an encoder takes a mask [n, 1, length, length] as it is. From one of [n, length] transformers reads a
    value, to see whether it is needed, for which the CPU has to wait for the GPU."""
    bidirectional = config.model_type in ("bert", "roberta", "electra") and config._attn_implementation == "sdpa"
    return bidirectional and importlib.util.find_spec("transformers.masking_utils") is not None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for one-line messages."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
