"""Mistakes of a first hour, as people made them: each is one line that helps, or simply works.

Missing GPUs are in tests/ray/test_local_mode.py, classes without a healthy one in train/test_classes.py, paths with
spaces in test_next_steps.py, images that cannot be read in generate/test_retry.py and test_cli.py, a run of one
image in evaluate/test_credibility.py, scores without a truth, of training images and with other boxes in
evaluate/test_score.py and evaluate/test_training_images.py, a phantom model on real images in
evaluate/test_report.py, public data sets with every recipe in train/test_classes.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffva_ray.cli import main

LONG = "mild " * 60
GENERATE = "generate --data IMAGES --model MODEL --out x --dry-run"
TABLE = [  # mistake, command line, exit code, what is said
    ("a typo of a verb", "genrate --out x", 2, "generate"),
    ("an unknown recipe", "train --data IMAGES --out x --recipe big", 2, "recommended"),
    ("an unknown key", "train --data IMAGES --out x --set train.step=3", 2, "train.step"),
    ("an unknown method", f"{GENERATE} --method cyclegan", 2, "sdedit"),
    ("a strength above 1", f"{GENERATE} --strength 1.5", 2, "generate.strength"),
    ("a class that is not there", f"{GENERATE} --classes Tuberculosis", 2, "Lung_Opacity"),
    ("a class in other case", f"{GENERATE} --classes covid", 2, "there are COVID"),
    ("a model that is not there", "generate --data IMAGES --model nowhere --out x", 2, "train a model first"),
    ("a hub id as the model", "generate --data IMAGES --model some/model --out x", 2, "--set model.base=ID"),
    ("a hub id with a recipe", "explain IMAGE --model some/model --recipe phantom", 2, "--set model.base=ID"),
    ("a diffusers folder without our file", "explain IMAGE --model PLAIN", 2, "--recipe"),
    ("the same with a recipe", "explain IMAGE --model PLAIN --recipe phantom --dry-run", 0, '"name": "phantom"'),
    ("healthy images only", "train --data HEALTHY --out x --dry-run", 2, "only the healthy class Normal"),
    ("a prompt that is too long", f"{GENERATE} --prompt LONG", 2, "16 tokens"),
    ("a German prompt", "explain IMAGE --model MODEL --prompt Verschattung --out x.png", 0, "1 of 1 words unknown"),
    ("a model for a run", "report MODEL", 2, "diffva generate"),
    ("images for a model", "generate --data IMAGES --model IMAGES --out x", 2, "no diffva.json"),
    ("a sheet as a PDF", "explain IMAGE --model MODEL --out x.pdf", 0, "sheet in x.pdf"),
    ("a sheet as a GIF", "explain IMAGE --model MODEL --out x.gif", 2, ".png, .pdf, .svg"),
    ("a folder to explain", "explain IMAGES --model MODEL", 2, "a folder; explain takes one image"),
    ("a data set in place of maps", "score IMAGES --data BARE", 2, "keep one of them"),
    ("maps as JPEG", "score JPEG --data IMAGES", 2, "expected .png, .npy"),
    ("maps as NPZ", "score NPZ --data IMAGES", 2, "expected .png, .npy"),
    (
        "a resolution that does not fit",
        "train --data IMAGES --out x --set model.resolution=66 --dry-run",
        2,
        "multiple of 8",
    ),
    ("an image to inspect", "inspect IMAGE", 0, "32x32 (1)"),
]


@pytest.fixture(scope="module")
def places(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the words of the table stand for."""
    folder = tmp_path_factory.mktemp("places")
    shutil.copytree(model, folder / "plain", ignore=shutil.ignore_patterns("diffva.json", ".train", "judge"))
    shutil.copytree(images / "Normal", folder / "healthy" / "Normal")
    shutil.copytree(images / "COVID" / "images", folder / "bare" / "COVID")
    maps = {kind: folder / kind for kind in ("JPEG", "NPZ")}
    for kind, place in maps.items():
        place.mkdir()
        (place / f"01.{kind.lower()}").write_bytes(b"a map")
    return {**{kind: str(place) for kind, place in maps.items()}, "IMAGES": str(images), "MODEL": str(model),
            "PLAIN": str(folder / "plain"), "BARE": str(folder / "bare"),
            "HEALTHY": str(folder / "healthy"), "IMAGE": str(next((images / "COVID" / "images").iterdir())),
            "LONG": LONG}  # fmt: skip


@pytest.mark.parametrize(("line", "code", "said"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_mistake_of_the_first_hour(
    line: str, code: int, said: str, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, [places.get(word, word) for word in line.split()])
    assert result.exit_code == code, result.output
    assert said in result.output
    if code:
        passed = ("Usage:", "Try ", "recipe ")
        lines = [text for text in result.stderr.splitlines() if text and not text.startswith(passed)]
        assert len(lines) == 1, result.stderr
        assert list(tmp_path.iterdir()) == []
