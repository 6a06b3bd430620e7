"""Method ``controlnet`` with several ControlNets and with the user's own condition images."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetImg2ImgPipeline
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image

from diffva_ray.cli import main
from diffva_ray.config.generation import ControlNetConfig
from diffva_ray.config.recipe import Recipe
from diffva_ray.config.sampling import SamplingSettings
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.conditions import condition
from diffva_ray.data.phantoms import phantom
from diffva_ray.generate.cost import calls
from diffva_ray.model.bundle import Bundle, build, load, save
from diffva_ray.model.card import UnusableModel
from diffva_ray.storage.local import LocalStore

PHANTOMS = [phantom(label, n, seed=1, size=32) for n, label in enumerate(["COVID", "Lung_Opacity", "Normal"])]
IMAGES = [np.round(each.image * 255).astype(np.float32) / 255 for each in PHANTOMS]
LUNGS = [each.lungs for each in PHANTOMS]
SETTINGS = SamplingSettings(
    method="controlnet", scheduler="ddim", strength=0.6, guidance_scale=3.0, num_inference_steps=10
)
COLOURS = np.random.default_rng(4).random((3, 3, 32, 32)).astype(np.float32)  # [images, channels, height, width]
OWN = [{"condition.depth": image} for image in COLOURS]
NAMES = (["lungs", "edges"], ["condition.depth"])


def controls(bundle: Bundle, names: tuple[list[str], ...] = NAMES) -> list[ControlNetModel]:
    """A ControlNet with random weights for each list of conditions, in the bundle under diffusers' folder names."""
    networks = []
    for number, conditions in enumerate(names):
        torch.manual_seed(3 + number)
        network = ControlNetModel.from_unet(bundle.unet, conditioning_embedding_out_channels=(8, 16, 16))
        network.register_to_config(conditions=conditions)
        for parameter in network.parameters():
            if not parameter.any():  # the output layers, which are zero before training
                torch.nn.init.normal_(parameter, std=0.05)
        bundle.extras["controlnet" + (f"_{number}" if number else "")] = network.eval()
        networks.append(network)
    return networks


def generate(bundle: Bundle, weights: float | tuple[float, ...], own: list[dict] | None = OWN) -> np.ndarray:
    options = ControlNetConfig(conditioning_scale=weights)
    changes = {"controlnet": options, "posterior": "sample", "micro_batch": 3, "source_prompt": ""}
    engine = CounterfactualEngine(bundle, bundle.recipe.generate.model_copy(update=changes), "cpu")
    return engine(IMAGES, [1, 2, 3], settings=SETTINGS, lungs=LUNGS, conditions=own).counterfactuals


def test_two_controls_are_the_pipeline_with_a_multi_controlnet(tiny: Recipe) -> None:
    bundle = build(tiny)
    networks = controls(bundle)
    ours = generate(bundle, (0.9, 0.4))
    pipeline = StableDiffusionControlNetImg2ImgPipeline(
        vae=bundle.vae, text_encoder=bundle.text_encoder, tokenizer=bundle.tokenizer, unet=bundle.unet,
        controlnet=MultiControlNetModel(networks),
        scheduler=DDIMScheduler.from_config(
            bundle.scheduler, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    computed = [condition(image, lungs, NAMES[0]) for image, lungs in zip(IMAGES, LUNGS, strict=True)]
    theirs = pipeline(
        prompt=["normal chest scan"] * 3,
        image=[Image.fromarray(np.round(image * 255).astype(np.uint8)).convert("RGB") for image in IMAGES],
        control_image=[torch.from_numpy(np.stack(computed)), torch.from_numpy(COLOURS)],
        controlnet_conditioning_scale=[0.9, 0.4],
        strength=SETTINGS.strength, guidance_scale=SETTINGS.guidance_scale,
        num_inference_steps=SETTINGS.num_inference_steps,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2, 3)],
        output_type="pt",
    ).images  # fmt: skip
    assert np.abs(ours - theirs.mean(dim=1).numpy()).max() < 1e-5


def test_weight_zero_leaves_a_control_out_and_two_differ_from_one(tiny: Recipe) -> None:
    bundle, alone = build(tiny), build(tiny)
    controls(bundle)
    controls(alone, NAMES[:1])
    first, second, both = generate(bundle, (0.8, 0.0)), generate(bundle, (0.0, 0.8)), generate(bundle, 0.8)
    assert np.array_equal(first, generate(alone, 0.8, own=None))
    assert np.array_equal(first, generate(bundle, (0.8, 0.0), own=None)), "a control left out reads no image"
    assert np.array_equal(both, generate(bundle, (0.8, 0.8)))
    assert not np.array_equal(both, first)
    assert not np.array_equal(both, second)
    assert not np.array_equal(both, generate(bundle, 0.8, [{"condition.depth": 1 - image} for image in COLOURS]))


