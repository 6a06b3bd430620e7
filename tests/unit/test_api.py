"""The Python API: its names, lazy imports, and the examples of the guide."""

from __future__ import annotations

import doctest
import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import diffva_ray
from diffva_ray.cli import main

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "python.md"
DOCUMENTED = (
    "counterfactual.engine", "counterfactual.attribution", "data.images", "metrics.ssim", "metrics.localization",
    "metrics.fid", "metrics.kid", "metrics.counterfactual", "schema", "data.phantoms",
    "explain.model", "evaluate.opened",
)  # fmt: skip


def test_names_are_frozen() -> None:
    assert sorted(diffva_ray.__all__) == [
        "CounterfactualEngine", "Recipe", "Run", "attribution", "load", "load_recipe", "open_dataset", "open_run",
        "phantom", "read_image", "read_images", "read_map", "read_records", "to_square",
    ]  # fmt: skip
    for name in diffva_ray.__all__:
        assert getattr(diffva_ray, name).__doc__, name
    with pytest.raises(AttributeError, match="there are CounterfactualEngine"):
        diffva_ray.absent  # noqa: B018


def test_importing_costs_nothing() -> None:
    code = "import sys, diffva_ray; diffva_ray.load_recipe; print({'torch', 'ray', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture(scope="module")
def engine(model: Path) -> diffva_ray.CounterfactualEngine:
    return diffva_ray.CounterfactualEngine.from_pretrained(str(model), "cpu")


IMAGE = np.full((32, 32), 0.5, np.float32)
TWO_IMAGES = {"images": [IMAGE, IMAGE]}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"images": IMAGE}, "images, seeds and prompts are lists"),
    ({"images": [255 * IMAGE]}, "image 0: values are in .0, 1., got 127.5 to 127.5; divide 8-bit ones by 255"),
    ({"images": [IMAGE.astype(np.uint8)]}, "image 0: an image is a float array .H, W. in .0, 1., got uint8"),
    ({"images": [IMAGE * np.nan]}, "image 0: values are in"),
    ({"images": ["image.png"]}, "image 0: an image is a float array .H, W. in .0, 1., got str; see read_image"),
    ({"images": [np.stack([IMAGE] * 3, -1)]}, "got float32 .32, 32, 3."),
    (TWO_IMAGES, "one of each for every image, got 2 images, 1 seeds"),
    ({"images": [IMAGE] * 5}, "a call takes 1 to 4 images"),
    ({"lungs": [np.ones((5, 5), bool)]}, "a lung mask is .32, 32., as the model's square, got .5, 5."),
    ({"prompts": "COVID 19"}, "images, seeds and prompts are lists"),
    ({"strength": 1.3}, "strength: Input should be less than or equal to 1 .got 1.3."),
    ({"num_inference_steps": 0}, "num_inference_steps: Input should be greater than or equal to 1"),
    ({"method": "foo"}, "method: no such method; there are sdedit.*got 'foo'"),
    ({"steps": 5}, "steps: Extra inputs are not permitted"),
    ({"method": "cycle", "scheduler": "pndm"}, "method cycle runs with scheduler ddim, not pndm"),
    ({"prompts": ["mild " * 40]}, "more than the 16 tokens that this model reads"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG, ids=[said[:40] for _, said in WRONG])
def test_a_wrong_call_gives_a_one_line_error(
    engine: diffva_ray.CounterfactualEngine, changes: dict[str, Any], said: str
) -> None:
    arguments = {key: changes[key] for key in changes if key in ("images", "seeds", "prompts", "lungs")}
    settings = {key: changes[key] for key in changes if key not in arguments}
    with pytest.raises(ValueError, match=said) as caught:
        engine(**{"images": [IMAGE], "seeds": [0], **arguments}, settings=engine.settings.replace(**settings))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no image")
    for read in (diffva_ray.read_image, diffva_ray.read_map):
        with pytest.raises(ValueError, match=r"notes\.png"):
            read(str(tmp_path / "notes.png"))
    with pytest.raises(ValueError, match="unknown phantom class 'Covid'; there are Normal"):
        diffva_ray.phantom("Covid", 1)


@pytest.fixture(scope="module")
def demo(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a small version of the folder that ``diffva demo`` writes."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(images, folder / "runs" / "demo" / "data" / "test")
    shutil.copytree(model, folder / "runs" / "demo" / "model", ignore=shutil.ignore_patterns(".train"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in (
            "generate --data runs/demo/data/test --model runs/demo/model --out runs/demo/run --limit 4",
            "reduce runs/demo/run",
        ):
            assert CliRunner().invoke(main, [*line.split(), "--executor", "inline"]).exit_code == 0
    return folder


def test_the_guide_does_what_it_says(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    outcome = doctest.testfile(str(GUIDE), module_relative=False)
    assert outcome.attempted > 25
    assert outcome.failed == 0


@pytest.mark.parametrize("module", DOCUMENTED)
def test_docstrings_do_what_they_say(module: str, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    outcome = doctest.testmod(importlib.import_module(f"diffva_ray.{module}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0
