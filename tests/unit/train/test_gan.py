"""Stages ``va-gan``, ``vant-gan`` and ``ant-gan``: they learn from labels alone, resume exactly and stop when told."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_workers import run as run_workers
from trainings import different, killed, run, weights, with_stages

from diffva_ray.config.recipe import Recipe, RecipeError
from diffva_ray.data.dataset import UnusableData
from diffva_ray.model.bundle import build, load
from diffva_ray.references.gan import GanStage, WassersteinCritic, score
from diffva_ray.references.singla import with_posterior
from diffva_ray.references.training import converged, curve
from diffva_ray.train.adversary import PatchDiscriminator

STAGES = [
    {"name": kind, "trains": kind, "steps": 3, "batch_size": 2, "learning_rate": 1e-3, "ema_decay": 0.9,
     "block_out_channels": [8, 16], "norm_num_groups": 4, "critic_channels": 8}
    for kind in ("va-gan", "vant-gan", "ant-gan")
]  # fmt: skip
JUDGE = {"name": "judge", "trains": "judge", "steps": 1, "batch_size": 4, "learning_rate": 1e-3}


@pytest.mark.parametrize("stage", STAGES, ids=["va-gan", "vant-gan", "ant-gan"])
@pytest.mark.parametrize("kill_at", [3, 6])
def test_killed_and_resumed_is_bitwise_the_undisturbed_training(
    stage: dict, kill_at: int, tiny: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trainables a step: 3 is within the second step, 6 in the judge's stage, when the generator is
    finished."""
    recipe, name = with_stages(tiny, stage, JUDGE, checkpoint_every=1), stage["trains"].replace("-", "_")
    run(recipe, images, tmp_path / "whole")
    killed(recipe, images, tmp_path / "killed", kill_at, monkeypatch)
    run(recipe, images, tmp_path / "killed")
    whole, resumed = (weights(tmp_path / folder, name) for folder in ("whole", "killed"))
    assert different(whole, resumed) == []
    assert load(str(tmp_path / "whole")).digest == load(str(tmp_path / "killed")).digest


def test_two_workers_are_one_with_the_same_batch(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    """The penalty's gradient of a gradient included: the critic's gradient norm is that of the whole batch."""
    stages = [{**stage, "steps": 2, "batch_size": 2, "betas": [0.9, 0.999], "learning_rate": 2e-4} for stage in STAGES]
    recipe, file = with_stages(tiny, *stages), tmp_path / "recipe.json"
    file.write_text(recipe.model_dump_json())
    one, two = run(recipe, images, tmp_path / "one"), run_workers(2, file, images, tmp_path / "two")
    for name in ("loss", "critic_loss", "grad_norm", "critic_grad_norm"):
        ours, theirs = ([entry[name] for entry in history] for history in (one, two))
        assert theirs == pytest.approx(ours, rel=1e-4), name


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey images with some noise; abnormal ones have a brighter square."""
    folder, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for label in ("Normal", "COVID"):
        (folder / label).mkdir()
        for n in range(16):
            image = 0.35 + 0.03 * rng.standard_normal((32, 32))
            if label == "COVID":
                image[8:20, 8:20] += 0.4
            Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)).save(folder / label / f"{n}.png")
    return folder


LEARNING: dict[str, dict] = {
    "va-gan": {"steps": 100, "batch_size": 4, "ema_decay": None, "map_weight": 10.0},
    "vant-gan": {"steps": 100, "batch_size": 4, "ema_decay": None, "map_weight": 10.0, "cycle_weight": 5.0},
    "ant-gan": {"steps": 100, "batch_size": 8, "ema_decay": None},
}


@pytest.mark.parametrize("stage", STAGES, ids=["va-gan", "vant-gan", "ant-gan"])
def test_it_removes_what_distinguishes_the_kinds(
    stage: dict, tiny: Recipe, squares: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The bright square of abnormal images is removed, the rest stays, and other networks do not change. A generator
    of maps has never seen a healthy image, so it is not tested on healthy images."""
    longer = {**stage, **LEARNING[stage["trains"]]}
    with caplog.at_level(logging.INFO):
        run(with_stages(tiny, longer), squares, tmp_path)
    trained, start = load(str(tmp_path)), build(tiny)
    gan_generator = trained.extra(stage["trains"].replace("-", "_")).eval()
    images = np.stack([np.asarray(Image.open(file)) for file in sorted((squares / "COVID").iterdir())])
    abnormal = torch.from_numpy(images).float() / 255
    with torch.no_grad():
        lesion = abnormal - gan_generator.generate(abnormal)
    inside = lesion[:, 9:19, 9:19].mean()
    lesion[:, 6:22, 6:22] = 0
    around = lesion.abs().sum() / (len(lesion) * (32 * 32 - 16 * 16))
    assert inside > 0.2
    assert around < 0.25 * inside
    for name in ("vae", "unet", "text_encoder"):
        before, after = start.modules[name].state_dict(), trained.modules[name].state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before), name
    measured = gan_generator.config["measured"]
    assert measured["converged"] == (abs(measured["gap_generated"]) < 0.5 * measured["gap_abnormal"])
    assert (f"stage {stage['name']} converged" in caplog.text) == measured["converged"]


