"""Doors in jobs/: one per verb, thin, and their drivers stay light."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
from head import ROOT

from diffva_ray.cli import main

DOORS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
WITHOUT = {"demo", "inspect"}  # a demo is of this machine; a file named inspect.py would hide Python's own module
HEAVY = ("torch", "diffusers", "transformers", "accelerate")


def loaded(code: str) -> list[str]:
    """The heavy packages that a fresh process has imported after ``code``."""
    program = f"import sys\n{code}\nprint([name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    return eval(found.stdout.splitlines()[-1])


def test_every_verb_has_a_door() -> None:
    assert set(main.commands) - WITHOUT <= set(DOORS)
    assert set(DOORS) <= set(main.commands)


def test_no_door_hides_a_module() -> None:
    """Python puts jobs/ first on the path of an entry point."""
    assert not set(DOORS) & (sys.stdlib_module_names | set(metadata.packages_distributions()))


@pytest.mark.parametrize("door", DOORS)
def test_a_door_opens(door: str) -> None:
    command = [sys.executable, f"jobs/{door}.py", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert f"{door}.py {door} " in shown.stdout


@pytest.mark.parametrize("module", ["ray_generate", "ray_train"])
def test_what_a_driver_needs_of_ray_loads_no_torch(module: str) -> None:
    assert loaded(f"import diffva_ray.{module}") == []


def test_a_whole_driver_loads_no_torch() -> None:
    assert loaded("import diffva_ray.pipeline") == []
