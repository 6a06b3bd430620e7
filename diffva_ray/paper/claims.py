"""What the paper states, line by line, and where this project does it; ``claims.yaml`` has the statements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import yaml

from diffva_ray.config.recipe import load_recipe
from diffva_ray.paper.experiments import SHEET

HEADS = ("statement", "line", "words of the paper", "where", "remark")


@dataclass(frozen=True)
class Claim:
    """A statement of the paper."""

    claim: str  # what it is about
    line: int  # of the paper's text
    quote: str  # words on that line
    shown: tuple[str, ...]  # tests, files, and parts of ``diffva paper``
    holds: dict[str, Any] = field(default_factory=dict)  # values that it fixes, by FILE:KEY
    note: str = ""  # where ours differs, or the paper contradicts itself

    def cells(self) -> tuple[str, ...]:
        """The claim as a row of the table in docs/paper.md."""
        where = [f"`{key}`" for key in self.holds] + [text.replace("tests/unit/", "") for text in self.shown]
        return self.claim, str(self.line), self.quote.replace("|", "\\|"), "; ".join(where), self.note


def claims() -> tuple[Claim, ...]:
    """All statements, in the order of the file."""
    rows = yaml.safe_load((resources.files(__package__) / "claims.yaml").read_text("utf-8"))
    return tuple(Claim(**{**row, "shown": tuple(row["shown"])}) for row in rows)


def value_of(key: str) -> Any:
    """The value at FILE:KEY, where FILE is ``sheet`` or the name of a recipe. Raises KeyError."""
    file, _, path = key.partition(":")
    if file == "sheet":
        experiments = {experiment["name"]: experiment for experiment in SHEET["experiments"]}
        return _at({**SHEET, "experiments": experiments}, path)
    return _at(load_recipe(file).model_dump(mode="json"), path)


def _at(tree: Any, path: str) -> Any:
    """The value at a dotted path; a key of the tree may itself contain dots."""
    if not path:
        return tree
    if isinstance(tree, Sequence) and not isinstance(tree, str):
        first, _, rest = path.partition(".")
        return _at(tree[int(first)], rest)
    for name in tree:
        if path == name or path.startswith(f"{name}."):
            return _at(tree[name], path[len(name) + 1 :])
    raise KeyError(path)
