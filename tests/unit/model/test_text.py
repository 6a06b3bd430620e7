"""Published text encoders replace that of a base: every architecture in its hub layout, and what is refused."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from hub_snapshots import KINDS, WORDS, snapshot
from PIL import Image

from diffva_ray.config.recipe import Recipe, make_recipe
from diffva_ray.model import text
from diffva_ray.model.bundle import build, load, save
from diffva_ray.model.card import UnusableModel
from diffva_ray.storage.local import LocalStore

COMMIT = "62e979a" + "0" * 33


def recipe(tiny: Recipe, model: Path, encoder: str | Path | None, **others: Any) -> Recipe:
    values = tiny.model_dump(mode="json")
    options = {"resolution": 32, "base": str(model), "tokenizer_length": 40, **others}
    values["model"] = {**options, "text_encoder": str(encoder) if encoder else None}
    return make_recipe(values)


@torch.no_grad()
def embedding(bundle, prompt: str = "normal chest scan") -> torch.Tensor:
    return text.embed(bundle.text_encoder.eval(), *text.tokenize(bundle.tokenizer, [prompt]))


@pytest.mark.parametrize(
    ("kind", "width"), [*((kind, 64) for kind in KINDS), ("radbert", 80), ("radbert-roberta", 48), ("pubmedclip", 48)]
)
def test_every_kind_of_encoder_works_from_build_to_pipeline(
    kind: str, width: int, model: Path, tiny: Recipe, tmp_path: Path
) -> None:
    """In a base of width 64, after save and load, and in diffusers' own pipeline."""
    bundle = build(recipe(tiny, model, snapshot(kind, tmp_path / kind, width)))
    names = [name for name, _ in bundle.text_encoder.named_parameters()]
    assert not [name for name in names if "pooler" in name or "vision" in name or "projection" in name]
    assert bundle.tokenizer.model_max_length == 40
    ids, mask = text.tokenize(bundle.tokenizer, ["normal chest scan", "a prompt which is longer than twelve tokens"])
    assert ids.shape == mask.shape == (2, 40)
    states = embedding(bundle)
    assert states.shape == (1, 40, width)
    assert (embedding(bundle, "lung opacity") - states).abs().max() > 0.01

    store = LocalStore(str(tmp_path / "saved"))
    digest = save(bundle, store, {})
    again = load(store.uri)
    assert again.digest == digest
    assert torch.equal(embedding(again), states)
    for name, value in bundle.unet.state_dict().items():
        assert torch.equal(value, again.unet.state_dict()[name]), name
    assert json.loads((tmp_path / "saved/diffva.json").read_text())["text_source"] == {"source": str(tmp_path / kind)}
    assert not list((tmp_path / "saved").rglob("*.bin"))

    pipeline = DiffusionPipeline.from_pretrained(store.uri, safety_checker=None, requires_safety_checker=False)
    image_to_image = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    image_to_image.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.full((32, 32, 3), 128, np.uint8))
    counterfactual = image_to_image(
        "normal chest scan", image=image, strength=0.5, num_inference_steps=4, output_type="np"
    )
    assert counterfactual.images.shape == (1, 32, 32, 3)
    assert np.isfinite(counterfactual.images).all()
    expected = image_to_image.encode_prompt("normal chest scan", "cpu", 1, False)[0]
    assert torch.allclose(expected, states, atol=1e-6)


@pytest.mark.parametrize("kind", ["radbert", "radbert-roberta", "cxr-bert", "pubmedclip"])
def test_the_weights_are_the_published_ones(kind: str, model: Path, tiny: Recipe, tmp_path: Path) -> None:
    """Names differ between a checkpoint with heads and the encoder alone; no weight may stay at its random start."""
    folder = snapshot(kind, tmp_path / kind, 64)
    file = folder / "pytorch_model.bin"
    if file.exists():
        published = torch.load(file, weights_only=True)
    else:
        from safetensors.torch import load_file

        published = load_file(folder / "model.safetensors")
    prefixes = ("", "bert.", "roberta.", "text_model.")
    for name, value in build(recipe(tiny, model, folder)).text_encoder.state_dict().items():
        candidates = [published[prefix + name] for prefix in prefixes if prefix + name in published]
        assert any(torch.equal(value, candidate) for candidate in candidates), name


