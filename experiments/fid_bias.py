"""Simulate two other explanations of the paper's table 2, where Viral Pneumonia is worst: few images, and the source.

    python experiments/fid_bias.py --out experiments/results/fid_bias.json

Simulation 1, N: sets of the paper's sizes (10192 real healthy images; as many counterfactuals as images of a class)
are sampled from ONE distribution, so the true distance is 0. Features are Gaussian with variances 1/i that sum to 1,
so values are shares of the trace; the result is the ranking of the classes. ``--scale`` divides sizes and dimensions
by the same number, which keeps N over d, on which the bias depends.

Simulation 2, source: the healthy reference is 87 % adult (8851 of 10192) and 13 % paediatric; the counterfactuals of
one class are of children only. Every counterfactual is a perfect healthy image of its source, so the remaining
distance is that between the sources.

Simulation 3: coverage of the delete-group jackknife's and a bootstrap's 95 % interval at a true distance of 0.25.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from diffva_ray.metrics.fid import delete_group_jackknife, frechet_distance_features, matched
from diffva_ray.metrics.fid_controls import infinity
from diffva_ray.metrics.kid import kid

REAL = 10192  # healthy images of the Radiography Database
ADULT = 8851  # of them from RSNA; the others are paediatric (Kaggle)
IMAGES = {"COVID": 3616, "Lung_Opacity": 6012, "Viral Pneumonia": 1345}
PAPER = {"COVID": 45.11, "Lung_Opacity": 60.60, "Viral Pneumonia": 110.72}


def spectrum(d: int) -> np.ndarray:
    """Return standard deviations of the features: variances fall as 1/i and sum to 1."""
    variances = 1 / np.arange(1, d + 1)
    return np.sqrt(variances / variances.sum())


def draw(random: np.random.Generator, n: int, d: int) -> np.ndarray:
    return (random.standard_normal((n, d), dtype=np.float32) * spectrum(d).astype(np.float32)).astype(np.float32)


def bias_of_n(d: int, scale: float, draws: int) -> list[dict[str, Any]]:
    """Compute the distance between two samples of one distribution at the sizes of table 2, over the trace."""
    rows = []
    smallest = round(min(IMAGES.values()) / scale)
    for label, images in IMAGES.items():
        values, equal, unbiased, far = [], [], [], []
        for seed in range(draws):
            random = np.random.default_rng(seed)
            real, counterfactuals = draw(random, round(REAL / scale), d), draw(random, round(images / scale), d)
            values.append(frechet_distance_features(real, counterfactuals))
            equal.append(matched(real, counterfactuals, draws=2, n=smallest)[0])
            unbiased.append(kid(real, counterfactuals, subsets=20, subset_size=300)[0])
            far.append(infinity(real, counterfactuals, draws=1, seed=seed).value)
        rows.append({"class": label, "n_real": round(REAL / scale), "n_counterfactuals": round(images / scale),
                     "paper": PAPER[label], "distance_over_trace": float(np.mean(values)),
                     "n_matched_over_trace": float(np.mean(equal)),
                     "kid": float(np.mean(unbiased)), "infinity_over_trace": float(np.mean(far))})  # fmt: skip
    return rows


def source_confound(d: int, scale: float, shifts: tuple[float, ...]) -> list[dict[str, Any]]:
    """Compare perfect counterfactuals of children with the mixed reference and with the children in it."""
    rows = []
    direction = np.zeros(d, np.float32)
    direction[:8] = 1 / np.sqrt(8)
    for shift in shifts:
        random = np.random.default_rng(1)
        adults, children = round(ADULT / scale), round((REAL - ADULT) / scale)
        reference = draw(random, adults + children, d)
        reference[adults:] += shift * direction
        counterfactuals = draw(random, round(IMAGES["Viral Pneumonia"] / scale), d) + shift * direction
        mixed = draw(random, len(counterfactuals), d)
        mixed[round(len(mixed) * ADULT / REAL) :] += shift * direction
        rows.append({"shift_over_root_trace": shift,
                     "children_against_all": frechet_distance_features(reference, counterfactuals),
                     "children_against_children": frechet_distance_features(reference[adults:], counterfactuals),
                     "mixed_against_all": frechet_distance_features(reference, mixed)})  # fmt: skip
    return rows


def coverage(d: int, n: int, trials: int) -> dict[str, Any]:
    """Measure how often 95 % intervals cover 0.25, the true distance of two Gaussians 0.5 apart."""
    covered, bootstrapped, inside = 0, 0, 0
    scale = np.arange(1, d + 1) ** -0.5
    for trial in range(trials):
        random = np.random.default_rng(1000 + trial)
        x, y = random.standard_normal((2, n, d)) * scale
        y[:, 0] += 0.5
        low, high = delete_group_jackknife(x, y, seed=trial)
        covered += low <= 0.25 <= high
        redrawn = [
            frechet_distance_features(x[random.integers(n, size=n)], y[random.integers(n, size=n)]) for _ in range(100)
        ]
        low, high = np.quantile(redrawn, [0.025, 0.975])
        bootstrapped += low <= 0.25 <= high
        inside += frechet_distance_features(x, y) > 0.25
    return {"dimensions": d, "n": n, "trials": trials, "truth": 0.25, "jackknife": covered / trials,
            "bootstrap": bootstrapped / trials, "plain_value_above_truth": inside / trials}  # fmt: skip


@click.command()
@click.option("--scale", default=8.0, show_default=True, help="Divisor of sizes and dimensions; 1 takes hours.")
@click.option("--draws", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=None)
def main(scale: float, draws: int, out: Path | None) -> None:
    d = round(2048 / scale)
    result = {
        "what": "the N bias and the source confound behind table 2, and the coverage of intervals; Gaussian features",
        "scale": scale,
        "dimensions": d,
        "n_bias": bias_of_n(d, scale, draws),
        "source_confound": source_confound(d, scale, (0.0, 0.25, 0.5, 1.0)),
        "coverage": [coverage(8, 150, 200), coverage(64, 300, 200)],
    }
    print(json.dumps(result, indent=1))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
