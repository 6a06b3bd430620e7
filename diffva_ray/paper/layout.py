"""A table of the paper: text in the paper's layout as Markdown, LaTeX and HTML, all numbers as CSV and JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from diffva_ray.evaluate.tables import markdown, write_files
from diffva_ray.schema import TableRow
from diffva_ray.storage.store import Store

LEADING = 3  # columns that name the content of a row; repeated values in them are left empty


@dataclass
class Table:
    """A table with the numbers behind it."""

    key: str  # file name and id
    title: str
    caption: str
    heads: list[str]
    rows: list[list[str]]  # text, one cell for each head
    details: list[TableRow] = field(default_factory=list)  # numbers at full precision

    def write(self, store: Store) -> None:
        """Write ``tables/<key>`` as .md and .tex (layout), .csv and .json (numbers)."""
        layout = {"title": self.title, "caption": self.caption, "heads": self.heads, "rows": self.rows}
        numbers = pd.DataFrame([flat(row) for row in self.details])
        write_files(store, self.key, {**layout, "details": self.details}, numbers, self.heads, thinned(self.rows))

    def markdown(self) -> str:
        """The layout in Markdown."""
        return markdown(self.heads, thinned(self.rows))


def thinned(rows: list[list[str]]) -> list[list[str]]:
    """Rows with leading cells left empty where they and all cells before them repeat the row above."""
    result = []
    for n, row in enumerate(rows):
        cells = list(row)
        for column in range(min(LEADING, len(row) - 1)):
            if n == 0 or row[: column + 1] != rows[n - 1][: column + 1]:
                break
            cells[column] = ""
        result.append(cells)
    return result


def flat(row: TableRow) -> TableRow:
    """Nested numbers as columns ``outer_inner``; a pair as ``_low`` and ``_high``."""
    result: TableRow = {}
    for key, value in row.items():
        if isinstance(value, dict):
            result |= {f"{key}_{inner}": part for inner, part in flat(value).items()}
        elif isinstance(value, (list, tuple)) and len(value) == 2:
            result |= {f"{key}_low": value[0], f"{key}_high": value[1]}
        else:
            result[key] = value
    return result


def number(value: float | None) -> str:
    """Three significant digits; a dash for a missing value."""
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
