"""Entry scripts in jobs/: one for each verb, and their drivers do not load torch."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
from head import ROOT

from diffva_ray.cli import main

SCRIPTS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
WITHOUT = {
    "demo",
    "inspect",
    "studio",
}  # the demo and the page run on this machine; a file named inspect.py would hide Python's own module
HEAVY = ("torch", "diffusers", "transformers", "accelerate")


def loaded(code: str) -> list[str]:
    """Return the heavy packages that a new process has imported after ``code``."""
    program = f"import sys\n{code}\nprint([name for name in {HEAVY} if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    return eval(process.stdout.splitlines()[-1])


def test_every_verb_has_a_script() -> None:
    assert set(main.commands) - WITHOUT <= set(SCRIPTS)
    assert set(SCRIPTS) <= set(main.commands)


def test_no_script_hides_a_module() -> None:
    """Python puts jobs/ first on the path of an entry point."""
    assert not set(SCRIPTS) & (sys.stdlib_module_names | set(metadata.packages_distributions()))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_starts(script: str) -> None:
    command = [sys.executable, f"jobs/{script}.py", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert f"{script}.py {script} " in process.stdout


@pytest.mark.parametrize("module", ["generate", "train", "reduce"])
def test_the_drivers_part_of_ray_loads_no_torch(module: str) -> None:
    assert loaded(f"import diffva_ray.distributed.{module}") == []


def test_a_whole_driver_loads_no_torch() -> None:
    assert loaded("import diffva_ray.workflows.generate, diffva_ray.workflows.train, diffva_ray.workflows.reduce") == []
