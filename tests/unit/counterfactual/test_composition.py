"""Composed prompts: AND, NOT and TO in the text of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from diffva_ray.cli import main
from diffva_ray.config.generation import AccelerationConfig
from diffva_ray.config.methods import METHODS
from diffva_ray.config.prompts import Part, composed, parts, texts_of, wanted
from diffva_ray.config.recipe import DataConfig, Recipe
from diffva_ray.config.sampling import SamplingSettings
from diffva_ray.counterfactual.engine import Blend, CounterfactualEngine
from diffva_ray.data.phantoms import phantom
from diffva_ray.evaluate.direction import induces
from diffva_ray.generate.cost import calls
from diffva_ray.generate.plan import check_settings
from diffva_ray.generate.run import PlanError
from diffva_ray.model.bundle import Bundle

IMAGE = phantom("Normal", 3, seed=1, size=32).image
SETTINGS = SamplingSettings(scheduler="ddim", strength=0.7, guidance_scale=3.0, num_inference_steps=6)
ILL, OTHER, HEALTHY = "COVID 19", "Lung Opacity", "normal chest scan"


@pytest.fixture
def engine(complete: Callable[[], Bundle]) -> CounterfactualEngine:
    engine = CounterfactualEngine(complete(), device="cpu")
    engine.config = engine.config.model_copy(update={"source_prompt": "", "negative_prompt": "", "micro_batch": 3})
    return engine


def made(engine: CounterfactualEngine, prompt: str | Blend, **changes: object) -> np.ndarray:
    return engine([IMAGE], [7], [prompt], SETTINGS.replace(**changes)).counterfactuals[0]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("severe COVID 19 and not more", [Part("severe COVID 19 and not more")]),
        ("  spaces stay ", [Part("  spaces stay ")]),
        ("COVID 19 :0.5", [Part("COVID 19 :0.5")]),  # nothing is composed
        ("A AND B", [Part("A"), Part("B")]),
        ("A AND B :0.5 NOT C AND NOT D :2", [Part("A"), Part("B", 0.5), Part("C", -1), Part("D", -2)]),
        ("NOT C", [Part(""), Part("C", -1)]),
        ("mild A TO severe A :0.25 AND B", [Part("mild A", towards="severe A", amount=0.25), Part("B")]),
        ("LAND ANDES NOTES", [Part("LAND ANDES NOTES")]),
    ],
)
def test_grammar(prompt: str, expected: list[Part]) -> None:
    assert list(parts(prompt)) == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("A AND", "no text follows AND"),
        ("A NOT :0.5", "no text follows NOT"),
        ("A AND B :much", "'much' is not a number"),
        ("A :2 AND B", "the weight of the first text is the guidance scale"),
        ("A TO B", "write a mixture as A TO B :0.3"),
        ("A TO B :1.5", "write a mixture as A TO B :0.3"),
        ("A NOT B TO C :0.5", "write a mixture as A TO B :0.3"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_named(prompt: str, message: str, tiny: Recipe) -> None:
    with pytest.raises(PlanError) as error:
        check_settings(tiny.generate, {}, prompt)
    assert message in str(error.value)
    assert repr(prompt) in str(error.value)


def test_a_plain_prompt_is_generated_as_before(engine: CounterfactualEngine) -> None:
    """Further texts of weight 0 and mixtures at their ends are the plain prompt, bit for bit."""
    expected = made(engine, ILL)
    assert np.array_equal(made(engine, f"{ILL} AND {OTHER} :0"), expected)
    assert np.array_equal(made(engine, f"{ILL} TO {OTHER} :0"), expected)
    assert np.array_equal(made(engine, f"{OTHER} TO {ILL} :1"), expected)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.composes])
def test_directions_add_up(method: str, engine: CounterfactualEngine) -> None:
    """eps = eps_u + sum w_i (eps_i - eps_u): a text twice is twice the guidance, and a text minus itself is none."""
    strength = 1.0 if method == "text-to-image" else 0.7
    twice = made(engine, f"{ILL} AND {ILL}", method=method, strength=strength)
    doubled = made(engine, ILL, method=method, strength=strength, guidance_scale=6.0)
    assert np.allclose(twice, doubled, atol=2e-4)
    nothing = made(engine, f"{ILL} NOT {ILL}", method=method, strength=strength)
    empty = made(engine, "", method=method, strength=strength)
    assert np.allclose(nothing, empty, atol=2e-4)
    assert np.abs(twice - nothing).max() > 1e-3


def test_order_and_weight_of_further_texts(engine: CounterfactualEngine) -> None:
    both = made(engine, f"{ILL} AND {OTHER}")
    assert np.allclose(both, made(engine, f"{OTHER} AND {ILL}"), atol=2e-4)
    assert not np.allclose(both, made(engine, f"{ILL} AND {OTHER} :0.2"), atol=1e-4)
    assert not np.allclose(both, made(engine, f"{ILL} NOT {OTHER}"), atol=1e-4)


def test_a_mixture_is_a_blend(engine: CounterfactualEngine) -> None:
    assert np.array_equal(made(engine, f"{ILL} TO {OTHER} :0.3"), made(engine, Blend(ILL, OTHER, 0.3)))


def test_a_result_does_not_depend_on_the_other_prompts_of_the_batch(engine: CounterfactualEngine) -> None:
    prompts = [f"{ILL} AND {OTHER} NOT {HEALTHY}", HEALTHY, f"{OTHER} TO {ILL} :0.5"]
    together = engine([IMAGE] * 3, [7] * 3, prompts, SETTINGS).counterfactuals
    for n, prompt in enumerate(prompts):
        assert np.array_equal(together[n], made(engine, prompt)), prompt


def test_every_further_text_costs_one_call_per_step(engine: CounterfactualEngine) -> None:
    engine.config = engine.config.model_copy(update={"micro_batch": 1})
    counted: list[int] = []
    watch = engine.bundle.unet.register_forward_pre_hook(lambda _, args: counted.append(len(args[0])))
    for prompt, texts in ((ILL, 1), (f"{ILL} AND {OTHER}", 2), (f"{ILL} AND {OTHER} NOT {HEALTHY}", 3)):
        counted.clear()
        made(engine, prompt)
        steps = int(SETTINGS.strength * SETTINGS.num_inference_steps)
        assert sum(counted) == steps * (1 + texts)
        config = engine.config.model_dump() | SETTINGS.model_dump()
        assert calls({**config, "prompt": prompt}, 4).unet == sum(counted)
    watch.remove()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "controlnet"}, "method controlnet reads one text; AND and NOT need one of sdedit,"),
        ({"method": "instruct-pix2pix", "scheduler": "ddim"}, "method instruct-pix2pix reads one text"),
        ({"guidance_scale": 1.0}, "need a guidance scale above 1, not 1"),
        ({"acceleration": AccelerationConfig(deep_features_every=2)}, "cannot be combined with generate.acceleration"),
    ],
)
def test_what_cannot_compose_refuses_in_one_line(changes: dict, message: str, tiny: Recipe) -> None:
    config = tiny.generate.model_copy(update={**SETTINGS.model_dump(), **changes})
    check_settings(config, {}, ILL)
    with pytest.raises(PlanError) as error:
        check_settings(config, {}, f"{ILL} AND {OTHER}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_engine_refuses_as_well(engine: CounterfactualEngine) -> None:
    with pytest.raises(ValueError, match="AND and NOT need a guidance scale above 1"):
        made(engine, f"{ILL} AND {OTHER}", guidance_scale=1.0)
    with pytest.raises(ValueError, match="more than the 16 tokens"):
        made(engine, f"{ILL} AND {' '.join(['mild'] * 20)}")


def test_what_a_composed_prompt_wants() -> None:
    assert composed("A", ("B",), ("C", "D")) == "A AND B NOT C NOT D"
    assert texts_of("A AND B NOT C TO") == ("A", "B", "C TO")
    assert wanted("A AND B NOT C") == "A, B"
    data = DataConfig()
    assert induces(f"{ILL} NOT {OTHER}", data, "Normal")
    assert not induces(f"{HEALTHY} NOT {OTHER}", data, "COVID")


def test_a_run_with_a_composed_prompt(images: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["generate", "--data", str(images), "--model", str(model), "--out", str(out), "--executor", "inline"]
    wish = [
        "--limit",
        "3",
        "--method",
        "sdedit",
        "--prompt",
        HEALTHY,
        "--and",
        "mild",
        "--not",
        OTHER,
        "--not",
        "wire :0.5",
    ]
    result = CliRunner().invoke(main, [*command, *wish])
    assert result.exit_code == 0, result.output
    rows = pq.read_table(out / "records").to_pylist()
    prompt = f"{HEALTHY} AND mild NOT {OTHER} NOT wire :0.5"
    assert {(row["prompt"], row["status"]) for row in rows} == {(prompt, "ok")}
    # another text is another run
    other = CliRunner().invoke(main, [*command, *wish[:-2]])
    assert other.exit_code == 3
    assert "prompt" in other.stderr
    refused = CliRunner().invoke(main, [*command, "--and", "mild", "--sweep", "prompt=a,b"])
    assert refused.exit_code == 2
    assert "--and and --not go with --prompt" in refused.stderr
