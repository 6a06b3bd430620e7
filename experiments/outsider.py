"""Recompute README's numbers of a run from its files, without diffva-ray: NumPy, pandas, SciPy, Pillow.

    python experiments/outsider.py runs/demo/run --validation runs/demo/validation --data runs/demo/data

Layout of the files: docs/operations.md. Attribution maps are 16-bit PNG, level 32768 is zero and 32767 levels are 1.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.stats import mannwhitneyu

run, validation, data = Path(sys.argv[1]), Path(sys.argv[3]), Path(sys.argv[5])


def grey(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("L"), float) / 255


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * np.log10(np.mean((a - b) ** 2))


def average_precision(true: np.ndarray, value: np.ndarray) -> float:
    steps = pd.DataFrame({"true": true, "value": value}).groupby("value")["true"].agg(["sum", "count"])[::-1]
    hits = steps["sum"].cumsum()
    return float((hits / steps["count"].cumsum() * steps["sum"]).sum() / true.sum())


def scored(run: Path, data: Path) -> pd.DataFrame:
    records = pd.concat([pd.read_parquet(part) for part in sorted((run / "records").glob("*.parquet"))])
    rows = []
    for record in records[records["status"] == "ok"].to_dict("records"):
        saliency = (np.asarray(Image.open(run / record["attribution_path"]), float) - 32768) / 32767
        lungs, lesion = (grey(data / record[f"{name}_mask_path"]) > 0.5 for name in ("lung", "lesion"))
        image, truth, after, before = (
            grey(path)
            for path in (data / record["image_path"], data / record["ground_truth_path"],
                         run / record["counterfactual_path"], run / record["reconstruction_path"])
        )  # fmt: skip
        positive, inside = np.maximum(saliency, 0)[lungs], lesion[lungs]
        rows.append({
            "auroc": mannwhitneyu(positive[inside], positive[~inside]).statistic / inside.sum() / (~inside).sum(),
            "auprc": average_precision(inside, positive),
            "pointing_game": inside[positive == positive.max()].mean(), "positive": positive, "inside": inside,
            "psnr": psnr(after, truth), "psnr_input": psnr(image, truth), "psnr_reconstruction": psnr(before, truth),
            "error": np.abs(after - truth)[lesion].mean(), "error_input": np.abs(image - truth)[lesion].mean(),
            "judge_image": record["judge_image"], "judge_counterfactual": record["judge_counterfactual"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def dice(rows: pd.DataFrame, threshold: float) -> float:
    pairs = [(positive >= threshold, inside) for positive, inside in zip(rows["positive"], rows["inside"])]
    return float(np.mean([2 * (found & true).sum() / (found.sum() + true.sum()) for found, true in pairs]))


rows, others = scored(run, data / "test"), scored(validation, data / "validation")
threshold = max(np.geomspace(1e-3, 1, 400), key=lambda value: dice(others, value))
ill = rows[rows["judge_image"] <= 0.5]
names = ["auroc", "auprc", "pointing_game", "psnr", "psnr_input", "psnr_reconstruction"]
print(json.dumps({
    "n": len(rows), **rows[names].mean().to_dict(), "threshold": threshold, "dice_fixed": dice(rows, threshold),
    "lesion_error_ratio": rows["error"].sum() / rows["error_input"].sum(),
    "flip_rate": float((ill["judge_counterfactual"] > 0.5).mean()),
}, indent=1))  # fmt: skip
