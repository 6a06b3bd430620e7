"""The sheet of one image: the image, each counterfactual and attribution map, and the metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from diffva_ray.config.methods import METHODS
from diffva_ray.config.recipe import GUESS
from diffva_ray.data.dataset import UnusableData
from diffva_ray.evaluate.drawing import (
    FORMATS,
    MIN_THRESHOLD,
    Panel,
    PanelRow,
    Scale,
    changes,
    colour_limit,
    diverging,
    panel_sheet,
    render,
)
from diffva_ray.evaluate.marks import Marks, legend_of, marks
from diffva_ray.explain.image import Answer, Explanation
from diffva_ray.generate.measures import unit
from diffva_ray.storage.opening import open_file


def write_sheet(explanation: Explanation, path: str) -> None:
    """Draw the sheet and write it to ``path``; raises as ``write_figure``."""
    write_figure(sheet(explanation), path)


def write_figure(figure: Figure, path: str) -> None:
    """Write a figure to ``path``, local or ``s3://``, in the format of its ending. Raises UnusableData for another
    ending, and StoreError if it cannot be written."""
    check_sheet(path)
    store, name = open_file(path)
    store.put(name, render(figure, name.rpartition(".")[2].lower()))


def check_sheet(path: str) -> None:
    """Check the name of a sheet. Raises UnusableData for an ending that is none of FORMATS."""
    stem, _, ending = path.rpartition(".")
    if not stem or ending.lower() not in FORMATS:
        raise UnusableData(f"--out {path}: the sheet is a {', '.join(f'.{kind}' for kind in FORMATS)} file")


def sheet(explanation: Explanation) -> Figure:
    """Draw a row per prompt in the style of a run's figures, with image, counterfactual, overlay and signed map, and
    the outline of the lesion if its mask is beside the image."""
    answers, image, lesion = explanation.answers, explanation.image, explanation.lesion
    limit = colour_limit(np.concatenate([answer.signed_map.ravel() for answer in answers]))
    scale = Scale(MIN_THRESHOLD, "fixed", limit)
    rows = []
    for answer in answers:
        both = changes(image, answer.signed_map, scale.threshold, explanation.lungs)
        panels = [Panel(image), Panel(unit(answer.counterfactual))]
        panels += [Panel(both, lesion), Panel(diverging(answer.signed_map, limit), lesion)]
        rows.append(PanelRow(f"“{answer.prompt}”", metric_lines(answer), panels, _marks(explanation)))
    titles = ("image", "counterfactual", "overlay", "signed map")
    heading = short_path(explanation.about["image"])
    return panel_sheet(rows, titles, _footer(explanation, scale), scale, bar=3, side=2.15, heading=heading)


def metric_lines(answer: Answer) -> list[str]:
    """Metrics of one answer as text, one line each."""
    numbers = answer.numbers
    ratio = "equal images" if numbers["psnr"] is None else f"{numbers['psnr']:.1f} dB"
    lines = [
        f"SSIM {numbers['ssim']:.3f}",
        f"MS-SSIM {numbers['ms_ssim']:.3f} ({numbers['ms_ssim_scales']} scales)",
        f"PSNR {ratio} · L1 {numbers['l1']:.3f}",
        f"map energy {numbers['attribution_energy']:.4f}",
    ]
    if numbers["attribution_energy_lung_fraction"] is not None:
        lines.append(f"of it in the lungs {numbers['attribution_energy_lung_fraction']:.0%}")
    if numbers["judge_image"] is not None:
        lines.insert(0, f"healthy {numbers['judge_image']:.2f} → {numbers['judge_counterfactual']:.2f}")
    if numbers["source_prompt"]:
        lines.append(f"taken to show “{numbers['source_prompt']}”")
    return lines


def factor_text(factors: list[dict[str, Any]]) -> str:
    """What the factor classifier says: each factor that the prompt names or that changed, and those that stayed."""
    parts, kept = [], []
    for row in factors:
        yes, wish = row["after"] > 0.5, row["asked"]
        changed = yes != (row["before"] > 0.5)
        if wish is None and not changed:
            kept.append(row["factor"] if yes else row["otherwise"])
            continue
        verdict = "not asked" if wish is None else "as asked" if yes == wish else "not as asked"
        sure = "" if row["accuracy"] is None else f", right in {row['accuracy']:.0%}"
        parts.append(f"{row['factor']} {row['before']:.2f} → {row['after']:.2f} ({verdict}{sure})")
    return "; ".join([*parts, f"kept: {', '.join(kept)}"] if kept else parts).replace("_", " ")  # names of classes


def _marks(explanation: Explanation) -> Marks:
    about = explanation.about
    return marks(about["view"], about["spacing"], about["width"])


def _footer(explanation: Explanation, scale: Scale) -> list[str]:
    about, config = explanation.about, explanation.about["settings"]
    where = ", inside the lungs" if explanation.lungs is not None else ""
    legend = [
        f"M: {_difference(config)}; overlay{where}: orange, M > {scale.threshold:g}, was taken away; blue, "
        f"−M > {scale.threshold:g}, was put in",
        *legend_of([_marks(explanation)]),
    ]
    if explanation.lesion is not None:
        legend.append("outline: the lesion mask beside the image")
    if explanation.answers[0].numbers["judge_image"] is not None:
        legend.append("healthy: the probability that the model's judge gives image → counterfactual")
    if config["source_prompt"] == GUESS and not all(answer.numbers["source_prompt"] for answer in explanation.answers):
        legend.append("the model takes the image for healthy")
    size = f"{about['width']} × {about['height']} px, seen at {len(explanation.image)}"
    settings = [size, config["method"], *settings_texts(about)]
    measured = [str(about["measured"])] if about["measured"] else []
    told = [(answer.prompt, factor_text(answer.numbers.get("factors", []))) for answer in explanation.answers]
    factors = [f"“{prompt}”, image → counterfactual, by the factor classifier: {text}" for prompt, text in told if text]
    return ["; ".join(legend) + ".", *factors, *measured, " · ".join(settings), " · ".join(origin_texts(about))]


def settings_texts(about: dict[str, Any]) -> list[str]:
    """The sampling settings of a sheet or strip."""
    config = about["settings"]
    return [f"strength {config['strength']:g}", f"guidance {config['guidance_scale']:g}",
            f"{config['num_inference_steps']} steps", f"scheduler {config['scheduler']}"]  # fmt: skip


def origin_texts(about: dict[str, Any]) -> list[str]:
    """Recipe, model, seed and code of a sheet or strip."""
    trained = ", trained on phantoms" if about["trained_on"] == "phantoms" else ""
    return [f"recipe {about['recipe']}", f"model {about['model_digest'][:12]}{trained}", f"seed {about['run_seed']}",
            f"diffva-ray {about['diffva_ray']} ({about['code_revision']})"]  # fmt: skip


def _difference(config: dict[str, Any]) -> str:
    raw = config["difference"] == "raw" or METHODS[config["method"]].keeps_image
    first = "image" if raw else "image through the autoencoder"
    return f"{first} − counterfactual" + (
        f", smoothed by {config['smoothing']:.1%} of the width" if config["smoothing"] else ""
    )


def short_path(path: str) -> str:
    """The last three parts of a path, which identify the image; the folders above are private."""
    end = "/".join(path.split("/")[-3:])
    return end if len(end) <= 80 else "…" + end[-79:]


def describe(explanation: Explanation) -> str:
    """Text for a terminal: the image, and the metrics of each prompt."""
    about = explanation.about
    lines = [
        f"{about['image']}: {about['width']} x {about['height']} px; model {about['model_digest'][:12]}, "
        f"recipe {about['recipe']}, seed {about['run_seed']}"
    ]
    if about["trained_on"] == "phantoms":
        lines.append("the model was trained on phantoms and has not learned real images")
    for answer in explanation.answers:
        lines.append(f"“{answer.prompt}”: {' · '.join(metric_lines(answer))}")
        factors = factor_text(answer.numbers.get("factors", []))
        lines += [f"  by the factor classifier: {factors}"] if factors else []
    lines += [str(about["measured"])] if about["measured"] else []
    return "\n".join([*lines, "Not for clinical use."])
