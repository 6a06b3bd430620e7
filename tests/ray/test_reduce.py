"""Reduce on Ray: features computed by actors give the tables of a plain loop, and errors are the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from diffva_ray.config.recipe import Recipe
from diffva_ray.data.dataset import UnusableData
from diffva_ray.distributed import session
from diffva_ray.distributed.reduce import RayExecutor
from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.reduction import reduce_run
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import open_run
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run


@pytest.fixture(scope="module")
def runs(tiny: Recipe, images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run twice."""
    first, second = (tmp_path_factory.mktemp(name) / "run" for name in ("first", "second"))
    recipe = tiny.model_copy(update={"generate": tiny.generate.model_copy(update={"shard_size": 6})})
    generate_run(recipe, str(images), str(model), str(first), Request(), Execution(executor="inline"))
    shutil.copytree(first, second)
    return first, second


def test_actors_compute_the_features_of_a_loop(runs: tuple[Path, Path]) -> None:
    options = Options(extractors=("stand-in", "judge"))
    one = reduce_run(open_run(str(runs[0])), open_run(str(runs[0])).about["data"], options)
    with session.connect(cpus=2):
        run = open_run(str(runs[1]))
        other = reduce_run(run, run.about["data"], options, RayExecutor())
        with pytest.raises(UnusableData, match=r"nowhere.pth"):
            reduce_run(run, run.about["data"], Options(extractors=("inception=/nowhere.pth",)), RayExecutor())
    stored = [sorted(path.relative_to(run).as_posix() for path in run.glob("features/judge*/*")) for run in runs]
    assert len(stored[0]) == 3 + 1  # a file for each shard, and the references
    assert stored[0] == stored[1]
    rows = [json.loads(json.dumps(reduced.metrics["fid"])) for reduced in (one, other)]
    assert {row["extractor"] for row in rows[0]} == {"stand-in-random-conv-64", "judge"}
    assert rows[0] == rows[1]
