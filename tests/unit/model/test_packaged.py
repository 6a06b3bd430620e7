"""The model that comes with the package: by name, without a network, as any other model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import diffva_ray
from diffva_ray.cli import main
from diffva_ray.data.encoding import encode_grey, quantise
from diffva_ray.data.phantoms import phantom
from diffva_ray.model.card import ModelFolder, folder_digest
from diffva_ray.model.packaged import model_address

ADDRESS = "package://small"
MAX_BYTES = 25 * 2**20


def test_a_name_is_an_address_unless_a_folder_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_address("small") == ADDRESS
    assert model_address("models/small") == "models/small"
    (tmp_path / "small").mkdir()
    assert model_address("small") == "small"


def test_the_package_holds_a_whole_model() -> None:
    folder = ModelFolder(ADDRESS)
    assert folder.card is not None
    local = folder.store.local_folder()
    assert folder.card["digest"] == folder_digest(local)
    assert sum(file.stat().st_size for file in local.rglob("*")) < MAX_BYTES
    assert folder.store.uri == ADDRESS  # the same on every machine
    assert "/" not in json.dumps(folder.card["recipe"]["model"]["base"] or "")  # no path of the machine that made it


def test_an_unknown_packaged_model_is_refused_in_one_line(tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(encode_grey(quantise(phantom("COVID", 3).image)))
    result = CliRunner().invoke(main, ["explain", str(image), "--model", "package://large"])
    assert result.exit_code == 2
    assert "package://large" in result.output


def test_explain_needs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("image.png").write_bytes(encode_grey(quantise(phantom("Lung_Opacity", 3, size=200).image)))
    result = CliRunner().invoke(main, ["explain", "image.png", "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    about = json.loads(result.output[result.output.index("{") :])
    assert about["model"] == ADDRESS
    assert Path("image.explained.png").stat().st_size > 10_000
    assert about["measured"].startswith("On 330 images of other people")


def test_the_model_removes_an_opacity_from_python() -> None:
    """A drawn opacity on a phantom, whose anatomy it has never seen, is darkened more than the rest of the image."""
    made = phantom("Lung_Opacity", 11, size=128)
    result = diffva_ray.load("small").generate(made.image)
    change = np.abs(result.attribution)
    assert change[made.lesion].mean() > 2 * change[~made.lesion].mean()
