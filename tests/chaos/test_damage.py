"""Every file of a run, its retry, a model and a half-trained model, damaged in every way, under every verb."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_damage import PARTS, World, make_world

from diffva_ray.config.recipe import Recipe, to_yaml

ONE_OF = {"run": 60, "model": 80, "half-trained model": 40, "run, repaired": 20}  # of so many cases, one


@pytest.fixture(scope="module")
def world(images: Path, model: Path, tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    recipe = folder / "tiny.yaml"
    recipe.write_text(to_yaml(tiny))
    return make_world(folder, images, model, recipe)


@pytest.mark.parametrize("name", PARTS)
def test_a_sample_of_the_matrix(name: str, world: World, tmp_path: Path) -> None:
    count, wrong = PARTS[name](world, tmp_path, ONE_OF[name])
    assert count >= 5
    assert wrong == []


@pytest.mark.slow
def test_the_whole_matrix(world: World, tmp_path: Path) -> None:
    total = 0
    for part in PARTS.values():
        count, wrong = part(world, tmp_path, 1)
        assert wrong == []
        total += count
    assert total >= 600