def test_singla_reaches_wanted_posteriors(tiny: Recipe, squares: Path, tmp_path: Path) -> None:
    """The posterior of what it makes rises with the wanted one, and its own reconstruction stays close."""
    classifier = {**JUDGE, "name": "classifier", "trains": "image-classifier", "steps": 30, "batch_size": 8}
    stage = {**STAGES[0], "name": "singla", "trains": "singla", "steps": 120, "batch_size": 4, "ema_decay": None,
             "learning_rate": 2e-3, "cycle_weight": 5.0}  # fmt: skip
    run(with_stages(tiny, classifier, stage), squares, tmp_path)
    trained = load(str(tmp_path))
    f, generator = (trained.extra(name).eval() for name in ("image_classifier", "singla"))
    images = np.stack([np.asarray(Image.open(file)) for file in sorted((squares / "COVID").iterdir())])
    x = torch.from_numpy(images).float()[:, None] / 127.5 - 1
    with torch.no_grad():
        posteriors = [
            f.log_odds(generator(with_posterior(x, torch.full((len(x),), wanted)))[:, 0] / 2 + 0.5).sigmoid().mean()
            for wanted in (0.0, 1.0)
        ]
    assert posteriors[0] < posteriors[1] - 0.3
    assert 0 <= generator.config["measured"]["consistency_error"] < 0.5


def test_charachons_generators_keep_and_turn_the_decision(tiny: Recipe, squares: Path, tmp_path: Path) -> None:
    classifier = {**JUDGE, "name": "classifier", "trains": "image-classifier", "steps": 30, "batch_size": 8}
    stage = {**STAGES[0], "name": "charachon", "trains": "charachon", "steps": 100, "batch_size": 4, "ema_decay": None,
             "learning_rate": 2e-3}  # fmt: skip
    run(with_stages(tiny, classifier, stage), squares, tmp_path)
    trained = load(str(tmp_path))
    f, pair = (trained.extra(name).eval() for name in ("image_classifier", "charachon"))
    images = np.stack([np.asarray(Image.open(file)) for file in sorted((squares / "COVID").iterdir())])
    x = torch.from_numpy(images).float()[:, None] / 127.5 - 1
    with torch.no_grad():
        own, similar, adversarial = (f.log_odds(made[:, 0] / 2 + 0.5).mean() for made in (x, *pair(x)))
        moved = [(made - x).abs().mean() for made in pair(x)]
    assert own > 0
    assert similar > 0
    assert adversarial < 0
    assert moved[0] < moved[1]


def test_an_explainer_without_its_classifier_is_refused(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="trains: image-classifier"):
        run(with_stages(tiny, {**STAGES[0], "name": "singla", "trains": "singla"}), images, tmp_path)


