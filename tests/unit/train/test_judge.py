"""The judge: calibrated on held-out images, and trained to ignore whether an image is a reconstruction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from trainings import run, with_stages

from diffva_ray.config.recipe import Recipe, RecipeError
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.mirroring import with_mirror_images
from diffva_ray.data.phantoms import phantom_set
from diffva_ray.metrics.validity import Judge, calibration_error, fitted_temperature, load_judge, save_judge
from diffva_ray.model.bundle import build
from diffva_ray.storage.local import LocalStore
from diffva_ray.train.judge import JudgeStage
from diffva_ray.train.sampling import ImageSet, step_generator
from diffva_ray.train.stage import Batch, StageContext

STAGE = {"name": "judge", "trains": "judge", "steps": 12, "batch_size": 8, "learning_rate": 4e-3}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 phantoms of 32 px: one image of each class is held out."""
    folder = tmp_path_factory.mktemp("many")
    list(phantom_set(LocalStore(str(folder)), 60, 32, seed=12))
    return folder


def test_an_overconfident_classifier_is_cooled_to_its_accuracy() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(0, 1.2, (6000, 4))
    targets = np.array([rng.choice(4, p=np.exp(row) / np.exp(row).sum()) for row in true])
    logits = 3.0 * true  # three times too confident
    assert fitted_temperature(logits, targets) == pytest.approx(3.0, rel=0.05)

    def error(logits: np.ndarray) -> float:
        return calibration_error(torch.from_numpy(logits).softmax(1).numpy(), targets)

    assert error(logits) > 0.15
    assert error(logits / fitted_temperature(logits, targets)) < 0.03


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    sure = np.array([[0.9, 0.1]] * 10)
    assert calibration_error(sure, np.array([0] * 9 + [1])) == pytest.approx(0.0)
    assert calibration_error(sure, np.array([0] * 5 + [1] * 5)) == pytest.approx(0.4)


def test_held_out_images_are_never_used(tiny: Recipe, many: Path, tmp_path: Path) -> None:
    recipe = with_stages(tiny, STAGE)
    images = ImageSet(open_dataset(str(many)), 32)
    stage = JudgeStage(StageContext(build(recipe), images, 0, LocalStore(str(tmp_path))), recipe.train.stages[0])
    assert [images.images[index].label for index in stage.held_out].count("COVID") == 1
    used = {stage.order[position] for position in range(500)}
    assert used == set(range(60)) - set(stage.held_out)

    # Nor are their mirror images.
    images = ImageSet(with_mirror_images(open_dataset(str(many))), 32)
    stage = JudgeStage(StageContext(build(recipe), images, 0, LocalStore(str(tmp_path))), recipe.train.stages[0])
    used = {stage.order[position] for position in range(1000)}
    held_out = {images.images[index].path for index in stage.held_out}
    assert len(used) == 120 - 2 * len(held_out)
    assert not held_out & {images.images[index].path for index in used}


def test_training_writes_a_calibrated_judge(tiny: Recipe, many: Path, tmp_path: Path) -> None:
    run(with_stages(tiny, STAGE), many, tmp_path)
    about = json.loads((tmp_path / "judge/config.json").read_text())["calibration"]
    assert about["images"] == 4
    assert 0 <= about["calibration_error"] <= 1
    judge = load_judge(LocalStore(str(tmp_path)))
    assert judge is not None
    assert float(judge.temperature) == pytest.approx(about["temperature"], rel=1e-5)
    assert about["temperature"] != 1


def test_the_temperature_changes_every_probability_and_no_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = Judge(("COVID", "Normal"), "Normal").eval()
    images = np.random.default_rng(0).uniform(size=(6, 32, 32)).astype(np.float32)
    before = judge.probabilities(images)
    judge.temperature.fill_(2.5)
    save_judge(judge, LocalStore(str(tmp_path)))
    loaded = load_judge(LocalStore(str(tmp_path)))
    assert loaded is not None
    odds = np.log(before[:, 1] / before[:, 0])
    assert np.log(loaded.probabilities(images)[:, 1] / loaded.probabilities(images)[:, 0]) == pytest.approx(
        odds / 2.5, rel=1e-3
    )
    assert loaded.healthy_probability(images) == pytest.approx(loaded.probabilities(images)[:, 1], rel=1e-5)
    assert (loaded.probabilities(images).argmax(axis=1) == before.argmax(axis=1)).all()


def test_a_judge_without_a_temperature_can_still_be_read(tmp_path: Path) -> None:
    from safetensors.torch import save

    store, judge = LocalStore(str(tmp_path)), Judge(("COVID", "Normal"), "Normal")
    save_judge(judge, store)
    old = {name: tensor for name, tensor in judge.state_dict().items() if name != "temperature"}
    store.put("judge/model.safetensors", save(old))
    loaded = load_judge(store)
    assert loaded is not None
    assert float(loaded.temperature) == 1


def test_it_learns_from_reconstructions(tiny: Recipe, many: Path, tmp_path: Path) -> None:
    """With another autoencoder the same step has another loss."""
    recipe, images = with_stages(tiny, STAGE), ImageSet(open_dataset(str(many)), 32)
    losses = []
    for change in (0.0, 0.2):
        bundle = build(recipe)
        for parameter in bundle.vae.decoder.conv_out.parameters():
            parameter.data += change
        stage = JudgeStage(StageContext(bundle, images, 0, LocalStore(str(tmp_path))), recipe.train.stages[0])
        batch = Batch(0, 8, list(range(8)), step_generator(0, "judge", 0))
        losses.append(stage.loss(stage.judge, stage.inputs(batch)).item())
    assert losses[0] != losses[1]


def test_a_judge_without_the_healthy_class_is_refused(tiny: Recipe, many: Path) -> None:
    recipe = with_stages(tiny, {**STAGE, "classes": {"COVID": 1, "Lung_Opacity": 1}})
    context = StageContext(build(recipe), ImageSet(open_dataset(many, recipe.data), 32, 100), 0, LocalStore(str(many)))
    with pytest.raises(RecipeError, match=r"has to know the healthy class Normal.*see data.healthy_class"):
        JudgeStage(context, recipe.train.stages[0])


def test_a_stored_judge_without_the_healthy_class_is_refused(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    save_judge(Judge(["COVID", "Flu"], "Normal", 4), store)
    with pytest.raises(ValueError, match="does not know the healthy class Normal"):
        load_judge(store)
