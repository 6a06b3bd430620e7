"""The numbers of reduce, recomputed by a script that imports nothing of the package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffva_ray.config.recipe import Recipe, make_recipe
from diffva_ray.evaluate.options import Options
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import open_run
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run
from diffva_ray.workflows.reduce import reduce

SCRIPT = Path(__file__).parents[3] / "experiments" / "outsider.py"


def test_an_outsider_gets_the_same_numbers(tiny: Recipe, images: Path, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("validation", "test"):
        (data / name).symlink_to(images)
    recipe = make_recipe(tiny.model_dump(mode="json"), ["generate.num_inference_steps=2"])
    for name, thresholds in (("validation", None), ("run", "validation")):
        out = str(tmp_path / name)
        generate_run(recipe, str(images), str(model), out, Request(), Execution(executor="inline"))
        source = str(tmp_path / thresholds) if thresholds else None
        metrics = reduce(open_run(out), Options(threshold_from=source), executor="inline").metrics
    command = [sys.executable, SCRIPT, tmp_path / "run", "--validation", tmp_path / "validation", "--data", data]
    theirs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def overall(table: str) -> dict:
        return next(row for row in metrics[table] if row["label"] == "all" and row.get("map", "positive") == "positive")

    ours = overall("localization") | {
        key: value for key, value in overall("ground_truth").items() if key.startswith(("psnr", "lesion"))
    }
    for key in ("n", "auroc", "auprc", "pointing_game", "threshold", "dice_fixed", "psnr", "psnr_input",
                "psnr_reconstruction", "lesion_error_ratio"):  # fmt: skip
        assert theirs[key] == pytest.approx(ours[key], rel=1e-5), key
    flips = overall("validity")
    assert theirs["flip_rate"] == pytest.approx(flips["flip_rate"]) or flips["n"] == 0