def test_a_generator_that_did_not_converge_is_reported(
    tiny: Recipe, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(with_stages(tiny, {**STAGES[0], "steps": 1}), images, tmp_path)
    assert "stage va-gan DID NOT CONVERGE" in caplog.text
    assert not load(str(tmp_path)).extra("va_gan").config["measured"]["converged"]


def test_the_curve_is_logged_and_the_wall_time_ends_a_stage(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    """At the first point of the curve after it; the stages that follow are trained, and a resumed curve goes on."""
    stage = {**STAGES[0], "steps": 40, "measure_every": 2}
    history = run(with_stages(tiny, {**stage, "max_minutes": 1e-6}, JUDGE), images, tmp_path / "short")
    assert [entry["step"] for entry in history if entry["stage"] == "va-gan"] == [1, 2]
    assert [entry["stage"] for entry in history][-1] == "judge"
    assert load(str(tmp_path / "short")).extra("va_gan").config["measured"]
    points = curve(run(with_stages(tiny, {**stage, "steps": 7}), images, tmp_path / "whole"), "va-gan")
    assert [point["step"] for point in points] == [2, 4, 6]
    assert all(-10 <= point["removed"] <= 10 for point in points)
    assert points[0]["minutes"] < points[1]["minutes"] < points[2]["minutes"]


def test_a_stage_stops_when_its_curve_has_converged(
    tiny: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = iter([0.2, 0.8, 0.83, 0.85, 0.8, 0.8])
    monkeypatch.setattr(GanStage, "point", lambda self: {"removed": next(made), "change": 0.02})
    stage = {**STAGES[0], "steps": 40, "measure_every": 1, "stop_when_converged": True}
    history = run(with_stages(tiny, stage), images, tmp_path)
    assert len(history) == 4
    assert converged(curve(history, "va-gan"))


@pytest.mark.parametrize(
    ("removed", "change", "expected"),
    [
        ([0.9, 0.95, 0.9], [0.02, 0.02, 0.021], True),
        ([0.9, 0.95], [0.02, 0.02], False),  # too few points
        ([0.3, 0.3, 0.3], [0.02, 0.02, 0.02], False),  # a plateau of a generator that has learnt nothing
        ([1.6, 1.6, 1.6], [0.02, 0.02, 0.02], False),  # beyond healthy
        ([0.6, 0.8, 0.9], [0.02, 0.02, 0.02], False),  # still learning
        ([0.9, 0.9, 0.9], [0.02, 0.025, 0.03], False),  # still changing
    ],
)
def test_the_criterion_wants_a_learnt_task_and_a_plateau(
    removed: list[float], change: list[float], expected: bool
) -> None:
    points = [{"removed": one, "change": other} for one, other in zip(removed, change, strict=True)]
    assert converged(points) == expected


def test_the_wasserstein_critics_loss_equals_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with finite differences: the penalty uses the gradient's norm at the mixture."""
    torch.manual_seed(0)
    critic = PatchDiscriminator(8).double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    healthy, generated = torch.rand(2, 2, 1, 32, 32, dtype=torch.float64)
    mix = torch.tensor([0.25, 0.75], dtype=torch.float64).reshape(2, 1, 1, 1)
    found = WassersteinCritic(critic, 7.0)(healthy, generated, mix)
    with torch.no_grad():
        between, norms = mix * healthy + (1 - mix) * generated, []
        for image in between:
            pixels = torch.eye(1024, dtype=torch.float64).reshape(1024, 1, 32, 32) * 1e-5
            norms.append(((score(critic, image + pixels) - score(critic, image - pixels)) / 2e-5).norm())
        penalty = torch.stack([(norm - 1) ** 2 for norm in norms]).mean()
        expected = score(critic, generated).mean() - score(critic, healthy).mean() + 7 * penalty
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"classes": {"Normal": 1}}, "remove Normal from classes"),
        ({"classes": {"Gout": 1}}, "no image of class 'Gout'"),
        ({"norm_num_groups": 5}, "divisible"),
        ({"block_out_channels": [8] * 7}, "halve images of 32 pixels"),
    ],
)
def test_a_stage_that_cannot_be_built_is_named(
    change: dict, reason: str, tiny: Recipe, images: Path, tmp_path: Path
) -> None:
    with pytest.raises((RecipeError, UnusableData), match=reason):
        run(with_stages(tiny, {**STAGES[0], **change}), images, tmp_path)
