"""Scores on images that the model was trained on are refused, or noted if allowed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffva_ray.cli import main
from diffva_ray.data.dataset import UnusableData
from diffva_ray.evaluate.external_scores import ScoreOptions, score_maps
from diffva_ray.evaluate.records import read_records
from diffva_ray.evaluate.reduction import Options, reduce_run
from diffva_ray.generate.run import Run
from diffva_ray.model.card import read_card
from diffva_ray.model.training_images import TrainingImages
from diffva_ray.storage.local import LocalStore


def teach(run: Run, paths: list[str]) -> None:
    """Change the run's model card as if the model was trained on those images."""
    model = Path(run.about["model"])
    data = LocalStore(run.about["data_root"])
    listed = [hashlib.sha256(data.read(path)).hexdigest()[:16] for path in paths]
    (model / "diffva.json").write_text(
        json.dumps({"format": 2, "recipe": {"name": "tiny"}, "digest": "d" * 64, "training_images": sorted(listed)})
    )


def test_training_lists_every_image_by_hash(model: Path, images: Path) -> None:
    """The list has the sha256 of the files and covers every class of the data."""
    seen = TrainingImages.of(read_card(LocalStore(str(model))))
    assert seen is not None
    assert len(seen.hashes) == 24
    files = sorted(images.glob("*/images/*.png"))
    assert all(seen.holds(file.read_bytes()) for file in files)
    assert not seen.holds(files[0].read_bytes() + b"\0")
    assert not seen.has(None)
    known = [hashlib.sha256(files[0].read_bytes()).hexdigest(), "0" * 64, None]
    assert [seen.has(sha256) for sha256 in known] == [True, False, False]


def test_a_run_on_training_images_is_refused_or_noted_if_allowed(make_run) -> None:
    run = make_run()
    paths = read_records(run)["image_path"].tolist()
    teach(run, paths[:5])
    with pytest.raises(UnusableData, match="5 of 12 matched images were in the model's training list"):
        score_maps(run.store.uri, run.about["data"])
    allowed = score_maps(run.store.uri, run.about["data"], ScoreOptions(allow_training_images=True)).metrics
    assert any("5 of 12" in note and "no test" in note for note in allowed["notes"])
    of_all = [row["training_images"] for row in allowed["localization"] if row["label"] == "all"]
    assert set(of_all) == {5}
    by_class = {row["label"]: row["training_images"] for row in allowed["localization"] if row["map"] == "positive"}
    assert by_class["COVID"] + by_class["Lung_Opacity"] == 5


def test_other_images_are_scored_without_a_note(make_run) -> None:
    run = make_run()
    teach(run, [])
    metrics = score_maps(run.store.uri, run.about["data"]).metrics
    assert "training_images" not in metrics["localization"][0]
    assert not any("training" in note for note in metrics["notes"])


def test_a_model_without_a_list_or_another_model_is_noted(make_run) -> None:
    run = make_run()
    assert any("not known" in note for note in score_maps(run.store.uri, run.about["data"]).metrics["notes"])
    teach(run, read_records(run)["image_path"].tolist())
    card = Path(run.about["model"]) / "diffva.json"
    card.write_text(card.read_text().replace("d" * 64, "e" * 64))  # retrained since
    assert any("not known" in note for note in score_maps(run.store.uri, run.about["data"]).metrics["notes"])


def test_the_command_refuses_external_maps_with_exit_2(make_run, tmp_path: Path) -> None:
    run = make_run()
    records = read_records(run)
    teach(run, records["image_path"].tolist()[:1])
    maps = tmp_path / "maps"
    for row in records.to_dict("records"):
        target = maps / row["image_path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(run.store.read(row["attribution_path"]))
    command = ["score", str(maps), "--data", run.about["data"], "--encoding", "signed16"]
    assert CliRunner().invoke(main, command).exit_code == 0  # without --model
    named = [*command, "--model", run.about["model"]]
    refused = CliRunner().invoke(main, named)
    assert refused.exit_code == 2
    assert "--allow-training-images" in refused.stderr
    allowed = CliRunner().invoke(main, [*named, "--allow-training-images", "--json"])
    assert allowed.exit_code == 0
    assert json.loads(allowed.stdout)["localization"][0]["training_images"] in (0, 1)


def test_reduce_notes_it_in_every_table_that_scores_images(tmp_path: Path, images: Path, model: Path) -> None:
    """The model of the fixture was trained on these images."""
    out = tmp_path / "run"
    options = ["--data", images, "--model", model, "--out", out, "--executor", "inline", "--limit", 6]
    assert CliRunner().invoke(main, ["generate", *map(str, options)]).exit_code == 0
    from diffva_ray.generate.run import open_run

    metrics = reduce_run(open_run(str(out)), str(images), Options()).metrics
    assert any("6 of 6 records are of images in the model's training list" in note for note in metrics["notes"])
    for name in ("localization", "validity", "ground_truth"):
        whole = [row for row in metrics[name] if row["label"] == "all"]
        assert whole
        assert all(row["training_images"] == 6 for row in whole)
    assert "training images" in (out / "tables" / "localization.md").read_text()
