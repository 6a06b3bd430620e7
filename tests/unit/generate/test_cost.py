"""Cost of a run: the estimate against the counted network calls and against torch's count of operations."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from click.testing import CliRunner

from diffva_ray.cli import main
from diffva_ray.config.generation import AccelerationConfig
from diffva_ray.config.methods import METHODS
from diffva_ray.config.recipe import GUESS, Recipe, load_recipe
from diffva_ray.config.sampling import Scheduler
from diffva_ray.counterfactual import instruct_pix2pix
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.counterfactual.guidance_difference import CALLS
from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.phantoms import phantom
from diffva_ray.generate.cost import TFLOP, calls, cost
from diffva_ray.generate.plan import Request, check_settings
from diffva_ray.generate.run import PlanError
from diffva_ray.model.bundle import Bundle
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.forecast import ROW_BYTES, micro_batches, probe
from diffva_ray.workflows.generate import generate_run

SETTINGS = [  # strength, steps, guidance scale, source prompt
    (0.5, 4, 2.5, ""),
    (1.0, 3, 1.0, ""),
    (0.4, 4, 7.5, ""),  # a single step, in which PNDM repeats nothing
    (0.75, 8, 3.0, GUESS),
]


@pytest.fixture(scope="module")
def engine(complete: Callable[[], Bundle]) -> CounterfactualEngine:
    return CounterfactualEngine(complete(), device="cpu")


def test_a_derived_mask_costs_calls(engine: CounterfactualEngine) -> None:
    settings = {**engine.config.model_dump(), "method": "masked", "scheduler": "ddim"}
    derived = {**settings, "masked": {**settings["masked"], "source": "derived"}}
    assert calls(derived, 4).unet - calls(settings, 4).unet == CALLS


@pytest.mark.parametrize("method", ["va-gan", "vant-gan", "ant-gan"])
def test_a_method_without_prompt_runs_with_any_sampler_but_cannot_guess(method: str, tiny: Recipe) -> None:
    settings = {"method": method, "scheduler": "pndm"}
    check_settings(tiny.generate.model_copy(update={"source_prompt": ""}), settings)
    with pytest.raises(PlanError, match=f"{method} reads no prompt.*--set generate.source_prompt"):
        check_settings(tiny.generate.model_copy(update={"source_prompt": GUESS}), settings)


@pytest.mark.parametrize("method", METHODS)
def test_estimated_calls_are_the_counted_calls(
    method: str, engine: CounterfactualEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call is one image through one network; images are counted, not batches."""
    bundle, image = engine.bundle, phantom("COVID", 1, size=32).image
    made = {"unet": 0, "encode": 0, "decode": 0, "controlnet": 0}

    def counting(name, forward):
        def counted(*arguments, **options):
            made[name] += len(arguments[0] if arguments else options["sample"])
            return forward(*arguments, **options)

        return counted

    for name, network in (("unet", bundle.unet), ("controlnet", bundle.extra("controlnet"))):
        monkeypatch.setattr(network, "forward", counting(name, network.forward))
    for name in ("encode", "decode"):
        monkeypatch.setattr(bundle.vae, name, counting(name, getattr(bundle.vae, name)))
    seen = 0
    for strength, steps, scale, source in SETTINGS:
        changes = {"source_prompt": source, "micro_batch": 1}
        if method == "instruct-pix2pix":  # its calls do not depend on what the network reads
            monkeypatch.setattr(instruct_pix2pix, "reads_image", lambda unet: True)
        if method == "text-to-image":  # it starts from noise
            strength, changes = 1.0, {**changes, "negative_prompt": ""}
        config = bundle.recipe.generate.model_copy(update=changes)
        monkeypatch.setattr(engine, "config", config)
        for scheduler in get_args(Scheduler):
            settings = {
                "method": method, "scheduler": scheduler, "strength": strength, "guidance_scale": scale,
                "num_inference_steps": steps,
            }  # fmt: skip
            try:
                check_settings(config, settings)
            except PlanError:
                continue
            made.update(dict.fromkeys(made, 0))
            engine([image], seeds=[1], settings=engine.settings.replace(**settings))
            expected = calls({**config.model_dump(), **settings}, len(bundle.recipe.data.prompts))
            assert made == expected._asdict(), settings
            seen += 1
    assert seen >= len(SETTINGS) - (not METHODS[method].reads_prompt)  # which cannot guess


