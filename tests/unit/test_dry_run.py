"""``--dry-run``: a few lines on a terminal, JSON for everything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffva_ray.cli import main
from diffva_ray.commands.dry_run import WHOLE

COMMANDS = {
    "train": ("train --data IMAGES --out x", "stage judge (judge): 250 steps"),
    "generate": ("generate --data IMAGES --model MODEL --out x", "class COVID: 6 records, prompt 'normal chest scan'"),
    "explain": ("explain IMAGE --model MODEL", "prompts: normal chest scan"),
    "paper": ("paper --model MODEL --out x --quick", "run runs/"),
}


def on_a_terminal(words: list[str], folder: Path) -> list[str]:
    """What a command prints to a terminal."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "diffva_ray", *words]
    done = subprocess.run(command, cwd=folder, stdout=theirs, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(theirs)
    assert done.returncode == 0, done.stderr.decode()
    text = b""
    try:
        while chunk := os.read(ours, 65536):
            text += chunk
    except OSError:  # how Linux reports the end of a terminal
        pass
    os.close(ours)
    return text.decode().splitlines()


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_dry_run_is_short_and_its_json_is_whole(
    verb: str, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, expected = COMMANDS[verb]
    places = {"IMAGES": images, "MODEL": model, "IMAGE": next((images / "COVID" / "images").iterdir())}
    words = [*(str(places.get(word, word)) for word in line.split()), "--dry-run"]
    lines = on_a_terminal(words, tmp_path)
    assert any(expected in line for line in lines), lines
    assert len(lines) <= 40  # a line for each of the runs of a paper
    assert lines[-1] == WHOLE
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, words)
    assert {"data", "model", "train", "generate", "evaluate"} <= json.loads(result.stdout)["recipe"].keys()
    assert len(result.stdout.splitlines()) <= 60
    assert list(tmp_path.iterdir()) == []
