"""Strips: their ends equal the engine's results, the way between them is smooth, and errors are one line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from diffva_ray.cli import main
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.counterfactual.interpolation import between_images, between_prompts, slerp
from diffva_ray.data.phantoms import phantom

ILL, HEALTHY = phantom("COVID", 3, seed=1, size=32).image, phantom("Normal", 4, seed=1, size=32).image


def diffva(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def engine(model: Path) -> CounterfactualEngine:
    return CounterfactualEngine.from_pretrained(str(model), device="cpu")


def test_the_ends_are_the_two_prompts_and_the_distance_grows(engine: CounterfactualEngine) -> None:
    weights = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]  # more than a micro-batch
    strip = between_prompts(engine, ILL, "COVID 19", "normal chest scan", weights, 5)
    for end, prompt in ((0, "COVID 19"), (-1, "normal chest scan")):
        alone = engine([ILL], [5], [prompt]).counterfactuals[0]
        assert np.array_equal(strip.counterfactuals[end], alone)
    away = [np.abs(image - strip.counterfactuals[0]).mean() for image in strip.counterfactuals]
    assert away == sorted(away)
    assert away[-1] > 0


def test_without_a_prompt_the_ends_are_the_images(engine: CounterfactualEngine) -> None:
    strip = between_images(engine, ILL, HEALTHY, [0.0, 0.5, 1.0])
    ends = [engine([image], [0]).reconstructions[0] for image in (ILL, HEALTHY)]
    apart = np.abs(ends[0] - ends[1]).mean()
    for image, end in zip(strip[::2], ends):
        assert np.abs(image - end).mean() < 0.2 * apart
    assert np.abs(strip[1] - strip[0]).mean() > 0.1 * apart
    assert np.abs(strip[1] - strip[2]).mean() > 0.1 * apart
    assert np.array_equal(between_images(engine, ILL, HEALTHY, [0.5])[0], strip[1])  # independent of the other weights


def test_spherical_interpolation_keeps_the_norm_of_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn((2, 4, 16, 16), generator=generator) for _ in range(2))
    assert torch.allclose(slerp(one, other, 0.0), one)
    assert torch.allclose(slerp(one, other, 1.0), other, atol=1e-6)
    assert slerp(one, other, 0.5).std() == pytest.approx(1, abs=0.05)
    assert torch.lerp(one, other, 0.5).std() < 0.8
    assert torch.equal(slerp(one, one, 0.3), one)


def test_the_command_writes_strip_and_numbers(images: Path, model: Path, tmp_path: Path) -> None:
    first, second = (sorted((images / label / "images").iterdir())[0] for label in ("COVID", "Normal"))
    common = ("interpolate", first, "--model", model, "--frames", 3, "--json")
    prompts = ("--prompt", "COVID 19", "--prompt", "normal chest scan")
    for name, arguments in {"prompts": prompts, "images": ("--to", second)}.items():
        result = diffva(*common, *arguments, "--out", tmp_path / f"{name}.png")
        assert result.exit_code == 0, result.output
        numbers = json.loads(result.output)
        assert numbers["weights"] == [0, 0.5, 1]
        assert all(0 <= p <= 1 for p in numbers["healthy"])
        assert numbers["model_digest"]
        assert Image.open(io.BytesIO((tmp_path / f"{name}.png").read_bytes())).width > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --prompt twice"),
        (("--prompt", "a"), "give --prompt twice"),
        (("--to", "nowhere.png"), "nowhere.png: no such file"),
        (("--prompt", "mild " * 40, "--prompt", "a"), "more than 16 tokens"),
        (("--to", "x.png", "--prompt", "a", "--prompt", "b"), "one --prompt at most"),
        (("--to", "x.png", "--out", "strip.gif"), "is a .png"),
        (("--to", "x.png", "--method", "masked", "--scheduler", "ddim"), "--method and --scheduler: not with --to"),
    ],
)
def test_errors_are_one_line(images: Path, model: Path, arguments: tuple[str, ...], message: str) -> None:
    image = sorted((images / "COVID" / "images").iterdir())[0]
    result = diffva("interpolate", image, "--model", model, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1
