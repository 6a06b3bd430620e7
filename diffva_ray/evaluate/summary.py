"""Prints the tables of the pages on a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import table as rich_table
from rich.console import Console
from rich.markup import escape

from diffva_ray.evaluate.report.numbers import INTERVAL, Table, glance
from diffva_ray.evaluate.report.result_tables import report_tables
from diffva_ray.progress import printable


def terminal() -> Console:
    """A console on standard output; 120 characters wide if that is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def print_summary(metrics: dict[str, Any], console: Console | None = None) -> None:
    """Print why no result is stated, if so, and every table of ``metrics`` (as in ``tables/metrics.json``), then the
    main results, counts and notes."""
    console = console or terminal()
    problems = metrics.get("problems", [])
    print_lines(console, (f"{problem}." for problem in problems))
    for table in report_tables(metrics):
        if table.key != "fidelity":  # too wide
            print_table(console, table)
    counts = metrics["records"]
    print_lines(console, glance(metrics))
    print_lines(
        console, [f"{counts['planned']} records planned, {counts['ok']} ok, {counts['quarantined']} quarantined"]
    )
    print_lines(console, (f"note: {note}" for note in metrics.get("notes", []) if note not in problems))


def print_table(console: Console, table: Table, intervals: bool = False) -> None:
    """Print a table of a page with the first sentence of its caption, by default without its intervals."""
    title = ". ".join(filter(None, [table.title, table.caption.partition(". ")[0]]))
    printed = rich_table.Table(title=escape(printable(title)), title_justify="left", header_style="bold")
    columns = [n for n, (head, _) in enumerate(table.heads) if intervals or head != INTERVAL]
    for n in columns:
        head, is_number = table.heads[n]
        printed.add_column(escape(head), justify="right" if is_number else "left")
    for group in table.groups:
        if group.title and len(table.groups) > 1:
            printed.add_row(f"[bold]{escape(printable(group.title))}[/bold]")
        for _, cells in group.rows:
            printed.add_row(*(escape(printable(cells[n].text)) for n in columns))
        printed.add_section()
    console.print(printed)
    print_lines(console, table.warnings)


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Print text as it is."""
    for line in lines:
        console.print(printable(line), markup=False, highlight=False)
