"""``README.md`` of a model folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffva_ray.config.recipe import Recipe
from diffva_ray.model.hub_card import hub_card, write_hub_card
from diffva_ray.storage.local import LocalStore
from diffva_ray.workflows.train import train_model

CARD: dict[str, Any] = {
    "format": 2, "digest": "d" * 64, "images": 12, "data": "/home/me/clinic", "data_kind": "NIH ChestX-ray14",
    "recipe": {"name": "mine", "model": {"base": "org/base"}, "data": {"prompts": {"A|B": "a <b>"}}},
}  # fmt: skip


def header(text: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return content


def test_a_trained_model_has_a_card_that_a_hub_reads(
    tiny: Recipe, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(recipe: Recipe, data: str, out: str, *_: Any) -> None:  # instead of the steps of training
        shutil.copytree(model, out, dirs_exist_ok=True)

    monkeypatch.setattr("diffva_ray.workflows.train._train", copied)
    assert train_model(tiny, str(images), str(tmp_path / "model"))
    text = (tmp_path / "model" / "README.md").read_text()
    assert header(text)["library_name"] == "diffusers"
    assert header(text)["license"] == "apache-2.0"  # of phantoms
    card = json.loads((model / "diffva.json").read_text())
    assert card["digest"] in text
    assert str(images) not in text
    assert "Not for clinical use" in text


def test_an_edited_card_stays_and_an_unfinished_model_has_none(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    assert not write_hub_card(store)
    store.put("diffva.json", json.dumps(CARD).encode())
    assert write_hub_card(store)
    store.put("README.md", b"mine")
    assert not write_hub_card(store)
    assert store.read("README.md") == b"mine"


def test_licence_base_and_judge_are_as_known() -> None:
    text = hub_card(CARD, {"calibration": {"accuracy": 0.75, "images": 40}})
    assert header(text)["license"] == "other"
    assert header(text)["base_model"] == "org/base"
    assert "on 40 held-out images: 0.750" in text
    assert "| A\\|B | a &lt;b> |" in text
    assert "/home/me" not in text
    untested = hub_card({**CARD, "recipe": {"name": "mine", "model": {"base": "/models/sd"}}}, {})
    assert "base_model" not in header(untested)
    assert "no evidence" in untested
    assert "/models/sd" not in untested
    assert "--judge" in hub_card(CARD, None)
