"""The factor classifier: trained on what a data set says, stored beside the model, and used by ``reduce``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from trainings import run, with_stages

from diffva_ray.cli import main
from diffva_ray.config.recipe import Recipe, RecipeError
from diffva_ray.data.factor_phantoms import factor_phantom, factor_set
from diffva_ray.data.factors import Factors, Finding
from diffva_ray.data.images import decode
from diffva_ray.explain.sheet import factor_text
from diffva_ray.metrics.factors import Factor, FactorClassifier, load_factors
from diffva_ray.model.card import read_card
from diffva_ray.storage.local import LocalStore

CLASSES = ("Normal", "Lung_Opacity", "Mass")
STAGE = {
    "name": "factors", "trains": "factors", "steps": 120, "batch_size": 32, "learning_rate": 4e-3,
    "classes": dict.fromkeys(CLASSES, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms with factors, as a manifest."""
    folder = tmp_path_factory.mktemp("factors")
    for _ in factor_set(LocalStore(str(folder)), 240, 32, 5, CLASSES):
        pass
    return folder / "factors.csv"


@pytest.fixture(scope="module")
def model(tiny: Recipe, known: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    run(with_stages(tiny, STAGE), known, folder)
    return folder


def test_it_learns_the_side_of_a_finding(model: Path) -> None:
    classifier = load_factors(LocalStore(str(model)))
    assert isinstance(classifier, FactorClassifier)
    names = [factor.name for factor in classifier.factors]
    assert {"Mass on the left", "Mass on the right", "F", "AP"} <= set(names)
    assert sum(name.endswith("years or older") for name in names) == 1
    view = classifier.factors[names.index("AP")]
    assert view.accuracy is not None
    assert view.chance is not None
    assert view.accuracy > view.chance + 0.1

    # The same patients with a large mass on either side, none of which was in the training.
    pixels = {
        side: np.stack(
            [factor_phantom(Factors(50, "M", "PA", (Finding("Mass", side, "middle", 1.0),)), n, 99, 32).image
             for n in range(12)]
        )
        for side in ("left", "right")
    }  # fmt: skip
    for side in pixels:
        column = names.index(f"Mass on the {side}")
        yes = {shown: classifier.probabilities(images)[:, column].mean() for shown, images in pixels.items()}
        assert max(yes, key=lambda shown: yes[shown]) == side


def test_it_is_not_part_of_the_model(tiny: Recipe, known: Path, model: Path, tmp_path: Path) -> None:
    run(with_stages(tiny, {**STAGE, "steps": 1}), known, tmp_path / "other")
    cards = [read_card(LocalStore(str(folder))) for folder in (model, tmp_path / "other")]
    assert cards[0]["digest"] == cards[1]["digest"]


def test_reduce_says_what_was_asked_and_what_was_kept(model: Path, known: Path, tmp_path: Path) -> None:
    line = f"generate --data {known} --model {model} --out {tmp_path} --executor inline --classes Normal --limit 6"
    prompts = ["--prompt", "Mass on the left, 90 year old"]
    assert CliRunner().invoke(main, [*line.split(), *prompts]).exit_code == 0
    assert CliRunner().invoke(main, ["reduce", str(tmp_path)]).exit_code == 0
    rows = json.loads((tmp_path / "tables" / "metrics.json").read_text())["factors"]
    of = {row["factor"]: row for row in rows if row["label"] == "Normal"}
    assert of["Mass on the left"]["asked"] == "yes"
    assert of["Mass on the right"]["asked"] == "no"
    assert of["F"]["asked"] == of["Lung_Opacity on the left"]["asked"] == "as before"
    assert next(row for name, row in of.items() if name.endswith("older"))["asked"] == "yes"
    for row in of.values():
        low, high = row["right_interval"]
        assert 0 <= low <= row["right"] <= high <= 1
        assert row["n"] == 6


def test_data_that_say_nothing_are_refused(tiny: Recipe, known: Path, tmp_path: Path) -> None:
    rows = [",".join(line.split(",")[:2]) for line in known.read_text().splitlines() if "Mass" not in line]
    bare = known.parent / "bare.csv"
    bare.write_text("\n".join(row for row in rows if "Lung" not in row) + "\n")
    with pytest.raises(RecipeError, match="no side, sex, view or age is known"):
        run(with_stages(tiny, {**STAGE, "classes": {"Normal": 1}}), bare, tmp_path / "model")


def test_a_sheet_says_what_was_asked_and_what_was_kept(model: Path, known: Path, tmp_path: Path) -> None:
    image = sorted((known.parent / "Normal" / "images").iterdir())[0]
    prompt = "Mass on the left, 90 year old"
    line = ["explain", image, "--model", model, "--prompt", prompt, "--json", "--out", tmp_path / "sheet.svg"]
    result = CliRunner().invoke(main, [str(argument) for argument in line])
    assert result.exit_code == 0, result.output
    classifier = load_factors(LocalStore(str(model)))
    assert classifier is not None
    rows = json.loads(result.stdout)["answers"][0]["factors"]
    assert [row["factor"] for row in rows] == [factor.name for factor in classifier.factors]
    asked = {row["factor"]: row["asked"] for row in rows}
    assert asked["Mass on the left"] is True
    assert asked["Mass on the right"] is False
    assert asked["F"] is None
    pixels = decode(image.read_bytes(), 32)
    before = classifier.probabilities(pixels[None])[0]
    assert [row["before"] for row in rows] == pytest.approx(list(before), abs=1e-6)
    text = (tmp_path / "sheet.svg").read_text()
    assert "Mass on the left" in text
    assert "right in" in text


def test_factors_in_words() -> None:
    assert factor_text([]) == ""
    row = {"factor": "F", "otherwise": "M", "asked": None, "before": 0.9, "after": 0.8, "accuracy": 0.7, "chance": 0.5}
    assert factor_text([row]) == "kept: F"
    assert factor_text([{**row, "before": 0.1, "after": 0.2}]) == "kept: M"
    assert factor_text([{**row, "after": 0.2}, row]) == "F 0.90 → 0.20 (not asked, right in 70%); kept: F"
    assert factor_text([{**row, "asked": False}]) == "F 0.90 → 0.80 (not as asked, right in 70%)"
    factors = (Factor("age", "55"), Factor("view", "AP"), Factor("finding", "left", "Mass"))
    assert [of.otherwise for of in factors] == ["younger than 55 years", "PA", "no Mass on the left"]
