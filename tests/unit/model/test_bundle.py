"""The model folder is an ordinary diffusers folder without pickles, and survives a round trip."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline

from diffva_ray.config.recipe import Recipe, RecipeError, make_recipe
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.model import text
from diffva_ray.model.bundle import build, load, save
from diffva_ray.model.card import UnusableModel
from diffva_ray.storage.local import LocalStore


def embedding(bundle, prompt: str) -> torch.Tensor:
    return text.embed(bundle.text_encoder.eval(), *text.tokenize(bundle.tokenizer, [prompt]))


def test_round_trip_keeps_weights_tokens_and_digest(tiny: Recipe, tmp_path: Path) -> None:
    bundle = build(tiny)
    digest = save(bundle, LocalStore(str(tmp_path)), {})
    again = load(str(tmp_path))
    assert again.digest == digest
    assert again.recipe == tiny
    assert again.tokenizer.model_max_length == tiny.model.tokenizer_length
    with torch.no_grad():
        assert torch.equal(embedding(bundle, "lung opacity"), embedding(again, "lung opacity"))
    for name, module in bundle.modules.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, again.modules[name].state_dict()[key]), f"{name}.{key}"


def test_the_folder_is_an_ordinary_pipeline_without_pooler_or_pickles(model: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(model, safety_checker=None, requires_safety_checker=False)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    image = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    assert image.vae_scale_factor == 4
    files = [path.name for path in model.rglob("*") if ".train" not in path.parts]
    assert not [name for name in files if name.endswith((".bin", ".pt", ".ckpt"))]
    from safetensors import safe_open

    with safe_open(model / "text_encoder" / "model.safetensors", "pt") as weights:
        assert not [key for key in weights.keys() if "pooler" in key]  # noqa: SIM118
    assert json.loads((model / "diffva.json").read_text())["recipe"]["name"] == "tiny"


def test_pickled_weights_are_refused(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnusableModel, match="pickled"):
        load(str(copy))


@pytest.mark.parametrize("name", ["tokenizer/old/words.pkl", "text_encoder/pytorch_model.BIN", "vae/x.ckpt"])
def test_pickles_are_refused_in_any_folder_and_with_any_extension(name: str, model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UnusableModel, match="pickled") as caught:
        load(str(copy))
    assert name in str(caught.value)


class Runs:
    """Creates the file ``trace`` when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_pickle_that_is_called_safetensors_is_refused_and_not_run(
    part: str, model: Path, tiny: Recipe, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "diffva.json").unlink()  # the digest would not match
    torch.save({"weight": Runs(tmp_path / "trace")}, next((copy / part).glob("*.safetensors")))
    with pytest.raises(UnusableModel, match=f"{part}.*not safetensors"):
        load(str(copy), tiny)
    assert not (tmp_path / "trace").exists()


def test_pickles_outside_the_components_are_never_opened(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    for name in ("safety_checker/pytorch_model.bin", "feature_extractor/x.pkl", "v1-4.ckpt"):  # as hubs ship them
        (copy / name).parent.mkdir(exist_ok=True)
        torch.save({"weight": Runs(tmp_path / "trace")}, copy / name)
    assert load(str(copy)).digest == load(str(model)).digest
    assert not (tmp_path / "trace").exists()


def test_changed_weights_are_detected(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    weights = next((copy / "unet").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(UnusableModel, match=r"diffva\.json"):
        load(str(copy))


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UnusableModel, match="diffva train"):
        load(str(tmp_path / "nothing"))


def test_a_bundle_that_an_engine_has_rewritten_is_not_saved(model: Path, tmp_path: Path) -> None:
    """No loader knows the names of its rewritten weights."""
    bundle = load(str(model))
    CounterfactualEngine(bundle, device="cpu")
    with pytest.raises(ValueError, match="load the model again to save"):
        save(bundle, LocalStore(str(tmp_path)), {})
    assert not list(tmp_path.iterdir())


def test_bases_that_cannot_be_trained_are_refused_before_it(tiny: Recipe, model: Path, tmp_path: Path) -> None:
    """As `diffva train --dry-run` does, which builds the networks: inpainting, sample prediction, SD3 and Flux."""
    inpainting = make_recipe({**tiny.model_dump(mode="json")}, ["model.unet.in_channels=9"])
    with pytest.raises(UnusableModel, match="takes 9 channels and its autoencoder gives 4"):
        build(inpainting)
    with pytest.raises(UnusableModel, match="prediction_type sample: not supported"):
        build(make_recipe(tiny.model_dump(mode="json"), ["model.scheduler.prediction_type=sample"]))
    folder = tmp_path / "flux"
    shutil.copytree(model, folder)
    (folder / "unet").rename(folder / "transformer")
    with pytest.raises(UnusableModel, match="a transformer and no UNet"):
        build(based_on(tiny, folder))


def test_a_base_in_half_precision_only_is_loaded(tiny: Recipe, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    DiffusionPipeline.from_pretrained(model, safety_checker=None, requires_safety_checker=False).to(
        dtype=torch.float16
    ).save_pretrained(folder, variant="fp16", safe_serialization=True)
    assert not (folder / "unet" / "diffusion_pytorch_model.safetensors").exists()
    bundle = build(based_on(tiny, folder))
    original = load(str(model)).unet.state_dict()
    for key, value in bundle.unet.state_dict().items():
        assert torch.equal(value, original[key].half().float()), key


def test_a_prompt_that_training_would_cut_is_refused(tiny: Recipe) -> None:
    for key in ("data.prompts.COVID", "data.healthy_prompt"):
        recipe = make_recipe(tiny.model_dump(mode="json"), [f"{key}={'lung ' * 30}"])
        with pytest.raises(RecipeError, match=f"{key}.*more than the 16 tokens"):
            build(recipe)


def based_on(tiny: Recipe, folder: Path) -> Recipe:
    values = tiny.model_dump(mode="json")
    values["model"] |= {"base": str(folder), "vae": None, "unet": None, "text": None}
    return make_recipe(values)
