"""What a command says about the next one, and about words that a model does not know."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from diffva_ray.cli import main
from diffva_ray.generate.run import FingerprintDiffers
from diffva_ray.model.card import ModelFolder


def diffva(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_next_command_can_be_pasted(images: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "Lauf Ä 1; ls"
    made = diffva("generate", "--data", images, "--model", model, "--out", out, "--limit", 4, "--executor", "inline")
    line = next(line for line in made.output.splitlines() if "next: " in line)
    words = shlex.split(line.partition("next: diffva ")[2])
    assert words == ["reduce", str(out)]
    reduced = diffva(*words, "--executor", "inline")
    assert reduced.exit_code == 0
    assert shlex.split(reduced.output.partition("next: diffva ")[2]) == ["report", str(out)]


def test_many_differences_are_five_and_a_count() -> None:
    old, new = {f"key{n}": 0 for n in range(70)}, {f"key{n}": 1 for n in range(70)}
    text = str(FingerprintDiffers("runs/x", sorted(old), old, new))
    assert text.count("there") == 5
    assert "; and 65 more); choose another --out" in text
    assert "more" not in str(FingerprintDiffers("runs/x", ["key1"], old, new))


def test_inspect_takes_a_single_image(images: Path, tmp_path: Path) -> None:
    file = next((images / "COVID" / "images").iterdir())
    result = diffva("inspect", file)
    assert result.exit_code == 0
    assert "sizes: 32x32 (1)" in result.output
    assert "modes:" in result.output
    assert "healthy class" not in result.output
    assert json.loads(diffva("inspect", file, "--json").output)["images"] == 1
    absent = diffva("inspect", tmp_path / "absent.png")
    assert absent.exit_code == 2
    assert "absent.png: cannot be read" in absent.stderr


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("gesunde Lunge", ["prompt 'gesunde Lunge': 2 of 2 words unknown to this model (gesunde, lunge)"]),
        ("normal Brustbild", ["prompt 'normal Brustbild': 1 of 2 words unknown to this model (brustbild)"]),
        ("здоров", ["prompt 'здоров': 1 of 1 words unknown to this model (здоров)"]),
        ("no COVID 19 in the left lung, x-ray", []),
        ("two nodules", ["prompt 'two nodules': 1 of 2 words unknown to this model (two)"]),
        ("Verschattung", []),  # of a training prompt
        (" ", ["prompt ' ': asks for nothing"]),
    ],
)
def test_words_that_the_model_does_not_know(prompt: str, said: list[str], model: Path) -> None:
    assert ModelFolder(str(model)).prompt_notes([prompt], ["Verschattung links"]) == said


def test_a_folder_without_a_tokenizer_file_checks_no_word(tmp_path: Path) -> None:
    assert ModelFolder(str(tmp_path)).prompt_notes(["gesunde Lunge"], []) == []


@pytest.mark.parametrize("verb", ["generate", "explain"])
def test_unknown_words_are_said_before_the_work(verb: str, images: Path, model: Path, tmp_path: Path) -> None:
    place = {"generate": ("--data", images, "--executor", "inline", "--limit", 1, "--out", tmp_path / "run"),
             "explain": (next((images / "COVID" / "images").iterdir()), "--out", tmp_path / "sheet.png")}  # fmt: skip
    result = diffva(verb, *place[verb], "--model", model, "--prompt", "gesunde Lunge")
    assert result.exit_code == 0
    assert result.stderr.count("2 of 2 words unknown to this model (gesunde, lunge)") == 1
