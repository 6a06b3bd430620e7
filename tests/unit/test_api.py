"""What a notebook imports: the names, that they cost nothing before they are used, and the examples of the guide."""

from __future__ import annotations

import doctest
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import diffva_ray
from diffva_ray.cli import main

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "python.md"
DOCUMENTED = (
    "counterfactual.engine", "counterfactual.attribution", "data.images", "metrics.ssim", "metrics.localization",
    "metrics.fid", "metrics.kid", "metrics.counterfactual", "schema", "data.phantoms",
)  # fmt: skip


def test_names_are_frozen() -> None:
    assert sorted(diffva_ray.__all__) == [
        "Counterfactuals", "Recipe", "Run", "attribution", "load_recipe", "open_dataset", "open_run", "phantom",
        "read_film", "read_images", "read_map", "read_records", "to_square",
    ]  # fmt: skip
    for name in diffva_ray.__all__:
        assert getattr(diffva_ray, name).__doc__, name
    with pytest.raises(AttributeError, match="there are Counterfactuals"):
        diffva_ray.heal  # noqa: B018


def test_importing_costs_nothing() -> None:
    code = "import sys, diffva_ray; diffva_ray.load_recipe; print({'torch', 'ray', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture(scope="module")
def demo(films: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what ``diffva demo`` leaves behind, of toy size."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(films, folder / "runs" / "demo" / "data" / "test")
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
