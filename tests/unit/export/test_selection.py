"""Splits by patient, or the data set's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest

from diffva_ray.data.dataset import UnusableData
from diffva_ray.export.acceptance import Rule
from diffva_ray.export.selection import DEFAULT_SPLITS, Counts, Selection, parse_splits
from diffva_ray.schema import RECORDS


def table(count: int, **columns: Any) -> pa.Table:
    rows = [
        {"status": "ok", "label": "A", "patient": f"p{n // 3}", "image_path": f"{n}.png", "split": "", "ssim": 0.5}
        | {name: values(n) for name, values in columns.items()}
        for n in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=RECORDS)


def splits(records: pa.Table, shares: dict[str, float] | None, shards_per_file: int = 1) -> dict[str, set[str]]:
    """Patients by split."""
    selection = Selection(cast(Any, SimpleNamespace()), Rule("", RECORDS), shares, shards_per_file)
    return {split: set(rows["patient"].to_pylist()) for (_, split), rows in selection.chosen(0, records)}


def test_a_patient_is_in_one_split_and_the_shares_are_met() -> None:
    found = splits(table(3000), DEFAULT_SPLITS)
    assert sorted(found) == ["test", "train", "validation"]
    assert sum(map(len, found.values())) == 1000  # each patient once
    assert 0.77 < len(found["train"]) / 1000 < 0.83
    assert 0.07 < len(found["test"]) / 1000 < 0.13


def test_an_image_without_a_patient_is_in_one_split_with_all_its_samples() -> None:
    records = table(300, patient=lambda n: "", image_path=lambda n: f"{n // 5}.png")
    selection = Selection(cast(Any, SimpleNamespace()), Rule("", RECORDS), DEFAULT_SPLITS, 1)
    paths = [set(rows["image_path"].to_pylist()) for _, rows in selection.chosen(0, records)]
    assert len(paths) == 3
    assert sum(map(len, paths)) == 60


def test_the_split_of_a_patient_does_not_depend_on_the_shard() -> None:
    whole = splits(table(300), DEFAULT_SPLITS)
    part = splits(table(300).slice(150), DEFAULT_SPLITS)
    assert all(part[name] <= whole[name] for name in part)


def test_own_splits_have_the_names_of_the_hub() -> None:
    names = ["Train", "valid", "val", "test-a"]
    assert sorted(splits(table(40, split=lambda n: names[n % 4]), None)) == ["test_a", "train", "validation"]


def test_quarantined_records_are_left_out() -> None:
    found = splits(table(30, status=lambda n: "ok" if n < 3 else "blank"), {"test": 1.0})
    assert found == {"test": {"p0"}}


def test_patients_in_several_own_splits_are_counted() -> None:
    counts = Counts(patients={"a": {"train"}, "b": {"train", "test"}})
    assert counts.shared_patients == 1


@pytest.mark.parametrize("text", ["train", "train=x", "train=0.8", "a=0.5,b=0.6", "a/b=1", "a=-1,b=2", "a=nan", ""])
def test_wrong_shares_are_refused(text: str) -> None:
    with pytest.raises(UnusableData, match="--splits"):
        parse_splits(text)
    assert parse_splits("train=0.9, test=0.1") == {"train": 0.9, "test": 0.1}
