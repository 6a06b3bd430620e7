"""The notebook of the guide runs from top to bottom, as in Jupyter."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "guides" / "notebook.ipynb"


def executed(source: str, names: dict[str, Any]) -> Any:
    """Run a cell of Python and return the value of its last expression, which Jupyter shows."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    package = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": package, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    names: dict[str, Any] = {}
    shown = []
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [], "strip the outputs"
        if source.startswith("!"):
            for line in source.splitlines():
                command = line.removeprefix("!").replace("diffva", f"{sys.executable} -m diffva_ray", 1)
                subprocess.run(command, shell=True, check=True, env=environment, timeout=300)
        else:
            shown.append(executed(source, names))
    assert shown[0]._repr_png_().startswith(b"\x89PNG")
    assert shown[1]["ssim"] == shown[0].metrics["ssim"]
    assert len(shown[3]) == len(shown[4]) == 4
    assert all(0 <= auroc <= 1 for auroc in shown[4])
    assert len(shown[5]) == 6
    assert set(shown[5]["label"]) == {"Lung_Opacity", "COVID", "Viral Pneumonia"}
    assert Path("run/report/index.html").exists()
