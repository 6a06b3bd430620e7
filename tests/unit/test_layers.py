"""The house: who may import whom, who may know Ray, how long a file may be."""

from __future__ import annotations

import ast
import re
from functools import cache
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
    "storage": {"progress", "provenance"},
    "config": {"schema", "storage", "progress"},
    "data": LOW,
    "model": LOW,
    "metrics": LOW,
    "counterfactual": LOW | {"model", "data", "metrics"},
    "train": LOW | {"model", "data", "metrics", "counterfactual"},
    "references": LOW | {"model", "data", "metrics", "counterfactual", "train"},  # loaded by name only
    "generate": LOW | {"model", "data", "metrics", "counterfactual"},
    "evaluate": LOW | {"data", "metrics", "generate", "model"},
    "explain": CORE - {"train"},
    "export": LOW | {"data", "generate", "evaluate", "model"},
    "distributed": CORE - {"counterfactual"} | {"export", "explain"},
    "workflows": CORE | {"distributed", "export"},
    "paper": CORE | {"distributed", "workflows"},
    "studio": CORE | {"distributed", "workflows", "explain"},
    "commands": CORE | {"distributed", "workflows", "paper", "explain", "export", "studio"},
    "cli": {"commands"},
    "__main__": {"cli"},
    "__init__": CORE | {"explain"},  # the names that a notebook starts from
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imports(path: Path) -> set[str]:
    """Dotted names a file imports, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def test_arrows_point_one_way() -> None:
    rooms = set(map(room, FILES))
    against = {
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in FILES
        for name in imports(path)
        if name.startswith("diffva_ray.")
        and (there := name.split(".")[1]) in rooms - {room(path)}
        and there not in MAY_IMPORT[room(path)]
    }
    assert not against, sorted(against)


def test_only_distributed_imports_ray() -> None:
    users = {str(path.relative_to(PACKAGE)) for path in FILES if any(n.split(".")[0] == "ray" for n in imports(path))}
    outside = {name for name in users if not name.startswith("distributed/")}
    assert users - outside
    assert not outside, sorted(outside)


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
        assert len(path.read_text().splitlines()) <= 40, path.name
        assert {name.split(".")[0] for name in imports(path)} <= {"sys", "diffva_ray"}, path.name


def test_every_module_is_in_the_architecture() -> None:
    """Under its own room's heading: some file names stand in several rooms."""
    named = []
    for section in (ROOT / "ARCHITECTURE.md").read_text().split("\n## ")[1:]:
        heading = re.match(r"\w+/", section)  # "data/ — data sets"; elsewhere names are relative to the package
        names = (name for name in re.findall(r"`([\w/]+\.py)`", section) if not name.startswith("jobs/"))
        named += [f"{heading[0] if heading else ''}{name}" for name in names]
    modules = {path.relative_to(PACKAGE).as_posix() for path in FILES if path.name != "__init__.py"}
    twice = sorted({name for name in named if named.count(name) > 1})
    assert not twice, f"twice in ARCHITECTURE.md: {twice}"
    assert not modules - set(named), f"not in ARCHITECTURE.md: {sorted(modules - set(named))}"
    assert not set(named) - modules, f"in ARCHITECTURE.md, but no such file: {sorted(set(named) - modules)}"
