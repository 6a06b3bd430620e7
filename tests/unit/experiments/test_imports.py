"""Every name of the product that a script of experiments/ or benchmarks/ imports exists: most run for hours, seldom."""

from __future__ import annotations

import ast
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted(path for folder in ("experiments", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_import_names_that_exist(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffva_ray"):
            for name in node.names:
                pkgutil.resolve_name(f"{node.module}.{name.name}")


def test_scripts_call_the_product_with_arguments_that_it_takes() -> None:
    """By mypy, which checks no more of them: a benchmark for a GPU may wait for months until it runs again."""
    command = [sys.executable, "-m", "mypy", "--explicit-package-bases", "benchmarks", "experiments"]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join(("benchmarks", "experiments"))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "checked" in done.stdout.splitlines()[-1], done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.endswith("[call-arg]")] == []
