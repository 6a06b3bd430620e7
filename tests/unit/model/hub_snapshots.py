"""Tiny text encoders with the same files and the same defects as the real ones on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForPreTraining,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    RobertaConfig,
    RobertaForMaskedLM,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "normal", "chest", "scan", "lung", "opacity", "covid", "19"]


def size(width: int) -> dict[str, int]:
    return {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values))


def pickled(model: torch.nn.Module, folder: Path) -> None:
    """Writes ``pytorch_model.bin`` alone, with the head and the pooler of pre-training."""
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def word_pieces(folder: Path, settings: dict) -> None:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    write_json(folder / "tokenizer_config.json", settings)


def byte_pairs(folder: Path, special: list[str], settings: dict, end: str) -> None:
    """Writes a byte-level vocabulary of single characters, with one merge."""
    letters = [chr(n) for n in range(33, 127)]
    tokens = [*special, *letters, *((letter + end for letter in letters) if end else ["Ġ"]), "no"]
    write_json(folder / "vocab.json", {token: n for n, token in enumerate(dict.fromkeys(tokens))})
    (folder / "merges.txt").write_text("#version: 0.2\nn o\n")
    write_json(folder / "tokenizer_config.json", settings)


def radbert(folder: Path, width: int) -> None:
    """StanfordAIMI/RadBERT: weights only as .bin; a tokenizer configuration without a token length."""
    pickled(BertForPreTraining(BertConfig(vocab_size=len(WORDS), max_position_embeddings=40, **size(width))), folder)
    word_pieces(folder, {"special_tokens_map_file": None, "full_tokenizer_file": None})
    names = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
    write_json(folder / "special_tokens_map.json", {f"{key}_token": token for key, token in names.items()})


def radbert_roberta(folder: Path, width: int) -> None:
    """zzxslp/RadBERT-RoBERTa-4m: byte-level BPE; positions start at 2."""
    config = RobertaConfig(vocab_size=120, max_position_embeddings=42, pad_token_id=1, type_vocab_size=1, **size(width))
    pickled(RobertaForMaskedLM(config), folder)
    byte_pairs(folder, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], {"model_max_length": 512}, "")


def biobert(folder: Path, width: int) -> None:
    """dmis-lab/biobert-v1.1: a cased BERT."""
    pickled(BertForPreTraining(BertConfig(vocab_size=len(WORDS), max_position_embeddings=40, **size(width))), folder)
    word_pieces(folder, {"do_lower_case": False})


def cxr_bert(folder: Path, width: int) -> None:
    """microsoft/BiomedVLP-CXR-BERT-specialized: a BERT whose type only its remote code defines."""
    radbert(folder, width)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "cxr-bert", "auto_map": {"AutoModel": "modeling_cxrbert.CXRBertModel"}}
    write_json(folder / "config.json", {**config, "projection_size": 8})
    word_pieces(folder, {"tokenizer_class": "CXRBertTokenizer"})
    (folder / "modeling_cxrbert.py").write_text("raise RuntimeError('remote code ran')\n")


def clip_words(folder: Path) -> None:
    special = ["<|startoftext|>", "<|endoftext|>"]
    end = {"unk_token": special[1], "bos_token": special[0], "eos_token": special[1], "pad_token": special[1]}
    byte_pairs(folder, special, {**end, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77}, "</w>")


def clip_text(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(vocab_size=191, max_position_embeddings=40, bos_token_id=0, eos_token_id=1, **size(width))


def pubmedclip(folder: Path, width: int) -> None:
    """flaviagiammarino/pubmed-clip-vit-base-patch32: a whole CLIPModel with image and text encoder."""
    vision = CLIPVisionConfig(image_size=32, patch_size=16, **size(32))
    text = clip_text(width).to_dict()
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(folder)
    clip_words(folder)


def clip(folder: Path, width: int) -> None:
    """The text encoder of a CLIP alone."""
    CLIPTextModel(clip_text(width)).save_pretrained(folder)
    clip_words(folder)


KINDS = {
    "radbert": radbert,
    "radbert-roberta": radbert_roberta,
    "biobert": biobert,
    "cxr-bert": cxr_bert,
    "pubmedclip": pubmedclip,
    "clip": clip,
}


def snapshot(kind: str, folder: Path, width: int) -> Path:
    """Writes a tiny checkpoint of that kind to ``folder``; always the same weights."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(width)
        KINDS[kind](folder, width)
    return folder
