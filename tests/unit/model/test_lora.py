"""Adapters change nothing when attached, are all that is trained, and work the same merged or unmerged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from hub_snapshots import snapshot
from safetensors.torch import load_file, save_file

from diffva_ray.config.recipe import Recipe, make_recipe
from diffva_ray.config.training import LoraConfig
from diffva_ray.model import lora, text
from diffva_ray.model.bundle import Bundle, build, load, save
from diffva_ray.model.card import UnusableModel, folder_digest
from diffva_ray.storage.local import LocalStore

KINDS = ["radbert", "radbert-roberta", "pubmedclip"]


def with_lora(tiny: Recipe, model: Path, encoder: Path, merge: bool = True) -> Recipe:
    values = tiny.model_dump(mode="json")
    values["model"] = {"resolution": 32, "base": str(model), "text_encoder": str(encoder), "tokenizer_length": 40}
    values["train"]["lora"] = {"rank": 3, "alpha": 12, "merge": merge}
    return make_recipe(values)


def predict(unet, text_encoder, tokenizer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    states = text.embed(text_encoder, *text.tokenize(tokenizer, ["normal chest scan", "covid 19"]))
    return unet(sample, torch.tensor([100, 700]), encoder_hidden_states=states).sample


@torch.no_grad()
def output(bundle: Bundle) -> torch.Tensor:
    bundle.unet.eval()
    return predict(bundle.unet, bundle.text_encoder.eval(), bundle.tokenizer)


def weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    both = {"unet": bundle.unet, "text_encoder": bundle.text_encoder}
    return {
        f"{part}.{name}": value.clone() for part, module in both.items() for name, value in module.named_parameters()
    }


def adapted(bundle: Bundle, steps: int = 4) -> dict[str, torch.Tensor]:
    """Attaches adapters and trains a few steps; returns all weights before the first step."""
    config = bundle.recipe.train.lora
    assert config is not None
    lora.attach(bundle.unet, bundle.text_encoder, config, seed=1)
    before = weights(bundle)
    parameters = [p for module in (bundle.unet, bundle.text_encoder) for p in lora.adapter_parameters(module).values()]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    for _ in range(steps):
        predict(bundle.unet, bundle.text_encoder, bundle.tokenizer).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return before


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_are_trained_and_merging_them_changes_nothing(
    kind: str, model: Path, tiny: Recipe, tmp_path: Path
) -> None:
    recipe = with_lora(tiny, model, snapshot(kind, tmp_path / kind, 64))
    bundle = build(recipe)
    plain, untouched = output(bundle), weights(bundle)
    lora.attach(bundle.unet, bundle.text_encoder, recipe.train.lora, seed=1)
    assert torch.equal(output(bundle), plain)

    bundle = build(recipe)
    before = adapted(bundle)
    moved = {name for name, value in weights(bundle).items() if not torch.equal(value, before[name])}
    assert moved
    assert all(".lora_A." in name or ".lora_B." in name for name in moved)
    for part, module in (("unet", bundle.unet), ("text_encoder", bundle.text_encoder)):
        names = lora.adapter_parameters(module)
        trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        assert trainable == names.keys()
        assert {f"{part}.{name}" for name in names if ".lora_B." in name} <= moved, part
    at = {name.split(".lora_A.")[0] for name in lora.adapter_parameters(bundle.text_encoder) if ".lora_A." in name}
    parts = {"q_proj", "k_proj", "v_proj", "out_proj"} if kind == "pubmedclip" else {"query", "key", "value"}
    assert {name.rpartition(".")[2] for name in at} == parts

    trained = output(bundle)
    assert (trained - plain).abs().max() > 1e-3
    store = LocalStore(str(tmp_path / "merged"))
    save(bundle, store, {})
    assert not (tmp_path / "merged" / "lora").exists()
    assert weights(bundle).keys() == untouched.keys()
    assert (output(bundle) - trained).abs().max() < 1e-5
    assert torch.equal(output(load(store.uri)), output(bundle))


@pytest.mark.parametrize("kind", KINDS)
def test_unmerged_adapters_are_loaded_again(kind: str, model: Path, tiny: Recipe, tmp_path: Path) -> None:
    """By our loader, and by diffusers' and peft's own."""
    recipe = with_lora(tiny, model, snapshot(kind, tmp_path / kind, 64), merge=False)
    bundle = build(recipe)
    plain, untouched = output(bundle), weights(bundle)
    adapted(bundle)
    trained = output(bundle)
    folder = tmp_path / "beside"
    digest = save(bundle, LocalStore(str(folder)), {})
    assert (output(bundle) - trained).abs().max() < 1e-5

    again = load(str(folder))
    assert again.digest == digest
    assert (output(again) - trained).abs().max() < 1e-5
    assert weights(again).keys() == untouched.keys()
    assert not lora.attached(again.unet)
    continued = with_lora(tiny, folder, tmp_path / kind).model_dump(mode="json")
    continued["model"]["text_encoder"] = None
    assert torch.equal(output(build(make_recipe(continued))), output(again))

    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    for name, value in untouched.items():
        part, _, inner = name.partition(".")
        assert torch.equal(value, getattr(pipeline, part).state_dict()[inner]), name
    pipeline.load_lora_weights(folder / "lora")
    if kind != "pubmedclip":
        import peft

        peft.PeftModel.from_pretrained(pipeline.text_encoder, folder / "lora" / "text_encoder")
    with torch.no_grad():
        theirs = predict(pipeline.unet.eval(), pipeline.text_encoder.eval(), pipeline.tokenizer)
    assert (theirs - trained).abs().max() < 1e-5
    assert (theirs - plain).abs().max() > 1e-3


def test_the_digest_covers_adapters(model: Path, tiny: Recipe, tmp_path: Path) -> None:
    bundle = build(with_lora(tiny, model, snapshot("radbert", tmp_path / "radbert", 64), merge=False))
    adapted(bundle, steps=1)
    folder = tmp_path / "beside"
    digest = save(bundle, LocalStore(str(folder)), {})
    for file in (folder / "lora" / lora.FILE, folder / "lora" / "text_encoder" / "adapter_model.safetensors"):
        kept = file.read_bytes()
        save_file({name: value + 1 for name, value in load_file(file).items()}, file)
        assert folder_digest(folder) != digest
        with pytest.raises(UnusableModel, match=r"diffva\.json"):
            load(str(folder))
        file.write_bytes(kept)
    (folder / "lora" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnusableModel, match="pickled"):
        load(str(folder))


def test_a_new_projection_is_trained_with_the_adapters(model: Path, tiny: Recipe, tmp_path: Path) -> None:
    bundle = build(with_lora(tiny, model, snapshot("pubmedclip", tmp_path / "clip", 48), merge=False))
    before = adapted(bundle)
    for name in ("encoder_hid_proj.weight", "encoder_hid_proj.bias"):
        assert not torch.equal(bundle.unet.get_parameter(name), before[f"unet.{name}"])
    trained = output(bundle)
    save(bundle, LocalStore(str(tmp_path / "saved")), {})
    assert (output(load(str(tmp_path / "saved"))) - trained).abs().max() < 1e-5


def test_attaching_is_seeded_and_leaves_the_random_state(tiny: Recipe) -> None:
    first, second = build(tiny), build(tiny)
    state = torch.get_rng_state()
    lora.attach(first.unet, first.text_encoder, LoraConfig(rank=2), seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    lora.attach(second.unet, second.text_encoder, LoraConfig(rank=2), seed=7)
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


def test_peft_missing_is_one_line(tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    bundle = build(tiny)
    with pytest.raises(UnusableModel, match=r"peft is needed for LoRA .*diffva-ray\[lora\]"):
        lora.attach(bundle.unet, bundle.text_encoder, LoraConfig(), seed=0)


def test_a_text_encoder_with_other_layers_is_one_line(tiny: Recipe) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    encoder = DistilBertModel(DistilBertConfig(vocab_size=50, dim=16, n_heads=2, n_layers=1, hidden_dim=16))
    with pytest.raises(UnusableModel, match="a distilbert has no layers query, key, value"):
        lora.attach(build(tiny).unet, encoder, LoraConfig(rank=2), 0)
