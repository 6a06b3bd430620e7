"""Write the tables of README and docs from the result files, between ``<!-- table: NAME -->`` and ``<!-- end -->``.

    python benchmarks/tables.py            # after a benchmark or an experiment
    python benchmarks/tables.py --check    # exit 1 and a diff if a page differs from the results (a test runs this)

Result files are ``benchmarks/results/*.json`` (speed and cost) and ``experiments/results/*.json`` (quality). A line
below each table names the revision that made its files. ``revisions.json`` keeps the dates of revisions for a clone
without its history.
"""

from __future__ import annotations

import difflib
import json
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parent.parent
DOCS = ("index", "methods", "throughput", "real_images", "paper", "report", "training", "metrics", "guides/own_data")
PAGES = ("README.md", *(f"docs/{name}.md" for name in DOCS))
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
Cells = Sequence[Sequence[str]]
REVISION = re.compile(r"([0-9a-f]{12})(-dirty)?")
DATES = ROOT / "benchmarks" / "revisions.json"
read: dict[str, dict[str, Any]] = {}  # the result files that the present table was made of, by name


def result(name: str) -> dict[str, Any]:
    """Read the result file ``name`` from either folder of results."""
    files = [ROOT / folder / "results" / f"{name}.json" for folder in ("benchmarks", "experiments")]
    read[name] = json.loads(next(file for file in files if file.exists()).read_text())
    return read[name]


def revisions(found: dict[str, Any]) -> list[tuple[str, bool]]:
    """The revisions that a result file names, and whether the checkout had uncommitted changes."""
    text = next((str(found[key]) for key in ("code_revision", "code", "revision") if found.get(key)), "")
    return [(revision, bool(dirty)) for revision, dirty in REVISION.findall(text)]


def dates() -> dict[str, str]:
    """The date of each revision that a result file names; "" for one that is not in the history."""
    known = json.loads(DATES.read_text()) if DATES.exists() else {}
    files = [file for folder in ("benchmarks", "experiments") for file in (ROOT / folder / "results").glob("*.json")]
    named = sorted({revision for file in files for revision, _ in revisions(json.loads(file.read_text()))})
    for revision in named:
        if not known.get(revision):
            command = ["git", "-C", str(ROOT), "log", "-1", "--format=%cs", revision]
            known[revision] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {revision: known[revision] for revision in named}


def provenance() -> str:
    """A line with the revisions of the files in ``read``."""
    date, parts = dates(), []
    for name, found in read.items():
        said = [
            f"{revision} ({date[revision] or 'not in this history'}{', with uncommitted changes' if dirty else ''})"
            for revision, dirty in revisions(found)
        ]
        parts.append(f"`{name}.json`: " + (f"revision {' and '.join(said)}" if said else "names no revision"))
    return f"\n{'; '.join(parts)}.\n" if parts else ""


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None or value != value else f"{value:,.{digits}f}"