def test_a_missing_image_and_a_wrong_number_of_weights_are_one_line(tiny: Recipe) -> None:
    bundle = build(tiny)
    controls(bundle)
    with pytest.raises(UnusableModel, match=r"an image condition\.depth for every X-ray, and 2 of 3 have one"):
        generate(bundle, 0.8, [*OWN[:2], {}])
    with pytest.raises(UnusableModel, match=r"3 weights for 2 ControlNets \(lungs\+edges, condition\.depth\)"):
        generate(bundle, (1.0, 1.0, 1.0))
    for value in (-1, [], [0.5, "x"], True, float("nan")):
        with pytest.raises(ValueError, match="one weight of 0 or more, or one for each ControlNet"):
            ControlNetConfig(conditioning_scale=value)


@pytest.mark.parametrize(("weights", "count"), [(0.8, 2), ((0.8, 0.3), 2), ((0.8, 0.0), 1), (0.0, 0)])
def test_calls_count_the_controls_in_use(weights: float | tuple[float, ...], count: int, tiny: Recipe) -> None:
    config = tiny.generate.model_copy(update={"controlnet": ControlNetConfig(conditioning_scale=weights)})
    settings = {**config.model_dump(), **SETTINGS.model_dump()}
    assert calls(settings, 4, controlnets=2).controlnet == count * 2 * 6


def test_the_folders_are_those_of_diffusers(tiny: Recipe, tmp_path: Path) -> None:
    bundle = build(tiny)
    networks = controls(bundle)
    digest = save(bundle, LocalStore(str(tmp_path)), {})
    saved = MultiControlNetModel.from_pretrained(str(tmp_path / "controlnet"))
    for ours, theirs in zip(networks, saved.nets, strict=True):
        assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
    again = load(str(tmp_path))
    assert [list(network.config.conditions) for network in again.controlnets] == [*NAMES]
    weights = tmp_path / "controlnet_1/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UnusableModel, match="its weights are not those of"):
        load(str(tmp_path))
    assert digest == again.digest


# The commands, on a manifest


