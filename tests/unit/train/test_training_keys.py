"""The keys that identify a training: what is resumed, what is refused, and how differences are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trainings import with_stages

from diffva_ray.config.recipe import Recipe, fingerprint, make_recipe
from diffva_ray.generate.run import FingerprintDiffers
from diffva_ray.workflows.train import train_model

STAGE = {"name": "joint", "trains": "denoiser", "steps": 1, "batch_size": 4, "learning_rate": 1e-3}
KEYS = ".train/training.json"


@pytest.fixture(scope="module")
def short(tiny: Recipe) -> Recipe:
    return with_stages(tiny, STAGE)


@pytest.fixture
def trained(short: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(images.parent)
    assert train_model(short, images.name, str(tmp_path), executor="inline")
    return tmp_path


def test_the_card_has_the_absolute_address_of_the_images(trained: Path, images: Path) -> None:
    assert json.loads((trained / "diffva.json").read_text())["data"] == str(images)


def test_a_difference_is_named_by_its_dotted_key(trained: Path, short: Recipe, images: Path) -> None:
    values = short.model_dump(mode="json")
    values["train"]["stages"][0]["steps"] = 9
    with pytest.raises(FingerprintDiffers, match=r"\(train\.stages\.0\.steps: 1 there, 9 now\); choose another --out"):
        train_model(make_recipe(values), str(images), str(trained), executor="inline")


def test_a_setting_that_no_longer_exists_is_named(trained: Path, short: Recipe, images: Path) -> None:
    keys = json.loads((trained / KEYS).read_text())
    keys["train"]["quantum"] = True
    (trained / KEYS).write_text(json.dumps(keys))
    with pytest.raises(FingerprintDiffers, match=r"\(train\.quantum: True there, None now\); choose another --out"):
        train_model(short, str(images), str(trained), executor="inline")


def test_a_training_from_before_a_setting_existed_goes_on(trained: Path, short: Recipe, images: Path) -> None:
    """With the setting's default, and with the fingerprint that it was started with."""
    keys = json.loads((trained / KEYS).read_text())
    del keys["train"]["cache_megabytes"], keys["train"]["stages"][0]["betas"], keys["data"]["uncertain"]
    (trained / KEYS).write_text(json.dumps(keys))
    (trained / "diffva.json").unlink()  # unfinished
    assert train_model(short, str(images), str(trained), executor="inline")
    assert json.loads((trained / "diffva.json").read_text())["training_fingerprint"] == fingerprint(keys)
    assert not train_model(short, str(images), str(trained), executor="inline")
    values = short.model_dump(mode="json")
    values["train"]["cache_megabytes"] = 7
    with pytest.raises(FingerprintDiffers, match=r"train\.cache_megabytes: 1024 there, 7 now"):
        train_model(make_recipe(values), str(images), str(trained), executor="inline")


def test_intervals_may_change_when_a_training_goes_on(trained: Path, short: Recipe, images: Path) -> None:
    values = short.model_dump(mode="json")
    values["train"] |= {"checkpoint_every": 3, "checkpoint_minutes": 1, "checkpoints_to_keep": 5, "log_every": 7}
    assert not train_model(make_recipe(values), str(images), str(trained), executor="inline")
