"""The loop: trained weights change, and a training killed at any step ends with the weights of an undisturbed one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trainings import different, killed, run, weights, with_stages

from diffva_ray.config.recipe import Recipe, RecipeError
from diffva_ray.model.bundle import Bundle, build, load
from diffva_ray.model.card import UnusableModel
from diffva_ray.model.cross_attention import cross_attention_parameters
from diffva_ray.storage.local import LocalStore
from diffva_ray.train.checkpoint import Checkpoints
from diffva_ray.train.class_images import class_images
from diffva_ray.train.logger import TrainingLogger
from diffva_ray.train.loop import prepare
from diffva_ray.train.stage import StageContext, Worker
from diffva_ray.train.validation import validation_of
from diffva_ray.workflows.status import describe, read_status

PARTS = ("vae", "unet", "text_encoder", "judge")
DENOISER = {"name": "joint", "trains": "denoiser", "steps": 3, "batch_size": 4, "learning_rate": 1e-3}


def test_every_network_moved(tiny: Recipe, model: Path) -> None:
    start, trained = build(tiny), load(str(model))
    for name in ("vae", "unet", "text_encoder"):
        before, after = start.modules[name].state_dict(), trained.modules[name].state_dict()
        moved = [key for key in before if not torch.equal(before[key], after[key])]
        assert len(moved) > 0.9 * len(before), name
    assert trained.vae.config.scaling_factor != start.vae.config.scaling_factor
    history = json.loads((model / ".train" / "progress.json").read_text())["history"]
    assert [entry["stage"] for entry in history] == ["autoencoder", "joint", "judge"]


@pytest.mark.parametrize("kill_at", range(10))
def test_killed_at_any_step_and_resumed_is_bitwise_the_undisturbed_run(
    kill_at: int, tiny: Recipe, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 0-3 are the autoencoder's, 4-7 the denoiser's, 8-9 the judge's; checkpoints are two steps apart."""
    out = tmp_path / "model"
    killed(tiny, images, out, kill_at, monkeypatch)
    run(tiny, images, out)
    assert different(weights(model, *PARTS), weights(out, *PARTS)) == []
    assert load(str(model)).digest == load(str(out)).digest
    one, other = (
        [(entry["stage"], entry["step"], entry["loss"]) for entry in json.loads(file.read_text())["history"]]
        for file in (model / ".train/progress.json", out / ".train/progress.json")
    )
    assert one == other  # nothing of the killed process is logged twice


def test_a_checkpoint_of_another_version_is_a_clear_error(
    tiny: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tiny, images, tmp_path / "model", 6, monkeypatch)
    latest = Checkpoints(tmp_path / "model/.train", 2).latest()
    assert latest is not None
    file = latest / "vae.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "conv_in" not in name}, file)
    state = json.loads((latest / "state.json").read_text())
    state["files"] = {}  # as of a version that stored no digests
    (latest / "state.json").write_text(json.dumps(state))
    with pytest.raises(UnusableModel, match=r"does not fit this version.*vae.safetensors.*conv_in"):
        run(tiny, images, tmp_path / "model")


