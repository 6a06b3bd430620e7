"""``README.md`` of a run, with which ``datasets`` reads its records."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from export_files import header

from diffva_ray.evaluate.run_card import write_card
from diffva_ray.generate.run import open_run
from diffva_ray.generate.verification import verify


def test_the_header_names_the_records_alone(finished: Path) -> None:
    (config,) = header(finished)["configs"]
    (entry,) = config["data_files"]
    named = sorted(finished.glob(entry["path"]))
    assert named == sorted((finished / "records").iterdir())
    assert sum(len(pd.read_parquet(path)) for path in named) == 18
    assert str(finished.parent) not in (finished / "README.md").read_text()


def test_an_edited_or_deleted_card_is_no_damage(run: Path) -> None:
    card = run / "README.md"
    card.write_text("mine")
    write_card(open_run(str(run)))
    assert card.read_text() == "mine"
    assert verify(open_run(str(run))) == []
    card.unlink()
    assert verify(open_run(str(run))) == []


def test_datasets_loads_the_records_of_a_run(finished: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(finished), split="train", cache_dir=str(tmp_path))
    assert len(loaded) == 18
    assert {"ssim", "record_id", "counterfactual_path"} <= set(loaded.column_names)