@pytest.fixture(scope="module")
def made(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with two ControlNets, and a folder with X-rays, depth images and their manifest."""
    folder = tmp_path_factory.mktemp("controls")
    bundle = build(tiny)
    controls(bundle)
    (folder / "model").mkdir()
    save(bundle, LocalStore(str(folder / "model")), {})
    data = folder / "data"
    (data / "depth").mkdir(parents=True)
    rows = [("path", "label", "condition.depth")]
    for n, (image, colours) in enumerate(zip(IMAGES[:2], COLOURS)):
        Image.fromarray(np.round(image * 255).astype(np.uint8)).save(data / f"{n}.png")
        depth = np.round(np.moveaxis(colours, 0, -1) * 255).astype(np.uint8)
        Image.fromarray(depth).save(data / f"depth/{n}.png")
        rows.append((f"{n}.png", "COVID", f"depth/{n}.png"))
    write_table(data / "images.csv", rows)
    return folder / "model", data


def write_table(file: Path, rows: list[tuple[str, ...]]) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return file


def diffva(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def run(model: Path, table: Path, out: Path, *more: object) -> Result:
    return diffva("generate", "--data", table, "--model", model, "--out", out, "--method", "controlnet",
                  "--scheduler", "ddim", "--executor", "inline", *more)  # fmt: skip


def test_generate_takes_condition_images_from_the_table_and_explain_from_an_option(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = made
    done = run(model, data / "images.csv", tmp_path / "run")
    assert done.exit_code == 0, done.output
    records = pd.read_parquet(tmp_path / "run/records").sort_values("image_path").reset_index(drop=True)
    assert records["condition.depth"].tolist() == ["depth/0.png", "depth/1.png"]
    assert set(records["status"]) == {"ok"}
    options = ("--model", model, "--method", "controlnet", "--scheduler", "ddim", "--json", "--out", tmp_path / "x.png")
    found = diffva("explain", data / "0.png", *options, "--condition", f"depth={data / 'depth/0.png'}")
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    assert answer["answers"][0]["counterfactual_sha256"] == records["counterfactual_sha256"][0]
    assert answer["conditions"]["condition.depth"]["path"] == str(data / "depth/0.png")
    other = diffva("explain", data / "0.png", *options, "--condition", f"depth={data / 'depth/1.png'}")
    assert json.loads(other.stdout)["answers"][0]["counterfactual_sha256"] != records["counterfactual_sha256"][0]
    # weights are part of the fingerprint
    changed = run(model, data / "images.csv", tmp_path / "run", "--set", "generate.controlnet.conditioning_scale=[1,0]")
    assert changed.exit_code == 3
    assert "controlnet" in changed.stderr


def test_unusable_condition_images_are_rows_that_name_the_file(made: tuple[Path, Path], tmp_path: Path) -> None:
    model, source = made
    data = tmp_path / "data"
    data.mkdir()
    bad = ["good.png", "gone.png", "wide.png", "text.png", ""]
    for n in range(len(bad)):
        (data / f"{n}.png").write_bytes((source / "0.png").read_bytes())
    (data / "good.png").write_bytes((source / "depth/0.png").read_bytes())
    Image.new("RGB", (64, 32), "red").save(data / "wide.png")
    (data / "text.png").write_text("no image")
    rows = [("path", "label", "condition.depth"), *((f"{n}.png", "COVID", name) for n, name in enumerate(bad))]
    table = write_table(data / "images.csv", rows)
    done = run(model, table, tmp_path / "run", "--set", "evaluate.max_quarantined_fraction=1")
    assert done.exit_code == 0, done.output
    assert "1 condition images named in images.csv do not exist" in done.stderr
    records = pd.read_parquet(tmp_path / "run/records").set_index("image_path").sort_index()
    assert records["status"].tolist() == ["ok", "error", "bad_image", "bad_image", "missing"]
    for name, words in {
        "1.png": "its condition image gone.png (condition.depth) cannot be read (FileNotFoundError)",
        "2.png": "its condition image wide.png (condition.depth): has 64 x 32 pixels and its X-ray 32 x 32: other",
        "3.png": "its condition image text.png (condition.depth): not an image",
        "4.png": "the data set names no image in column condition.depth",
    }.items():
        assert records.loc[name, "error"].startswith(words), name
    alone = run(model, write_table(data / "good.csv", rows[:2]), tmp_path / "alone")
    assert alone.exit_code == 0
    pixels = pd.read_parquet(tmp_path / "alone/records")["counterfactual_sha256"][0]
    assert records.loc["0.png", "counterfactual_sha256"] == pixels, "unusable neighbours change no pixel"


WRONG: dict[str, tuple[Callable[[Path, Path, Path], Result], str]] = {
    "no column": (
        lambda model, data, out: run(model, write_table(data / "plain.csv", [("path", "label"), ("0.png", "COVID")]),
                                     out, "--dry-run"),
        "the data set has no column condition.depth; add it to the table of --data, or give this ControlNet the weight",
    ),
    "three weights": (
        lambda model, data, out: run(model, data / "images.csv", out, "--dry-run", "--set",
                                     "generate.controlnet.conditioning_scale=[1,1,1]"),
        "3 weights for 2 ControlNets (lungs+edges, condition.depth); give one for all, or one for each",
    ),
    "a weight below zero": (
        lambda model, data, out: run(model, data / "images.csv", out, "--set",
                                     "generate.controlnet.conditioning_scale=-1"),
        "generate.controlnet.conditioning_scale: write one weight of 0 or more, or one for each ControlNet as",
    ),
    "no --condition": (
        lambda model, data, out: diffva("explain", data / "0.png", "--model", model, "--method", "controlnet"),
        "the model's ControlNet reads a condition image 'depth'; give --condition depth=FILE",
    ),
    "another name": (
        lambda model, data, out: diffva("explain", data / "0.png", "--model", model, "--method", "controlnet",
                                        "--condition", "sketch=x.png"),
        "--condition sketch: the method reads no such condition image (it reads depth)",
    ),
    "no file": (
        lambda model, data, out: diffva("explain", data / "0.png", "--model", model, "--method", "controlnet",
                                        "--condition", "depth=nowhere.png"),
        "--condition nowhere.png: no such file",
    ),
    "no name": (
        lambda model, data, out: diffva("explain", data / "0.png", "--model", model, "--condition", "depth.png"),
        "--condition depth.png: write NAME=FILE",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line(case: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = made
    call, words = WRONG[case]
    result = call(model, data, tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert words in result.stderr.strip().splitlines()[-1], result.stderr
    assert not (tmp_path / "out").exists()


def test_a_controlnet_of_the_hub_has_to_say_what_it_reads(made: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = load(str(made[0]))
    network = bundle.controlnets[0]
    network.register_to_config(conditions=None)
    with pytest.raises(UnusableModel, match=r'add "conditions": \["condition\.NAME"\]'):
        generate(bundle, 0.8)
