"""Prints the tables of a run on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffva_ray.metrics.pair_metrics import PAIR_METRICS
from diffva_ray.progress import one_line, printable

COLUMNS: dict[str, dict[str, str]] = {
    "localization": {
        "map": "map", "label": "class", "n": "n", "auroc": "AUROC", "auprc": "AUPRC",
        "dice_fixed": "Dice at fixed threshold", "dice_best": "Dice best", "pointing_game": "pointing game",
    },
    "validity": {"label": "class", "n": "n", "flip_rate": "flip rate", "confidence_gain": "confidence gain"},
    "external_validity": {"judge": "judge", "label": "class", "images": "images", "n": "n", "flip_rate": "flip rate",
                          "confidence_gain": "confidence gain"},
    "ground_truth": {
        "label": "class", "n": "n", "lesion_error_ratio": "lesion error left", "psnr": "PSNR to ground truth",
        "psnr_input": "image's own", "psnr_reconstruction": "autoencoder's",
    },
    "ssim": {"label": "class", "n": "n", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "ms_ssim_scales": "scales",
             "lpips": "LPIPS"},
    "counterfactual": {"label": "class", "n": "n", **{metric.key: metric.heading for metric in PAIR_METRICS}},
    "heart": {"label": "class", "n": "n", "before": "heart / thorax", "after": "after", "change": "change"},
    "brixia": {"map": "map", "n": "n", "spearman": "Spearman, all zones", "spearman_within_image": "within images"},
    "fid_within": {"set1": "set 1", "set2": "set 2", "n2": "n", "within": "within conditions", "pooled": "pooled"},
    "fid": {"set1": "set 1", "set2": "set 2", "n1": "n1", "n2": "n2", "kid": "KID", "value": "Fréchet distance"},
}  # fmt: skip
TITLES = {
    "localization": "Localisation of the lesion",
    "validity": "Validity (the model's own judge)",
    "external_validity": "Validity (external judges, a sample)",
    "ground_truth": "Against the ground-truth counterfactual",
    "ssim": "Image against counterfactual",
    "counterfactual": "Single counterfactuals (a sample)",
    "heart": "Cardiothoracic ratio (lungs found on image and counterfactual)",
    "brixia": "Maps against Brixia scores of six lung zones",
    "fid_within": "Distances within conditions",
    "fid": "Distances between sets",
}


def terminal() -> Console:
    """A console on standard output; 120 characters wide if that is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def print_summary(metrics: dict[str, Any], console: Console | None = None) -> None:
    """Print every table of ``metrics`` (as in ``tables/metrics.json``), then counts and notes."""
    console = console or terminal()
    for name, columns in COLUMNS.items():
        rows = metrics.get(name)
        if not rows:
            continue
        title = TITLES[name]
        # title
        judge = metrics.get("judge") if name == "validity" else None
        if judge and judge["accuracy"] is not None:
            title += f": right on {judge['accuracy']:.1%} of {judge['n']} held-out images"
        if name == "fid":
            used = dict.fromkeys(f"{row['extractor']}, {row['resize']}" for row in rows)
            title += f" ({'; '.join(used)})" if len(used) == 1 else ""
            columns = columns | {"extractor": "extractor"} if len(used) > 1 else columns
        # columns with a value in any row
        table = Table(title=title, title_justify="left", header_style="bold")
        displayed = {key: head for key, head in columns.items() if any(row.get(key) is not None for row in rows)}
        for key, head in displayed.items():
            table.add_column(head, justify="left" if key in ("map", "judge", "label", "set1", "set2") else "right")
        for row in rows:
            table.add_row(*(escape(_cell(row.get(key))) for key in displayed))
        console.print(table)
    counts = metrics["records"]
    console.print(f"{counts['planned']} records planned, {counts['ok']} ok, {counts['quarantined']} quarantined")
    for note in metrics.get("notes", []):
        console.print(f"note: {printable(note)}", markup=False)


def _cell(value: Any) -> str:
    if isinstance(value, dict):  # KID with its standard error
        return f"{value['value']:.3g} ± {value['standard_error']:.2g}"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return "" if value is None else one_line(str(value))
