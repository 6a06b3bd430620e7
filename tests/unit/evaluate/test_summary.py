"""Tables on a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from diffva_ray.evaluate.summary import print_summary


def test_a_class_that_looks_like_markup_is_printed_as_it_is() -> None:
    sink = io.StringIO()
    rows = [{"label": label, "n": 3, "flip_rate": 0.5} for label in ("[ill]", "[/bold]")]
    metrics = {"validity": rows, "records": {"planned": 6, "ok": 6, "quarantined": 0}, "notes": ["[a note]"]}
    print_summary(metrics, Console(file=sink, width=80))
    for text in ("[ill]", "[/bold]", "[a note]", "50.0 %"):
        assert text in sink.getvalue()