def test_short_names_and_hub_ids_find_the_snapshot_and_its_commit(
    model: Path, tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--StanfordAIMI--RadBERT"
    snapshot("radbert", repository / "snapshots" / COMMIT, 64)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    states = [
        embedding(build(recipe(tiny, model, name)))
        for name in ("radbert", "StanfordAIMI/RadBERT", f"StanfordAIMI/RadBERT@{COMMIT}")
    ]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
    bundle = build(recipe(tiny, model, "radbert"))
    store = LocalStore(str(tmp_path / "saved"))
    save(bundle, store, {})
    card = json.loads(store.read("diffva.json"))
    assert card["text_source"] == {"source": "StanfordAIMI/RadBERT", "commit": COMMIT}
    assert build(recipe(tiny, tmp_path / "saved", None)).text_source == card["text_source"]
    with pytest.raises(UnusableModel, match=r"biobert.*neither a local folder nor.*radbert-roberta"):
        build(recipe(tiny, model, "biobert"))


class Runs:
    """Creates the file ``trace`` when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        import os

        return (os.system, (f"touch {self.trace}",))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_not_run(
    legacy: bool, model: Path, tiny: Recipe, tmp_path: Path
) -> None:
    folder = snapshot("radbert", tmp_path / "radbert", 64)
    payload = {"bert.embeddings.word_embeddings.weight": Runs(tmp_path / "trace")}
    torch.save(payload, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnusableModel, match="hold more than tensors, which would run code"):
        build(recipe(tiny, model, folder))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(tmp_path / "trace")))
    with pytest.raises(UnusableModel, match="text encoder"):
        build(recipe(tiny, model, folder))
    assert not (tmp_path / "trace").exists()


def test_an_older_torch_is_refused_with_the_required_version(
    model: Path, tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = snapshot("radbert", tmp_path / "radbert", 64)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(UnusableModel, match=r"torch 2\.5\.1.*install torch 2\.6"):
        build(recipe(tiny, model, folder))


def test_unusable_snapshots_are_one_line(model: Path, tiny: Recipe, tmp_path: Path) -> None:
    def refuses(match: str, **others: Any) -> None:
        with pytest.raises(UnusableModel, match=match) as caught:
            build(recipe(tiny, model, folder, **others))
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)

    folder = snapshot("radbert-roberta", tmp_path / "encoder", 64)
    refuses("takes 40 tokens, but model.tokenizer_length is 41", tokenizer_length=41)
    (folder / "vocab.json").unlink()
    refuses("encoder")
    folder = snapshot("radbert", tmp_path / "encoder", 64)
    (folder / "vocab.txt").write_text("\n".join(WORDS[:5]))
    refuses("tokenizer does not fit")
    snapshot("radbert", folder, 64)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 24}))
    refuses("other shapes")
    snapshot("radbert", folder, 64)
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del weights["bert.encoder.layer.1.output.dense.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    refuses("lacks 1 weights, such as")
    (folder / "pytorch_model.bin").unlink()
    refuses("neither model.safetensors nor pytorch_model.bin")


def test_every_word_is_tokenised() -> None:
    tokenizer = text.build_tokenizer(16)
    for prompt in ("normal chest scan", "COVID 19", "Viral Pneumonia", "sarcoidosis, stage 2?", "Zebra-42"):
        assert tokenizer.unk_token_id not in tokenizer(prompt).input_ids
    assert text.fits(tokenizer, "normal chest scan")
    assert not text.fits(tokenizer, "a very long prompt about absolutely everything there is")


def test_threads_share_a_tokenizer() -> None:
    """Threads call ``fits`` while the engine tokenises; both set padding and truncation of the same object."""
    tokenizer = text.build_tokenizer(16)
    prompts = [f"normal chest scan {n}" for n in range(40)]
    expected = text.tokenize(tokenizer, prompts)[0]
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(lambda: [text.fits(tokenizer, prompt) for prompt in prompts * 20]) for _ in range(3)]
        for _ in range(60):
            for n, prompt in enumerate(prompts):
                assert torch.equal(text.tokenize(tokenizer, [prompt])[0][0], expected[n])
        assert all(all(future.result()) for future in futures)


def test_an_encoder_with_a_decoder_says_which_are_taken(model: Path, tiny: Recipe, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    config = T5Config(vocab_size=200, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path / "t5", safe_serialization=True)
    AutoTokenizer.from_pretrained(model / "tokenizer").save_pretrained(tmp_path / "t5")
    with pytest.raises(UnusableModel, match="t5 is an encoder with a decoder; models of one stack are taken"):
        build(recipe(tiny, model, tmp_path / "t5"))
