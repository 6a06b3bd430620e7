"""Export on Ray: the same bytes as in a plain loop, and the same errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from diffva_ray.config.recipe import Recipe
from diffva_ray.distributed import session
from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.reduction import reduce_run
from diffva_ray.export import exporting
from diffva_ray.export.exporting import ExportOptions
from diffva_ray.export.formats import FORMATS
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import DamagedPart, open_run
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.export import export
from diffva_ray.workflows.generate import generate_run


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tasks_write_the_files_of_a_loop(
    tiny: Recipe, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.model_copy(update={"generate": tiny.generate.model_copy(update={"shard_size": 6})})
    generate_run(recipe, str(images), str(model), str(tmp_path / "run"), Request(), Execution(executor="inline"))
    run = open_run(str(tmp_path / "run"))
    reduce_run(run, run.about["data"], Options())
    for kind in ("huggingface", "coco"):  # one with everything in its files, and one that puts images beside them
        monkeypatch.setitem(exporting.FORMATS, kind, dataclasses.replace(FORMATS[kind], records=6))
    with session.connect(cpus=2):
        for kind in ("huggingface", "coco"):
            options = ExportOptions(format=kind, threshold=0.02 if kind == "coco" else None)
            export(run, str(tmp_path / kind / "loop"), options, "inline")
            export(run, str(tmp_path / kind / "ray"), options, "ray")
            assert len(tree(tmp_path / kind / "loop")) > 6
            assert tree(tmp_path / kind / "ray") == tree(tmp_path / kind / "loop")
        images_of_run = sorted((tmp_path / "run" / "counterfactuals").rglob("*.png"))
        images_of_run[0].write_bytes(images_of_run[-1].read_bytes())
        with pytest.raises(DamagedPart, match="not those of the record"):
            export(run, str(tmp_path / "damaged"), ExportOptions(format="huggingface"), "ray")
    assert not (tmp_path / "damaged" / "_SUCCESS").exists()
