"""A finished table: its text as Markdown and LaTeX in the paper's layout, its numbers as CSV and JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from diffva_ray.evaluate.tables import clean, latex, markdown
from diffva_ray.schema import Row
from diffva_ray.storage.store import Store

LEADING = 3  # columns that name what a row is about


@dataclass
class Table:
    """``rows`` are finished text under ``heads``; ``details`` hold every number behind them."""

    key: str
    title: str
    caption: str
    heads: list[str]
    rows: list[list[str]]
    details: list[Row] = field(default_factory=list)

    def write(self, store: Store) -> None:
        """``tables/<key>`` as .md, .tex (the layout), .csv and .json (the numbers)."""
        store.put(f"tables/{self.key}.md", f"**{self.title}**\n\n{self.markdown()}\n\n{self.caption}\n".encode())
        store.put(
            f"tables/{self.key}.tex", f"% {self.title}\n{latex(self.heads, self.rows)}\n% {self.caption}\n".encode()
        )
        store.put(
            f"tables/{self.key}.csv", pd.DataFrame([flat(row) for row in self.details]).to_csv(index=False).encode()
        )
        about = {"title": self.title, "caption": self.caption, "heads": self.heads, "rows": self.rows}
        store.put(f"tables/{self.key}.json", json.dumps(clean({**about, "details": self.details}), indent=1).encode())

    def markdown(self) -> str:
        """The layout alone; a cell that repeats the one above it in its leading columns is left empty."""
        return markdown(self.heads, thinned(self.rows))


def thinned(rows: list[list[str]]) -> list[list[str]]:
    """Rows whose first cells (of LEADING) are empty where they and all before them say what the row above says."""
    found = []
    for n, row in enumerate(rows):
        cells = list(row)
        for at in range(min(LEADING, len(row) - 1)):
            if n == 0 or row[: at + 1] != rows[n - 1][: at + 1]:
                break
            cells[at] = ""
        found.append(cells)
    return found


def flat(row: Row) -> Row:
    """Nested numbers as columns ``outer_inner``; a pair as ``_low`` and ``_high``."""
    found: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= {f"{key}_{inner}": part for inner, part in flat(value).items()}
        elif isinstance(value, (list, tuple)) and len(value) == 2:
            found |= {f"{key}_low": value[0], f"{key}_high": value[1]}
        else:
            found[key] = value
    return found


def number(value: float | None) -> str:
    """Three significant digits; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def with_error(value: float, error: float) -> str:
    """``value ± error``."""
    return f"{number(value)} ± {error:.2g}" if math.isfinite(error) else number(value)


def with_interval(value: float | None, interval: Any) -> str:
    """``value [low, high]``."""
    low, high = interval if interval is not None else (None, None)
    if low is None or not math.isfinite(low):
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"