@pytest.mark.parametrize("method", ["sdedit", "ddim-inversion"])
@pytest.mark.parametrize(
    "shortcuts", [{"guidance_start": 0.3}, {"guidance_start": 0.2, "guidance_end": 0.7}, {"deep_features_every": 3}]
)
def test_acceleration_saves_calls(
    method: str, shortcuts: dict, engine: CounterfactualEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    acceleration = AccelerationConfig(**shortcuts)
    changes = {"source_prompt": "", "micro_batch": 1, "acceleration": acceleration, "scheduler": "ddim"}
    config = engine.bundle.recipe.generate.model_copy(update=changes)
    monkeypatch.setattr(engine, "config", config)
    made: list[int] = []
    watch = engine.bundle.unet.register_forward_pre_hook(lambda _, args: made.append(len(args[0])))
    settings = {"method": method, "strength": 0.8, "num_inference_steps": 10, "guidance_scale": 3.0}
    engine([phantom("COVID", 1, size=32).image], [1], settings=engine.settings.replace(scheduler="ddim", **settings))
    watch.remove()
    assert sum(made) == calls({**config.model_dump(), **settings}, 4).unet


def test_acceleration_is_refused_for_methods_without_it(tiny: Recipe) -> None:
    config = tiny.generate.model_copy(update={"acceleration": AccelerationConfig(deep_features_every=2)})
    check_settings(config, {"method": "masked"})
    with pytest.raises(PlanError, match=r"generate.acceleration: method cycle does not support it"):
        check_settings(config, {"method": "cycle"})
    derived = config.model_copy(update={"masked": config.masked.model_copy(update={"source": "derived"})})
    with pytest.raises(PlanError, match="masked does not support it"):
        check_settings(derived, {"method": "masked"})


def test_operations_are_those_of_torch() -> None:
    """Networks of Stable Diffusion v1.4 without weights: UNet, encoder, decoder and ControlNet at 512 px."""
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        controlnet = ControlNetModel.from_unet(unet)
        latents, image = torch.zeros(1, 4, 64, 64), torch.zeros(1, 3, 512, 512)
        counted = []
        for forward in (
            lambda: unet(latents, torch.tensor(1), torch.zeros(1, 77, 768)),
            lambda: vae.encode(image),
            lambda: vae.decode(latents),
            lambda: controlnet(latents, torch.tensor(1), torch.zeros(1, 77, 768), image),
        ):
            with FlopCounterMode(display=False) as counter:
                forward()
            counted.append(counter.get_total_flops() / 1e12)
    assert counted == pytest.approx(TFLOP["CompVis/stable-diffusion-v1-4", 512], abs=5e-4)


def test_the_table_of_the_operations_page() -> None:
    """docs/operations.md has these numbers."""
    paper = load_recipe("paper")
    strong, weak = (("strength", (0.85,)),), (("strength", (0.55,)), ("num_inference_steps", (50,)))
    assert cost(paper, weak, 1000) == {
        "unet_forwards_per_record": 56, "unet_forwards": 56_000, "tflop_per_record": 51.1, "tflop": 51_115,
        "gigabytes_at_most": 1.053,
    }  # fmt: skip
    found = cost(paper, strong, 1)
    assert (found["unet_forwards_per_record"], found["tflop_per_record"]) == (128, 108.9)
    assert cost(paper, (), 1)["unet_forwards_per_record"] == 84
    both = cost(paper, (("num_inference_steps", (50, 75)),), 10)
    assert (both["unet_forwards_per_record"], both["unet_forwards"]) == (70, 700)
    assert cost(load_recipe("phantom"), (), 10)["tflop"] is None, "unknown networks are not guessed"
    for page in ("51.1", "108.9"):
        assert page in (Path(__file__).parents[3] / "docs" / "operations.md").read_text()


def test_a_dry_run_prints_the_cost_and_what_is_left_of_it(
    tiny: Recipe, images: Path, model: Path, tmp_path: Path
) -> None:
    def shown(out: Path, *more: str) -> dict:
        command = ["generate", "--data", images, "--model", model, "--out", out, "--dry-run", *more]
        result = CliRunner().invoke(main, list(map(str, command)))
        assert result.exit_code == 0, result.output
        return json.loads(result.output)["cost"]

    each = calls(tiny.generate.model_dump(), len(tiny.data.prompts)).unet
    fresh = shown(tmp_path / "run")
    assert (fresh["unet_forwards_per_record"], fresh["unet_forwards"]) == (each, 18 * each)
    assert not any("hours" in key for key in fresh), "nothing is known of hours yet"

    generate_run(tiny, str(images), str(model), str(tmp_path / "run"), Request(), Execution(executor="inline"))
    assert shown(tmp_path / "run")["unet_forwards"] == 0
    (tmp_path / "run" / "records" / "part-00001.parquet").unlink()
    left = shown(tmp_path / "run")
    assert left["unet_forwards"] == 6 * each
    seconds = [sum(json.loads(file.read_text()).values()) for file in (tmp_path / "run" / "timings").iterdir()]
    assert 0 < left["estimated_cpu_hours"] * 3600 < sum(seconds)


def test_a_given_pace_estimates_hours(tiny: Recipe, images: Path, model: Path, tmp_path: Path) -> None:
    command = ["generate", "--data", images, "--model", model, "--out", tmp_path / "run", "--images-per-second", 4]
    words = list(map(str, [*command, "--dry-run", "--actors", 2, "--gpus-per-actor", 0.5]))
    shown = json.loads(CliRunner().invoke(main, words).output)["cost"]
    assert shown["estimated_gpu_hours"] == pytest.approx(18 / 4 / 3600 * 0.5)
    assert (shown["actors"], shown["estimated_hours"]) == (2, pytest.approx(18 / 4 / 3600 / 2))
    refused = CliRunner().invoke(main, list(map(str, command)))
    assert refused.exit_code == 2
    assert "--dry-run" in refused.output


def test_a_probe_measures_this_machine(tiny: Recipe, images: Path, model: Path, tmp_path: Path) -> None:
    """The probe generates records; its estimate of the storage is about what a run stores."""
    words = ["generate", "--data", images, "--model", model, "--out", tmp_path / "run", "--dry-run", "--probe"]
    result = CliRunner().invoke(main, list(map(str, words)))
    shown = json.loads(result.stdout)["cost"]
    assert shown["estimated_cpu_hours"] > 0
    by_size = shown["images_per_second_by_micro_batch"]
    assert list(by_size)[:2] == ["1", "2"]
    assert all(rate > 0 for rate in by_size.values())
    assert not (tmp_path / "run").exists()
    generate_run(tiny, str(images), str(model), str(tmp_path / "run"), Request(), Execution(executor="inline"))
    kinds = ("counterfactuals", "attributions", "reconstructions")
    stored = sum(file.stat().st_size for kind in kinds for file in (tmp_path / "run" / kind).rglob("*.png"))
    assert shown["estimated_gigabytes"] * 1e9 == pytest.approx(stored + 18 * ROW_BYTES, rel=0.1)
    assert shown["estimated_gigabytes"] < shown["gigabytes_at_most"]


def test_micro_batches_stop_when_the_device_is_out_of_memory(
    tiny: Recipe, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = CounterfactualEngine.__call__

    def small(engine: CounterfactualEngine, images: list, *rest: object, **named: object) -> object:
        if len(images) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        time.sleep(0.2)  # a batch of two takes as long as one
        return whole(engine, images, *rest, **named)

    monkeypatch.setattr(CounterfactualEngine, "__call__", small)
    assert list(micro_batches(tiny, str(model))) == [1, 2]


def test_a_probe_of_a_sweep_covers_all_settings(images: Path, model: Path, tiny: Recipe) -> None:
    """A complete run has nothing to probe, which is reported."""
    short, both = (
        probe(tiny, str(images), str(model), Request(sweep=(("num_inference_steps", steps),))).seconds
        for steps in ((4,), (4, 400))
    )
    assert both > 3 * short, "counted: 11 times the forwards"
    nothing = tiny.model_copy(update={"generate": tiny.generate.model_copy(update={"min_side": 5000})})
    with pytest.raises(UnusableData, match="--probe: none of the first images"):
        probe(nothing, str(images), str(model), Request())
