"""The house: who may import whom, who may know Ray, how long a file may be."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "diffva_ray"
LOW = {"_version", "schema", "storage", "progress", "provenance", "config"}
CORE = LOW | {"data", "model", "metrics", "counterfactual", "train", "generate", "evaluate"}
MAY_IMPORT: dict[str, set[str]] = {
    "_version": set(),
    "schema": set(),
    "progress": set(),
    "provenance": {"_version"},
    "storage": {"progress"},
    "config": {"schema", "storage"},
    "data": LOW,
    "model": LOW,
    "metrics": LOW,
    "counterfactual": LOW | {"model", "data", "metrics"},
    "train": LOW | {"model", "data", "metrics", "counterfactual"},
    "generate": LOW | {"model", "data", "metrics", "counterfactual"},
    "evaluate": LOW | {"data", "metrics", "generate", "model"},
    "explain": CORE - {"train"},
    "distributed": CORE - {"counterfactual"},
    "workflows": CORE | {"distributed"},
    "paper": CORE | {"distributed", "workflows"},
    "commands": CORE | {"distributed", "workflows", "paper", "explain"},
    "cli": {"commands"},
    "__main__": {"cli"},
    "__init__": CORE,  # the names that a notebook starts from
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names a file imports, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_one_way(path: Path) -> None:
    here = room(path)
    used = {name.split(".")[1] for name in imports(path) if name.startswith("diffva_ray.") and name.count(".") >= 1}
    used = {name for name in used if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}
    assert used - {here} <= MAY_IMPORT[here]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_distributed_imports_ray(path: Path) -> None:
    uses_ray = any(name.split(".")[0] == "ray" for name in imports(path))
    assert not uses_ray or room(path) == "distributed"


def test_no_circle_anywhere() -> None:
    """Also inside a folder, and also by imports within functions."""
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in FILES}
    sorter = TopologicalSorter({name: (imports(path) & names.keys()) - {name} for name, path in names.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_files_fit_in_a_sitting() -> None:
    long = {str(path.relative_to(ROOT)): n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_doors_hold_no_logic() -> None:
    for path in sorted((ROOT / "jobs").glob("*.py")):
        assert len(path.read_text().splitlines()) <= 40
        assert {name.split(".")[0] for name in imports(path)} <= {"sys", "diffva_ray"}


def test_every_module_is_in_the_architecture() -> None:
    """Under its own room's heading: ten file names stand in several rooms."""
    named = []
    for section in (ROOT / "ARCHITECTURE.md").read_text().split("\n## ")[1:]:
        heading = re.match(r"\w+/", section)  # "data/ — films"; elsewhere names are relative to the package
        names = (name for name in re.findall(r"`([\w/]+\.py)`", section) if not name.startswith("jobs/"))
        named += [f"{heading[0] if heading else ''}{name}" for name in names]
    modules = [path.relative_to(PACKAGE).as_posix() for path in FILES if path.name != "__init__.py"]
    assert len(named) == len(set(named)), "a module stands there twice"
    assert not set(modules) - set(named), "these lack a line in ARCHITECTURE.md"
    assert not set(named) - set(modules), "ARCHITECTURE.md names files that are not there"
