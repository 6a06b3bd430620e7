"""A run that is complete is found to be so without Ray and without a device."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffva_ray.config.recipe import Recipe
from diffva_ray.counterfactual import engine
from diffva_ray.distributed import session
from diffva_ray.generate.plan import Request
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run


class Started(Exception):
    pass


def test_nothing_to_do_starts_nothing(
    tiny: Recipe, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (str(images), str(model), str(tmp_path), Request())
    generate_run(tiny, *words, Execution(executor="inline"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def start(*_: object, **__: object) -> None:
        raise Started

    monkeypatch.setattr(session, "connect", start)
    monkeypatch.setattr(engine, "device_kind", start)
    for executor in ("ray", "inline"):
        assert generate_run(tiny, *words, Execution(executor=executor)) == {"shards": 0, "records": 0, "ok": 0}
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "records/part-00001.parquet").unlink()
    with pytest.raises(Started):
        generate_run(tiny, *words, Execution(executor="ray"))
    with pytest.raises(Started):  # and another configuration is not "done"
        generate_run(tiny.model_copy(update={"seed": 5}), *words, Execution(executor="ray"))
