"""The house: who may import whom, who may know Ray, how long a file may be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "diffva_ray"
LOW = {"arrays", "schema", "storage", "observe", "provenance", "methods", "optional"}
ROOMS = LOW | {"config", "config_stages", "data", "model", "metrics", "counterfactual", "train", "generate", "evaluate"}
STAGES = {"validation", "ray_cluster", "ray_train", "ray_generate", "ray_reduce"}
MAY_IMPORT: dict[str, set[str]] = {
    "arrays": set(),
    "schema": set(),
    "storage": {"observe"},
    "storage_s3": {"storage", "observe"},
    "observe": set(),
    "provenance": set(),
    "config_stages": set(),
    "methods": set(),
    "optional": set(),
    "config_methods": {"config_stages"},
    "config": {"config_stages", "config_methods", "methods", "schema", "storage"},
    "data": LOW | {"config", "config_stages"},
    "model": LOW | {"config", "config_stages"},
    "metrics": LOW | {"config", "config_stages"},
    "counterfactual": LOW | {"config", "config_methods", "model", "data", "metrics"},
    "train": LOW | {"config", "config_stages", "model", "data", "metrics"},
    "generate": LOW | {"config", "config_methods", "model", "data", "metrics", "counterfactual"},
    "evaluate": LOW | {"config", "config_stages", "data", "metrics", "generate", "model"},
    "ray_cluster": LOW,
    "ray_metrics": set(),
    "validation": LOW | {"config", "config_stages", "model", "train", "counterfactual", "data", "metrics"},
    "ray_train": LOW | {"config", "config_stages", "model", "train", "validation", "ray_cluster", "ray_metrics"},
    "ray_generate": LOW | {"config", "config_stages", "generate", "ray_cluster", "ray_metrics"},
    "ray_reduce": LOW | {"config", "config_stages", "evaluate", "generate", "metrics", "ray_cluster"},
    "explain": ROOMS - {"train"},
    "interpolate": ROOMS - {"train"} | {"explain"},
    "status": LOW | {"config", "config_stages", "data", "model", "generate"},
    "pipeline": ROOMS | STAGES,
    "forecast": ROOMS | STAGES | {"pipeline", "status"},
    "paper": ROOMS | STAGES | {"pipeline"},
    "demo": ROOMS | STAGES | {"pipeline"},
    "commands": ROOMS | STAGES | {"pipeline", "forecast", "paper", "demo", "explain", "interpolate", "status"},
    "cli": {"commands"},
    "__main__": {"cli"},
    "__init__": ROOMS,  # the names that a notebook starts from
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
def test_only_ray_files_import_ray(path: Path) -> None:
    uses_ray = any(name.split(".")[0] == "ray" for name in imports(path))
    assert not uses_ray or path.name.startswith("ray_")


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
    assert sorted(named) == sorted(modules)
