"""The files of a judge: a damaged one is an error of one line, which names the judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffva_ray.metrics.validity import Judge, load_judge, save_judge
from diffva_ray.storage.local import LocalStore

DAMAGES = {
    "judge/config.json": [
        *(b"", b"[]", b"{}", b"null", b"7", b'{"classes": 7, "healthy": "Normal", "width": 8}'),
        b'{"classes": ["Normal", "COVID"], "healthy": "Normal", "width": {}}',
    ],
    "judge/model.safetensors": [b"", b"x" * 7, b"\xff" * 200],
}


@pytest.mark.parametrize(("file", "content"), [(file, data) for file, each in DAMAGES.items() for data in each])
def test_a_damaged_file_is_a_value_error(tmp_path: Path, file: str, content: bytes) -> None:
    store = LocalStore(str(tmp_path))
    save_judge(Judge(["Normal", "COVID"], "Normal", 8), store)
    assert load_judge(store) is not None
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match="not a judge of this version") as error:
        load_judge(store)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_judge_without_its_healthy_class_is_refused(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    save_judge(Judge(["Lung_Opacity", "COVID"], "Normal", 8), store)
    with pytest.raises(ValueError, match="does not know the healthy class Normal"):
        load_judge(store)