def markdown(heads: Sequence[str], rows: Cells) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def grouped(rows: Sequence[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The rows by their values of ``keys``, in the order of first occurrence."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(tuple(row[key] for key in keys), []).append(row)
    return kinds


def suspects() -> str:
    """Suspects among ordinary images, and the share of damaged ones that is found, by reason."""
    sets = result("suspects")["data"]

    def found(*kinds: str) -> str:
        shares = [[part["found"][kind] for kind in kinds] for part in sets]
        return ", ".join(f"{min(s):.0%}" if min(s) == max(s) else f"{100 * min(s):.0f} to {max(s):.0%}" for s in shares)

    parts = [kind.removesuffix(", stretched") for kind in sets[0]["found"] if kind.endswith(", stretched")]
    turns = [f"turned by {90 * k} degrees" for k in (1, 2, 3)]
    lines = [
        ("inverted", "grey values inverted", found("grey values inverted")),
        ("rotated", "turned by 90, 180 or 270 degrees", found(*turns)),
        ("", "mirrored", found("mirrored")),
        *(("" if n else "cropped", f"{part}, stretched to the old shape", found(f"{part}, stretched"))
          for n, part in enumerate(parts)),
        ("", "a half or the upper 60 %, with its own shape", found(*(f"{part}, as it is" for part in parts[:3]))),
        ("padded", "a black border, 20 % of the width at both sides", found("black border at two sides")),
        *(("" if n else "text", f"a name in white letters, {share} % of the height",
           found(f"name in letters of {share}% of the height")) for n, share in enumerate((2, 3, 4))),
        ("not frontal", "lateral views without a column `view`: not measured, none was at hand", ""),
        ("coloured", "a red rectangle of 2 % of the pixels", found("a red rectangle of 2 % of the pixels")),
        ("", "grey, in the colours of a JPEG", found("grey, saved as colour JPEG")),
    ]  # fmt: skip
    heads = ["suspect", *(f"of {part['images']} ordinary images ({part['size'].split('x')[0]} px)" for part in sets)]
    heads += ["damage", "found (" + ", ".join(f"{part['size'].split('x')[0]} px" for part in sets) + ")"]
    return markdown(heads, [
        [reason, *(str(part["suspects"][reason]) if reason else "" for part in sets), damage, shares]
        for reason, damage, shares in lines
    ])  # fmt: skip


LEADERS = (
    "masked", "ddim-inversion", "cycle", "ddim-inversion, empty source", "classifier-guided", "controlnet", "sdedit",
    "vant-gan", "sdedit, the paper's settings", "ant-gan",
    *(f"latent classifier: {name}" for name in ("occlusion", "grad_cam", "integrated_gradients")),
    *(f"baseline: {name}" for name in ("brightness", "autoencoder_difference", "centre_prior")),
    *(f"sanity: {name}" for name in ("the disease's prompt", "random UNet", "permuted labels")),
)  # fmt: skip


def leaderboard() -> str:
    found = result("attribution")
    means, spreads = ({row["method"]: row for row in found[key]} for key in ("mean", "spread"))
    rows = []
    for name in LEADERS:
        row, spread = means[name], spreads[name]["auroc"]
        auroc = number(row["auroc"]) + ("" if spread is None else f" ± {spread:.3f}")
        scores = [number(row[key]) for key in ("auprc", "dice_fixed")] + [number(row["pointing_game"], 2)]
        counterfactuals = [
            number(row["flip_rate"]),
            number(row["lesion_error_left"]),
            number(row["psnr_counterfactual"], 1),
        ]
        cost = [number(row["image_auroc"]), number(row["unet_calls"], 0), number(row["core_seconds_a_image"], 2)]
        rows.append([name.replace("_", " "), auroc, *scores, *counterfactuals, *cost])
    return markdown(
        ["method", "AUROC", "AUPRC", "Dice, fixed", "pointing game", "flip rate", "lesion error left",
         "PSNR to the ground-truth counterfactual", "ill against healthy", "UNet calls", "s an image"], rows,
    )  # fmt: skip


def limits() -> str:
    keys = ("auroc", "auprc", "dice_best", "lesion_error_left", "psnr_counterfactual")
    classes = ("Lung_Opacity", "COVID", "Viral Pneumonia")
    rows = [
        [row["row"], *(number(row[key], 1 if key == "psnr_counterfactual" else 3) for key in keys),
         *(number(row[f"auroc {label}"]) for label in classes)]
        for row in result("limits")["rows"]
    ]  # fmt: skip
    heads = ["row", "AUROC", "AUPRC", "best Dice", "lesion error left", "PSNR to the ground-truth counterfactual"]
    return markdown([*heads, *(label.replace("_", " ") for label in classes)], rows)


def corrections() -> str:
    rows = [
        [row["recipe"].replace("_", " "), number(row["auroc"]), number(row["dice_fixed"]), number(row.get("flip_rate")),
         number(row.get("lesion_error_left")), number(row.get("psnr_counterfactual"), 1),
             number(row.get("unet_calls"), 0)]
        for row in result("corrections")["table"]
    ]  # fmt: skip
    heads = [
        "recipe",
        "AUROC",
        "Dice",
        "flip rate",
        "lesion error left",
        "PSNR to the ground-truth counterfactual",
        "calls",
    ]
    return markdown(heads, rows)


def shortcuts() -> str:
    rows = [
        [row["shortcut"], number(row["unet_calls"], 0), number(row["cpu_seconds_share"], 2),
         number(row["map_distance"], 2), number(row["auroc"]), number(row["psnr_counterfactual"], 1)]
        for row in result("shortcuts")["rows"]
    ]  # fmt: skip
    return markdown(
        ["shortcut", "UNet calls", "time", "distance of the map", "AUROC", "PSNR to the ground-truth counterfactual"],
        rows,
    )


def induction() -> str:
    conditions = result("induction")["conditions"]
    rows = []
    for prompt in next(iter(conditions.values())):
        for key in next(iter(conditions.values()))[prompt]:
            if key in ("right side", "severe over mild", "in order") or key.startswith("heart") or key == "after":
                rows.append([prompt, key, *(number(scores[prompt][key], 2) for scores in conditions.values())])
    return markdown(["prompt", "measure", *conditions], rows)


def words() -> str:
    """Means over the training seeds, with the least and the most where there are several."""
    keys = ("wanted", "none_opposite", "sex_kept", "view_kept", "age_kept")
    kinds = grouped(result("words")["rows"], "condition", "way", "prompt")

    def spread(values: list[float]) -> str:
        mean = number(sum(values) / len(values), 2)
        return mean if len(values) == 1 else f"{mean} ({number(min(values), 2)} to {number(max(values), 2)})"

    perfect = {row["prompt"]: number(row["wanted"], 2) for row in result("words")["of_phantoms_with_the_finding"]}
    rows = []
    for (condition, way, prompt), members in kinds.items():
        held_out = " (held out)" if members[0]["held_out"] else ""
        rows.append([condition, way, f"{prompt}{held_out}", *(spread([row[key] for row in members]) for key in keys),
                     perfect[prompt]])  # fmt: skip
    return markdown(["training", "edit", "prompt", "finding on its side", "not on the other",
                     "sex kept", "view kept", "age kept", "of phantoms that have it"], rows)  # fmt: skip


def sliders() -> str:
    kinds = grouped(result("words")["sliders"], "slider", "way")
    rows = [[*kind, ", ".join(number(row["spearman"], 2) for row in members)] for kind, members in kinds.items()]
    return markdown(["slider", "edit", "Spearman's correlation with the weight, by seed"], rows)


def unseen() -> str:
    columns = ("positive", "negative", "absolute", "brightness")
    found = result("unseen")
    rows = [
        [f"{row['class'].replace('_', ' ')}{'' if row['trained'] else ', never shown'}",
         *(number(row[name]) for name in columns), f"{row['taken_for_healthy']:.0%}"]
        for row in found["rows"]
    ]  # fmt: skip
    for third in found["by_contrast"]:
        rows.append([f"contrast {third['from']:.2f} to {third['to']:.2f}", number(third["auroc"]), "", "", "", ""])
    return markdown(["phantoms", "positive part", "negative part", "\\|M\\|", "brightness", "taken for healthy"], rows)


def engine() -> str:
    edit = result("engine_cpu")["edits"][0]
    rows = []
    for name, ratio in edit["ours_over"].items():
        rate = edit["images_per_second"][name]["median"]
        rows.append([name.removeprefix("diffusers, "), number(rate, 1), ranged(ratio)])
    return markdown(["StableDiffusionImg2ImgPipeline", "images/s", "ours is faster by"], rows)


BESIDE = ("start:", "probe:", "attention", "convolution", "UNet, 2 ", "UNet, 8 ", "UNet, 32 ", "UNet, 128 ")
GPU = ROOT / "benchmarks" / "results" / "gpu.json"
RATES = {  # key of a row of gpu.json (the first one present) -> unit
    "images_per_second": "images/s",
    "tflop_per_second_credited": "TFLOP/s",
    "tflop_per_second": "TFLOP/s",
    "gigabytes_per_second_read_and_written": "GB/s",
    "map_distance": "distance of the map",
    "seconds": "s",
    "ms": "ms",
}


GPU_AIMS = (
    ("machine, torch, CUDA", ""),
    ("images/s at the paper's settings (strength 0.55 of 75 steps)", "5"),
    ("... over diffusers' pipeline, one image a call", "5"),
    ("... over its best batch", "1.5"),
    ("... over its best batch, compiled", "1.15"),
    ("... share of the matrix rate measured there", "50 %"),
    ("images/s of recipe `recommended`", "4.5"),
    ("its training step, share of the matrix rate", "45 %"),
    ("pixels equal in all processes, with little memory, with and without a compiler cache", "yes"),
)


def gpu() -> str:
    """Return the results of gpu.json without the rows for the file alone (BESIDE), or the aims without a number."""
    if not GPU.exists():
        return markdown(["on one H100", "aim", "measured"], [[*aim, "not measured"] for aim in GPU_AIMS])
    found = json.loads(GPU.read_text())
    machine, checks = found["machine"], [one for part in found["sections"].values() for one in part["checks"]]
    rows = [
        ["device", machine["device"]],
        ["torch, CUDA", f"{machine['versions']['torch']}, {machine['torch_cuda']}"],
        ["checks of correctness", f"{len(checks) - len(found['failed_checks'])} of {len(checks)} hold"],
    ]
    rows += [["does not hold", name] for name in found["failed_checks"]]
    for part in found["sections"].values():
        for row in part["rows"]:
            key = next((key for key in RATES if row.get(key) is not None), None)
            if row["name"].startswith(BESIDE) or (key is None and "failed" not in row):
                continue
            rows.append([row["name"], row["failed"] if key is None else f"{number(row[key])} {RATES[key]}"])
        rows += [["left out", name] for name in part["left_out"]]
    return markdown(["what", "found"], [[cell.replace("|", "\\|") for cell in row] for row in rows])


def ranged(ratio: dict[str, float], digits: int = 2) -> str:
    return f"{ratio['median']:.{digits}f} ({ratio['least']:.{digits}f} to {ratio['most']:.{digits}f})"


def host() -> str:
    """CPU time of a record beside the networks (docs/throughput.md)."""
    records = result("host")["records"]
    stages = {"decode": "decode a PNG of 1024 px", "metrics": "metrics", "features": "random features",
              "PNGs": "encode three PNGs"}  # fmt: skip
    names = ("before", "after")
    rows = [[text, *(number(records[name][stage], 1) for name in names)] for stage, text in stages.items()]
    rows.append(["together", *(number(sum(records[name][stage] for stage in stages), 1) for name in names)])
    rows.append(["stored, kB", *(number(records[name]["bytes"] / 1000, 0) for name in names)])
    return markdown(["CPU ms a record of 512 px", "before", "now"], rows)


def data_plane() -> str:
    rows = []
    for cores, name in (("two", "data_plane"), ("one", "data_plane_one_core")):
        found = result(name)
        rows.append([cores, ranged(found["ray_over_inline"], 3), f"{found['share_outside_the_stages']['ray']:.1%}"])
    heads = ["cores", "Ray over inline, median (least to most)", "of the actor's time outside the stages of its work"]
    return markdown(heads, rows)


def scale() -> str:
    curve = result("scale")["curve"]
    return markdown(
        ["actors", *(str(point["actors"]) for point in curve)],
        [["efficiency", *(number(point["efficiency"]) for point in curve)]],
    )


def planning() -> str:
    rows = []
    for point in result("planning")["curve"]:
        plan, resume, worker, reduce = (point[key] for key in ("plan", "resume", "worker", "reduce"))
        rows.append(
            [f"{point['records']:,}", number(plan["seconds_plan"] + plan["seconds_write"], 1),
             number(plan["peak_megabytes"], 0), number(resume["seconds_listing"] + resume["seconds_sizes"], 1),
             number(worker["seconds_first_shard"], 1), number(worker["seconds_next_shard"]), f"{resume['requests']}",
             number(reduce["seconds"], 0), number(reduce["peak_megabytes"], 0)]
        )  # fmt: skip
    return markdown(
        ["records", "plan", "megabytes", "resume", "a worker's first shard", "next", "S3 LISTs", "reduce", "megabytes"],
        rows,
    )


def export() -> str:
    work = {"files": "whole export", "driver": "all but the files"}
    rows = [
        [work[point["step"]], f"{point['records']:,}", f"{point['files']}", number(point["seconds"], 0),
         number(point["records_per_second"], 0) if "records_per_second" in point else "",
         number(point["peak_megabytes"], 0)]
        for point in result("export")["curve"]
    ]  # fmt: skip
    return markdown(["work", "records", "files", "seconds", "records/s", "peak megabytes"], rows)


def fid_rows() -> str:
    rows = [
        [f"{point['rows']:,}", number(point["seconds_distance"], 0), number(point["seconds_interval"], 0),
         number(point["peak_megabytes"], 0), number(point["scratch_gigabytes"], 1)]
        for point in result("fid_rows")["curve"]
    ]  # fmt: skip
    heads = ["rows of each set", "distance, s", "its interval, s", "peak megabytes", "scratch gigabytes"]
    return markdown(heads, rows)


def spread(value: Sequence[float], digits: int = 3) -> str:
    """A mean and its interval."""
    mean, low, high = value
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def real_rows() -> list[dict[str, Any]]:
    """The rows of real_images.json without those of single settings ("small: 4 steps")."""
    return [row for row in result("real_images")["rows"] if ": " not in row["map"]]


def real_images() -> str:
    """Maps on real images against boxes, all findings but cardiomegaly."""
    metrics = ("auroc", "auprc", "pointing", "dice", "iou")
    rows = [
        [row["map"], *(number(row[metric][0]) for metric in metrics), spread(row["auprc_minus_reference"])]
        for row in real_rows()
    ]
    return markdown(["map", "AUROC", "AUPRC", "pointing", "Dice", "IoU", "AUPRC minus learned prior"], rows)


def real_summary() -> str:
    """The rows of README: the prior, the strongest competitors, and the packaged model."""
    kept = ("learned prior", "PCA residual", "PCA residual x prior", "small", "small x prior", "small, shuffled")
    rows = [
        [row["map"], number(row["auroc"][0]), spread(row["auprc"]), number(row["pointing"][0])]
        for row in real_rows()
        if row["map"] in kept
    ]
    return markdown(["map, 330 real images", "AUROC", "AUPRC", "pointing game"], rows)


def real_findings() -> str:
    """AUPRC by finding, and each model's difference to the learned prior."""
    kept = ("learned prior", "PCA residual", "PCA residual x prior", *result("real_images")["models"])
    kept += tuple(f"{name} x prior" for name in result("real_images")["models"])
    by_map = {row["map"]: row["by_finding"] for row in real_rows() if row["map"] in kept}
    findings = [name for name, scores in by_map["learned prior"].items() if scores["images"] >= 20]
    rows = [
        [finding.replace("_", " "), str(by_map["learned prior"][finding]["images"])]
        + [number(by_map[name][finding]["auprc"]) for name in kept]
        + [spread(by_map[name][finding]["auprc_minus_reference"]) for name in result("real_images")["models"]]
        for finding in findings
    ]
    differences = [f"{name} minus prior" for name in result("real_images")["models"]]
    return markdown(["finding", "images", *kept, *differences], rows)


def real_implants() -> str:
    """The models on findings drawn into unseen normal images."""
    heads = ["model", "finding", "PSNR, dB", "untouched image", "nearer than untouched", "lesion error left", "AUROC"]
    rows = [
        [name, row["finding"].replace("_", " "), number(row["psnr"], 1), number(row["psnr_untouched"], 1),
         f"{row['nearer_than_untouched']:.0%}", number(row["lesion_error_left"], 2), number(row["auroc"])]
        for name, about in result("real_images")["models"].items()
        for row in about["implants"]
    ]  # fmt: skip
    return markdown(heads, rows)


def real_pack() -> str:
    metrics = ("auroc", "auprc", "dice_fixed", "pointing_game")
    by_map: dict[str, dict[str, str]] = {}
    for row in result("real_pack")["table"]:
        by_map.setdefault(row["map"], {})[row["metric"]] = f"{row['mean']:.3f} ({row['low']:.3f}-{row['high']:.3f})"
    rows = [[name, *(cells[metric] for metric in metrics)] for name, cells in by_map.items()]
    return markdown(["map", "AUROC", "AUPRC", "Dice, fixed", "pointing game"], rows)


def implants() -> str:
    keys = ("auroc", "auprc", "dice_best", "pointing_game", "lesion_error_left")
    rows = [
        [
            row["method"].replace("_", " "),
            *(number(row.get(key)) for key in keys),
            number(row.get("psnr_counterfactual"), 1),
        ]
        for row in result("implants")["rows"]
    ]
    heads = [
        "method",
        "AUROC",
        "AUPRC",
        "best Dice",
        "pointing game",
        "lesion error left",
        "PSNR to the ground-truth counterfactual",
    ]
    return markdown(heads, rows)


def _alone(ratios: dict[str, dict[str, float]]) -> dict[str, float]:
    return next(ratio for name, ratio in ratios.items() if "batch 1," in name)


def _closest(ratios: dict[str, dict[str, float]]) -> dict[str, float]:
    return min(ratios.values(), key=lambda ratio: ratio["median"])


def throughput() -> str:
    """Table of headline ratios (docs/throughput.md)."""
    engine, plane = result("engine_cpu")["edits"][0]["ours_over"], result("data_plane")["ray_over_inline"]
    same = {name: ratio for name, ratio in engine.items() if "reconstruction" in name}
    counterfactuals = {name: ratio for name, ratio in engine.items() if name not in same}
    largest, scale = result("planning")["curve"][-1], result("scale")
    many, service = scale["curve"][-1], scale["service_seconds"]
    return markdown(
        ["", ""],
        [
            ["speed-up over StableDiffusionImg2ImgPipeline with batch 1, same outputs", ranged(_alone(same))],
            ["speed-up over its best batch, same outputs", ranged(_closest(same))],
            ["the same two, pipeline without the reconstruction",
             f"{ranged(_alone(counterfactuals))}; {ranged(_closest(counterfactuals))}"],
            ["run time on Ray over run time in a plain loop, same records", ranged(plane)],
            [f"utilisation of {many['actors']} simulated GPU actors ({service:g} s per shard)",
             number(many["efficiency"])],
            [f"reduce of {largest['records']:,} records", f"{largest['reduce']['seconds'] / 60:.0f} minutes, "
             f"{largest['reduce']['peak_megabytes'] / 1000:.1f} GB"],
        ],
    )  # fmt: skip


def demo() -> str:
    """Results of the demo (README.md, docs/index.md), without the weakest baselines."""
    weak = ("asymmetry", "autoencoder difference", "centre prior")
    rows = [row for row in result("demo")["rows"] if row["row"].removeprefix("baseline: ") not in weak]
    return markdown(
        ["", "flip rate", "AUROC in the lungs", "minus best baseline", "Dice at fixed threshold", "lesion error left",
         "PSNR, dB"],
        [
            [row["row"], number(row.get("flip_rate")), number(row.get("auroc")), minus_baseline(row),
             *(number(row.get(key)) for key in ("dice_fixed", "lesion_error_left")), number(row.get("psnr"), 1)]
            for row in rows
        ],
    )  # fmt: skip


def minus_baseline(row: dict[str, Any]) -> str:
    return spread([row["minus_baseline"], *row["minus_baseline_interval"]]) if "minus_baseline" in row else ""


def claims() -> str:
    """Earlier claims of this project, and what is left of them (docs/methods.md)."""
    ours, *others = result("demo")["rows"]
    by_name = {row["row"]: row for row in others}
    untouched, truth = by_name["the untouched image"], by_name["the ground truth"]
    real = {row["map"]: row for row in result("real_images")["rows"]}
    small = result("real_images")["models"]["small"]
    leaders = {row["method"]: row for row in result("attribution")["mean"]}
    best = by_name[f"baseline: {ours['baseline'].replace('_', ' ').replace('pca', 'PCA')}"]
    return markdown(["claim", "then against", "now against", "left of it"], [
        ["AUROC 0.945 on the demo's images", "brightness, smoothed like the map: 0.635",
         f"{best['row'].removeprefix('baseline: ')}, tuned on validation images: {number(best['auroc'])}",
         f"{minus_baseline(ours)}: holds"],
        ["flip rate 0.986: almost every counterfactual is healthy", "nothing",
         f"the ground truth: {number(truth['flip_rate'])}",
         f"withdrawn: ours is {number(ours['flip_rate'])}, and above the truth is not better"],
        ["36 dB to the ground-truth counterfactual", "other methods",
         f"the untouched image: {number(untouched['psnr'], 1)} dB on the demo's images",
         f"withdrawn: unblended it is {number(ours['psnr'], 1)} dB, below the untouched image; the blended method "
         "keeps the image's own pixels"],
        ["1.65 times the AUPRC of the best competitor on real boxes", "a centre prior and gradients",
         f"a prior learned from other images' boxes: {number(real['learned prior']['auprc'][0])}",
         f"{real['small']['auprc'][0] / real['learned prior']['auprc'][0]:.2f} times "
         f"({spread(real['small']['auprc_minus_reference'])}), by the packaged model"],
        ["the map finds lesions better than any map without a counterfactual (real boxes)", "not stated before",
         f"{small['best_rival']}: {number(real[small['best_rival']]['auprc'][0])} AUPRC",
         f"not shown: ours x prior {spread(small['x_prior_minus_best_rival_x_prior'])}"],
        ["better than both GANs", "the GANs with a tenth of our training, not tuned",
         f"the same: AUROC {number(leaders['vant-gan']['auroc'])} and {number(leaders['ant-gan']['auroc'])}",
         "not shown: they have not converged"],
        ["all maps are smoothed alike", "", "", "false: the paper's settings were not, and smoothing harmed "
         "brightness; now each baseline has its own best smoothing"],
    ])  # fmt: skip


def training_choices() -> str:
    keys = ("auroc", "dice_best", "flip_rate", "lesion_error_left", "paper_auroc", "paper_flip_rate")
    rows = [[row["choice"], *(number(row[key]) for key in keys)] for row in result("training_choices")["table"]]
    return markdown(["choice", "AUROC", "best Dice", "flip rate", "lesion error left", "AUROC, paper's sampler",
                     "flip rate, paper's sampler"], rows)  # fmt: skip


def modest_data() -> str:
    keys = ("auroc", "dice_best", "flip_rate", "lesion_error_left", "psnr_counterfactual", "paper_auroc",
            "paper_flip_rate")  # fmt: skip
    rows = []
    for row in result("modest_data")["table"]:
        low, high = row["without_memory"]
        memory = f"{row['nearer_to_training']:.2f} ({low:.2f} to {high:.2f})"
        digits = (1 if key == "psnr_counterfactual" else 3 for key in keys)
        rows.append([str(row["images_per_class"]), *(number(row[key], n) for key, n in zip(keys, digits)), memory])
    return markdown(["images of each class", "AUROC", "best Dice", "flip rate", "lesion error left", "PSNR",
                     "AUROC, paper's sampler", "flip rate, paper's sampler",
                     "nearer to a training image (without memory)"], rows)  # fmt: skip


def downstream() -> str:
    found = result("downstream")
    kinds = grouped(found["table"], "images_per_class", "row")
    over = {(row["images_per_class"], row["row"]): row for row in found["differences"]}
    rows = []
    for (size, name), members in kinds.items():
        means = (
            sum(row[key] for row in members) / len(members) for key in ("accuracy", "auroc_disease", "auroc_classes")
        )
        difference = over.get((size, name))
        cell = ""
        if difference is not None:
            low, high = difference["interval"]
            cell = f"{difference['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        rows.append([str(size), name, *(number(value) for value in means), cell])
    return markdown(["images of each class", "trained on", "accuracy", "AUROC of disease", "mean AUROC of the classes",
                     "accuracy over the line above"], rows)  # fmt: skip


def fid_cold_start() -> str:
    found = result("fid")
    theirs, ours, twice = (found[key] for key in ("pytorch_fid", "ours", "ours_twice_the_images"))

    def cells(one: dict[str, float]) -> list[str]:
        seconds = [number(one[key], 1) for key in ("seconds", "cpu_seconds", "seconds_distance")]
        return [*seconds, f"{one['peak_megabytes'] / 1000:.2f} GB"]

    return markdown(
        ["", "seconds", "CPU seconds", "seconds of the distance", "peak memory", "with twice the images"],
        [[f"pytorch-fid {found['versions']['pytorch_fid']}", *cells(theirs), ""],
         ["diffva-ray", *cells(ours), f"{twice['peak_megabytes'] / 1000:.2f} GB"]],
    )  # fmt: skip


def report_cost() -> str:
    rows = []
    for run in result("report")["runs"]:
        first, again, page = run["first"], run["again"], run["page"]
        rows.append(
            [f"{run['records']:,}", f"{first['seconds']:.0f} s", f"{again['seconds']:.0f} s",
             f"{max(first['peak_mib'], again['peak_mib'])} MiB", f"{run['report_files']:,}",
             f"{run['report_mib']:.0f} MiB", f"{page['ready_s']:.1f} s", f"{page['filter_ms']:.0f} ms",
             f"{page['heap_mib']} MiB"]
        )  # fmt: skip
    return markdown(["records", "first report", "again", "peak memory", "files", "size", "viewer ready",
                     "filter by class", "script memory"], rows)  # fmt: skip


def paper_claims() -> str:
    from diffva_ray.paper.claims import HEADS, claims

    return markdown(HEADS, [claim.cells() for claim in claims()])


TABLES: dict[str, Callable[[], str]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        leaderboard, limits, corrections, shortcuts, induction, words, sliders, unseen, engine, host, data_plane, scale,
        planning, export, fid_rows, real_images, real_summary, real_findings, real_implants, real_pack, implants,
        throughput, demo, claims, gpu, paper_claims, suspects, report_cost,
        training_choices, modest_data, downstream, fid_cold_start,
    )
}  # fmt: skip


def rewritten(text: str) -> str:
    """Return the page with every marked table regenerated. Raises KeyError for an unknown table."""

    def written(block: re.Match[str]) -> str:
        read.clear()
        table = TABLES[block[2]]()
        return f"{block[1]}{table}{provenance()}{block[4]}"

    return BLOCK.sub(written, text)


@click.command()
@click.option("--check", is_flag=True, help="Write nothing.")
def main(check: bool) -> None:
    wrong = False
    if not check:
        DATES.write_text(json.dumps(dates(), indent=1) + "\n")
    for name in PAGES:
        page = ROOT / name
        before = page.read_text()
        after = rewritten(before)
        if check and after != before:
            wrong = True
            click.echo("".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), name, "results")))
        elif not check:
            page.write_text(after)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