def test_small_shares_accumulate_to_the_same_step(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    """Prior preservation and min-SNR included: a share holds instances and their class images."""
    stage = {**DENOISER, "classes": {"COVID": 1}, "prior_class": "Normal", "snr_gamma": 5.0, "prompt_dropout": 0.3}
    whole = run(with_stages(tiny, stage), images, tmp_path / "whole")
    shared = run(with_stages(tiny, {**stage, "micro_batch_size": 3}), images, tmp_path / "shared")  # shares of 3 and 1
    assert [entry["loss"] for entry in shared] == pytest.approx([entry["loss"] for entry in whole], rel=1e-5)
    assert [entry["grad_norm"] for entry in shared] == pytest.approx([entry["grad_norm"] for entry in whole], rel=1e-3)


def test_an_adversary_trains_and_resumes_bitwise(
    tiny: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {
        "name": "autoencoder", "trains": "autoencoder", "steps": 4, "batch_size": 4, "learning_rate": 1e-3,
        "adversarial_weight": 0.5, "perceptual_weight": 1.0, "adversarial_start": 1,
    }  # fmt: skip
    recipe = with_stages(tiny, stage, checkpoint_every=2)
    history = run(recipe, images, tmp_path / "whole")
    assert all(np.isfinite(entry["adversary_loss"]) for entry in history)
    assert history[0]["adversary_grad_norm"] > 0

    killed(recipe, images, tmp_path / "killed", 5, monkeypatch)
    assert run(recipe, images, tmp_path / "killed") == history  # nothing of the killed process is lost or logged twice
    whole, resumed = (weights(tmp_path / name, *PARTS) for name in ("whole", "killed"))
    assert different(whole, resumed) == []


def test_a_decoder_alone_leaves_the_latents_as_they_were(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    stage = {"name": "decoder", "trains": "autoencoder", "part": "decoder", "steps": 2, "batch_size": 4,
             "learning_rate": 1e-3}  # fmt: skip
    start = build(tiny)
    run(with_stages(tiny, stage), images, tmp_path)
    trained = load(str(tmp_path))
    before, after = start.vae.state_dict(), trained.vae.state_dict()
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"decoder", "post_quant_conv"}
    assert trained.vae.config.scaling_factor == start.vae.config.scaling_factor


def test_class_images_are_generated_once_and_kept(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    stage = {**DENOISER, "steps": 1, "classes": {"COVID": 1}, "prior_class": "Normal", "class_images": "generated",
             "num_class_images": 2}  # fmt: skip
    one = run(with_stages(tiny, stage), images, tmp_path / "one")
    files = sorted((tmp_path / "one/.train/class_images/joint").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png"]
    assert files[0].read_bytes() != files[1].read_bytes()
    (tmp_path / "two/.train").mkdir(parents=True)
    shutil.copytree(tmp_path / "one/.train/class_images", tmp_path / "two/.train/class_images")
    (tmp_path / "two/.train/class_images/joint/00001.png").unlink()  # an interrupted generation goes on
    two = run(with_stages(tiny, stage), images, tmp_path / "two")
    assert one == two
    again = tmp_path / "two/.train/class_images/joint/00001.png"
    assert again.read_bytes() == files[1].read_bytes()


def test_each_worker_generates_its_share_of_the_class_images(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    stage = {**DENOISER, "classes": {"COVID": 1}, "prior_class": "Normal", "class_images": "generated",
             "num_class_images": 3}  # fmt: skip
    recipe, store = with_stages(tiny, stage), LocalStore(str(tmp_path))
    bundle, image_set, _ = prepare(recipe, str(images), store)
    context, config = StageContext(bundle, image_set, 0, store, 100), recipe.train.stages[0]

    def there() -> list[str]:
        return sorted(file.name for file in (tmp_path / ".train/class_images/joint").iterdir())

    class Waited(Exception):
        pass

    def wait() -> None:
        raise Waited

    with pytest.raises(Waited):  # for the first worker
        class_images(context, config, Worker(torch.device("cpu"), 1, 2, wait))
    assert there() == ["00001.png"]
    assert len(class_images(context, config, Worker(torch.device("cpu"), 0, 2)).images) == 3
    assert there() == ["00000.png", "00001.png", "00002.png"]


def test_validation_scores_the_attribution_and_changes_nothing(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    stage = {**DENOISER, "ema_decay": 0.9, "steps": 2}
    run(with_stages(tiny, stage), images, tmp_path / "blind")
    recipe = with_stages(tiny, stage, validation={"every": 1, "images": 3})
    history = run(recipe, images, tmp_path / "watched", validate=validation_of(recipe))
    seen = [entry for entry in history if "validation_auroc" in entry]
    assert [entry["step"] for entry in seen] == [1, 2]
    assert all(0 <= entry["validation_auroc"] <= 1 and entry["validation_change"] > 0 for entry in seen)
    assert load(str(tmp_path / "blind")).digest == load(str(tmp_path / "watched")).digest
    events = list((tmp_path / "watched/.train/tensorboard").rglob("events.*"))
    events_text = b"".join(file.read_bytes() for file in events)
    for name in (b"joint/loss", b"joint/learning_rate", b"joint/grad_norm", b"joint/validation_auroc", b"attribution"):
        assert name in events_text


def test_a_validation_before_the_first_logged_loss_is_reported_without_one(
    tiny: Recipe, images: Path, tmp_path: Path
) -> None:
    """If the denoiser is the first stage, as in recipe ``paper``, nothing has been logged before the validation."""
    recipe = with_stages(tiny, DENOISER, validation={"every": 1, "images": 1}, log_every=20)
    validate, reports = validation_of(recipe), list[str]()
    assert validate is not None

    def watched(bundle: Bundle, logger: TrainingLogger, stage: str, step: int) -> None:
        validate(bundle, logger, stage, step)
        reports.append(describe(read_status(str(tmp_path))))

    history = run(recipe, images, tmp_path, validate=watched)
    assert [entry["step"] for entry in history if "validation_auroc" in entry] == [1, 2, 3]
    assert [entry["step"] for entry in history if "loss" in entry] == [3]
    assert "1 of 3 steps, stage joint, about " in reports[0]


def test_a_warm_up_changes_only_parameters_that_read_the_prompt(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    start = build(tiny)
    run(with_stages(tiny, {**DENOISER, "trainable": "cross-attention"}), images, tmp_path)
    trained = load(str(tmp_path))
    for name in ("unet", "text_encoder"):
        before, after = start.modules[name].state_dict(), trained.modules[name].state_dict()
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert moved == set(cross_attention_parameters(start.unet) if name == "unet" else ())


def test_lora_resumes_bitwise_and_exports_ordinary_weights(
    tiny: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    recipe = with_stages(tiny, DENOISER, lora={"rank": 4, "dropout": 0.1}, checkpoint_every=2)
    run(recipe, images, tmp_path / "whole")
    killed(recipe, images, tmp_path / "killed", 2, monkeypatch)
    run(recipe, images, tmp_path / "killed")
    assert load(str(tmp_path / "whole")).digest == load(str(tmp_path / "killed")).digest
    start, whole = build(tiny), weights(tmp_path / "whole", *PARTS)
    assert {key.removeprefix("unet.") for key in whole if key.startswith("unet.")} == set(start.unet.state_dict())
    moved = [key for key, value in start.unet.state_dict().items() if not torch.equal(value, whole[f"unet.{key}"])]
    assert moved
    assert all(".to_" in key for key in moved)


@pytest.mark.parametrize(
    ("changes", "stage", "reason"),
    [
        ({}, {**DENOISER, "optimizer": "adamw8bit"}, "bitsandbytes"),
        ({"trackers": ["mlflow"]}, DENOISER, "mlflow"),
        ({"trackers": ["wandb"]}, DENOISER, "wandb"),
    ],
)
def test_what_is_not_installed_is_named(
    changes: dict, stage: dict, reason: str, tiny: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, reason, None)  # as if it were not installed
    with pytest.raises(RecipeError, match=reason):
        run(with_stages(tiny, stage, **changes), images, tmp_path)
