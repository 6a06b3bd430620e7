"""No deprecated API of Ray is used: training, generation and reduce on Ray, with the warnings of every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray

from diffva_ray.config.recipe import Recipe, to_yaml

ROOT = Path(__file__).parents[2]
OURS, RAYS = str(ROOT / "diffva_ray"), str(Path(ray.__file__).parent)

# The last two lines prove that the test works: they change a deprecated setting, as from a file of ours.
SCRIPT = """
import sys
from diffva_ray.workflows.generate import generate_run
from diffva_ray.workflows.reduce import reduce
from diffva_ray.workflows.train import train_model
from diffva_ray.distributed import session
from diffva_ray.config.recipe import load_recipe
from diffva_ray.evaluate.options import Options
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import open_run

recipe, data, model, run, ours = sys.argv[1:]
recipe = load_recipe(recipe)
with session.connect(cpus=1):
    train_model(recipe, data, model)
    generate_run(recipe, data, model, run, Request())
    reduce(open_run(run), Options())
    setting = "import ray.data; ray.data.DataContext.get_current().use_polars = False"
    exec(compile(setting, ours + "/canary.py", "exec"), {})
"""


def called_by_us(note: dict[str, Any]) -> bool:
    """Return whether our code called the function that warns; defaults that Ray sets itself do not count."""
    for file, function in note["stack"]:
        if file.startswith(RAYS) and function == "get_current":
            return False
        if not file.startswith((RAYS, "<")):
            return file.startswith(OURS)
    return False


def test_nothing_deprecated_is_in_use(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    recipe, notes = tmp_path / "tiny.yaml", tmp_path / "notes"
    recipe.write_text(to_yaml(tiny))
    notes.mkdir()
    environment = {
        **os.environ, "NOTES": str(notes), "PYTHONPATH": str(Path(__file__).parent / "noting"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, recipe, images, tmp_path / "model", tmp_path / "run", OURS]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]

    found = [json.loads(line) for file in notes.iterdir() for line in file.read_text().splitlines()]
    print(len(list(notes.iterdir())), len(found), {(f["kind"], f["text"][:90], str(f["stack"][:5])) for f in found})
    assert len(list(notes.iterdir())) > 1, "only the driver was recorded"
    ours = [note for note in found if called_by_us(note)]
    canary = [note for note in ours if "canary.py" in str(note["stack"])]
    assert canary, "a deprecated setting would not be found"
    assert [note for note in ours if note not in canary] == []
    assert [note["text"] for note in found if note["kind"] == "logged"] == []
