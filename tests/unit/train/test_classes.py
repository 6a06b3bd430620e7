"""Classes, prompts and stages of a training follow from its data."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from diffva_ray.cli import main
from diffva_ray.config.recipe import Recipe, load_recipe
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData
from diffva_ray.data.encoding import encode_grey, quantise
from diffva_ray.data.phantoms import phantom
from diffva_ray.model.recipe import model_recipe
from diffva_ray.storage.local import LocalStore
from diffva_ray.train.classes import described, fitted
from diffva_ray.workflows.train import check_training, train_model

PAPER = [("normal", 1200), ("lung-opacity", 500), ("covid", 500), ("viral-pneumonia", 500), ("judge", 1000)]
RECIPES = ("phantom", "cpu", "recommended", "paper")


def listed(*labels: str) -> Dataset:
    """A data set with an image of each label."""
    return Dataset(LocalStore("."), [LabelledImage(f"{n}.png", label) for n, label in enumerate(labels)], "folders")


def write(file: Path, number: int, finding: str = "Normal") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encode_grey(quantise(phantom(finding, number, 1, 32).image)))


def two_folders(root: Path, healthy: str = "gesund") -> str:
    for n in range(4):
        write(root / healthy / f"{n}.png", n)
        write(root / "Verschattung" / f"{n}.png", n, "Lung_Opacity")
    return str(root)


def nih(root: Path) -> str:
    labels = ("No Finding", "Mass|Effusion", "No Finding", "Effusion")
    for n in range(4):
        write(root / "images" / f"{n:08}_000.png", n)
    rows = [f"{n:08}_000.png,{label},0,{n},50,M,PA" for n, label in enumerate(labels)]
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    (root / "Data_Entry_2017.csv").write_text("\n".join([header, *rows]) + "\n")
    return str(root)


def chexpert(root: Path) -> str:
    rows = []
    for n, values in enumerate(("1.0,,", ",1.0,1.0", "1.0,,", ",,1.0")):
        path = f"train/patient{n:05}/study1/view1_frontal.jpg"
        write(root / path, n)
        rows.append(f"CheXpert-v1.0-small/{path},F,50,Frontal,AP,{values}")
    header = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Cardiomegaly,Lung Opacity"
    (root / "train.csv").write_text("\n".join([header, *rows]) + "\n")
    return str(root)


SETS = {
    two_folders: ["Normal", "Verschattung"],
    nih: ["Normal", "Mass", "Effusion"],
    chexpert: ["Normal", "Lung_Opacity", "Cardiomegaly"],
}


@pytest.fixture
def own(tiny: Recipe, model: Path) -> Callable[[str], Recipe]:
    """A shipped recipe with the networks of the tiny model."""

    def resized(name: str) -> Recipe:
        network = tiny.model.model_dump(mode="json")
        if name != "phantom":
            network = {"resolution": 32, "tokenizer_length": 16, "attention_mask": True, "base": str(model)}
        recipe = load_recipe(name)
        stages = tuple(stage.model_copy(update={"steps": 1, "batch_size": 4}) for stage in recipe.train.stages)
        train = recipe.train.model_copy(update={"stages": stages, "mixed_precision": "no"})
        return recipe.model_copy(update={"model": type(recipe.model)(**network), "train": train})

    return resized


@pytest.mark.parametrize("make", SETS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_accepts_other_classes(
    name: str, make: Callable[[Path], str], own: Callable[[str], Recipe], tmp_path: Path
) -> None:
    recipe, *_ = check_training(own(name), make(tmp_path / "data"), str(tmp_path / "model"))
    assert sorted(recipe.data.prompts) == sorted(SETS[make])
    assert recipe.data.prompts["Normal"] == "Normal chest scan"
    trained = {label for stage in recipe.train.stages if stage.trains == "denoiser" for label in stage.classes}
    assert trained == set(SETS[make])
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["phantom", "paper"])
def test_a_folder_of_two_classes_is_trained(
    name: str, own: Callable[[str], Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, out = two_folders(tmp_path / "data"), str(tmp_path / "model")
    with caplog.at_level(logging.INFO):
        assert train_model(own(name), data, out, executor="inline")
    assert "class Normal (healthy): 4 images, prompt 'Normal chest scan'" in caplog.text
    assert "stage judge (judge): 1 steps of 4 images" in caplog.text
    card = json.loads((tmp_path / "model/diffva.json").read_text())
    assert list(card["recipe"]["data"]["prompts"]) == ["Normal", "Verschattung"]
    assert not train_model(own(name), data, out, executor="inline")

    # the guess takes only prompts that were trained, also with the settings of another recipe
    recipe = model_recipe(out, "phantom", ("generate.micro_batch=4",))
    engine = CounterfactualEngine.from_pretrained(out, "cpu")
    engine = CounterfactualEngine(engine.bundle, recipe.generate, "cpu")
    images = [phantom("COVID", n, 1, 32).image for n in range(4)]
    assert set(engine(images, [0, 1, 2, 3]).source_prompts) <= {"", "Verschattung"}
    assert recipe.data.prompts == {"Normal": "Normal chest scan", "Verschattung": "Verschattung"}


def test_the_papers_steps_stay_for_its_own_data() -> None:
    recipe = fitted(load_recipe("paper"), listed("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"))
    assert [(stage.name, stage.steps) for stage in recipe.train.stages] == PAPER
    classes = [stage.classes for stage in recipe.train.stages]
    assert classes == [{"Normal": 1}, {"Lung_Opacity": 1}, {"COVID": 1}, {"Viral Pneumonia": 1}, {}]
    assert [getattr(stage, "prior_class", None) for stage in recipe.train.stages] == [None, *["Normal"] * 3, None]
    assert recipe.data == load_recipe("paper").data


@pytest.mark.parametrize("name", RECIPES)
def test_a_fitted_recipe_stays_as_it_is(name: str) -> None:
    dataset = listed("A", "B b", "C/c")
    recipe = fitted(load_recipe(name, ["data.healthy_class=A"]), dataset)
    assert fitted(recipe, dataset) == recipe
    assert not any("<" in f"{stage.name}{stage.classes}" for stage in recipe.train.stages)


def test_healthy_class_and_healthy_prompt_agree() -> None:
    dataset = listed("A", "B")
    named = fitted(load_recipe("phantom", ["data.healthy_class=A"]), dataset)
    assert named.data.prompts == {"A": "normal chest scan", "B": "B"}
    worded = fitted(load_recipe("phantom", ["data.healthy_class=A", "data.prompts={A: clear lungs}"]), dataset)
    assert worded.data.healthy_prompt == "clear lungs"
    other = fitted(load_recipe("phantom", ["data.healthy_prompt=all clear"]), listed("Normal", "B"))
    assert any("'all clear' is not the prompt of class Normal" in line for line in described(other, dataset_of(other)))
    assert not any("is not the prompt" in line for line in described(named, dataset))


def dataset_of(recipe: Recipe) -> Dataset:
    return listed(*recipe.data.prompts)


def test_prompts_are_those_of_the_classes_that_the_denoiser_is_trained_on() -> None:
    dataset = listed("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")
    recipe = fitted(load_recipe("phantom", ["train.stages.1.classes={Normal: 1, Lung_Opacity: 1}"]), dataset)
    assert list(recipe.data.prompts) == ["Normal", "Lung_Opacity"]
    assert "not trained by the denoiser: COVID, Viral Pneumonia" in described(recipe, dataset)
    stage = ["train.stages.1.classes={COVID: 1}", "train.stages.1.prior_class=Normal"]
    assert list(fitted(load_recipe("phantom", stage), dataset).data.prompts) == ["Normal", "COVID"]


@pytest.mark.parametrize(
    ("labels", "overrides", "message"),
    [
        (
            ("A", "B"),
            [],
            "no class is known to be healthy; its classes are A, B; name the healthy one",
        ),
        (("Normal",), [], "contains only the healthy class Normal"),
        (("Normal", "B"), ["train.stages.1.classes={C: 1}"], "no image of class 'C'.*its classes are B, Normal"),
        (("Normal", "B"), ["train.stages.1.prior_class=C"], "no image of class 'C'"),
    ],
)
def test_classes_that_are_missing_are_named(labels: tuple[str, ...], overrides: list[str], message: str) -> None:
    with pytest.raises(UnusableData, match=message):
        fitted(load_recipe("phantom", overrides), listed(*labels))


def diffva(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_healthy_class_is_asked_for_and_named_in_one_line(tmp_path: Path) -> None:
    data = two_folders(tmp_path / "data", healthy="A")
    command = ("train", "--data", data, "--out", tmp_path / "model", "--dry-run")
    refused = diffva(*command)
    assert refused.exit_code == 2
    assert "name the healthy one with --healthy-class NAME" in refused.stderr
    plan = json.loads(diffva(*command, "--healthy-class", "A").output)
    assert plan["summary"][0] == "class A (healthy): 4 images, prompt 'normal chest scan'"
    assert plan["recipe"]["train"]["stages"][1]["classes"] == {"A": 2, "Verschattung": 1}


def test_a_healthy_class_of_another_name_has_the_models_healthy_prompt(model: Path) -> None:
    """So that the guess recognises healthy images, and inverts them under the empty prompt."""
    recipe = model_recipe(str(model), None, ("data.healthy_class=gesund",))
    assert recipe.data.prompts["gesund"] == "Normal chest scan"
    assert "Normal" not in recipe.data.prompts


@pytest.mark.parametrize("name", ["paper_fig2", "paper_induction"])
def test_a_recipe_without_stages_is_refused(name: str, images: Path, tmp_path: Path) -> None:
    result = diffva("train", "--data", images, "--out", tmp_path / "m", "--recipe", name, "--dry-run")
    assert result.exit_code == 2
    assert f"--recipe {name}: has no stages to train" in result.stderr


def test_recipe_cpu_says_where_its_base_comes_from(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = diffva("train", "--data", images, "--out", tmp_path / "m", "--recipe", "cpu", "--dry-run")
    assert result.exit_code == 2
    assert "model.base runs/demo/model: no such folder (diffva demo makes runs/demo/model)" in result.stderr


def test_a_base_that_is_a_single_file_is_refused_with_the_way_to_a_folder(images: Path, tmp_path: Path) -> None:
    (tmp_path / "v1-4.safetensors").write_bytes(bytes(100))
    base = f"model.base={tmp_path / 'v1-4.safetensors'}"
    result = diffva("train", "--data", images, "--out", tmp_path / "m", "--recipe", "paper", "--set", base, "--dry-run")
    assert result.exit_code == 2
    assert "a single file; diffusers makes a folder of it (StableDiffusionPipeline.from_single_file(" in result.stderr
