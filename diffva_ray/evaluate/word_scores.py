"""Whether an edit is where the prompt says: side, zone and size of the change, for prompts that name one."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffva_ray.data.place_words import FACTORS, asked
from diffva_ray.data.places import SIDES, middle_of, place_of, zone_rows_of
from diffva_ray.evaluate.tables import by_label, finite_mean
from diffva_ray.metrics.counterfactual import CHANGED
from diffva_ray.metrics.intervals import group_bootstrap, proportion_interval
from diffva_ray.schema import Mask, TableRow


def word_scores(prompt: str, signed_map: NDArray[np.floating], lungs: Mask | None) -> TableRow:
    """What a prompt asks for and what the change of an image is, for each factor that the prompt names.

    The change are the pixels of the map [size, size] above CHANGED inside the lungs. ``<factor>_energy``: share of the
    map's energy in the lungs that is on the asked side, or in the asked third."""
    wishes = asked(prompt)
    if not wishes:
        return {}
    energy = np.abs(signed_map) if lungs is None else np.where(lungs, np.abs(signed_map), 0.0)
    place = place_of(energy > CHANGED, lungs)
    scores: TableRow = {}
    for factor, value in wishes.items():
        made = None if place is None else getattr(place, factor)
        scores |= {f"{factor}_asked": value, f"{factor}_made": made}
    total = float(energy.sum())
    if total > 0 and wishes.get("side") in SIDES:
        left = _left_share(energy, lungs)
        scores["side_energy"] = left if wishes["side"] == "left" else 1 - left
    if total > 0 and "zone" in wishes:
        rows = zone_rows_of(wishes["zone"], lungs, len(energy))
        scores["zone_energy"] = float(energy[rows].sum()) / total
    return scores


def _left_share(energy: NDArray[np.floating], lungs: Mask | None) -> float:
    """Share of the energy on the patient's left of the lungs' middle, which is the right half of the image."""
    middle = energy.shape[1] / 2 if lungs is None else middle_of(lungs)
    return float(energy[:, np.arange(energy.shape[1]) + 0.5 > middle].sum() / energy.sum())


def word_rows(scores: list[TableRow]) -> list[TableRow]:
    """For each class, prompt and factor that the prompt names: the share of the images whose change is as asked, the
    most frequent other one, and the mean share of the energy that is there."""
    frame = pd.DataFrame(scores)
    rows: list[TableRow] = []
    for factor in FACTORS:
        if f"{factor}_asked" not in frame:
            continue
        for label, members in by_label(frame.dropna(subset=[f"{factor}_asked"])):
            for (prompt, value), group in members.groupby(["prompt", f"{factor}_asked"], sort=True):
                rows.append({"label": label, "prompt": prompt, "factor": factor, "asked": value, **_row(group, factor)})
    return rows


def _row(group: pd.DataFrame, factor: str) -> TableRow:
    made = group[f"{factor}_made"]
    right = (made == group[f"{factor}_asked"]).to_numpy(float)
    others = made[(made != group[f"{factor}_asked"]) & made.notna() & (made != "")]
    row: TableRow = {
        "n": len(group),
        "right": float(right.mean()),
        "right_interval": list(proportion_interval(right, group["group"].to_numpy())),
        "unchanged": float(made.isna().mean()),
        "else": str(others.mode().iloc[0]) if len(others) else "",
    }
    column = f"{factor}_energy"
    present = group.dropna(subset=[column]) if column in group else group[:0]
    if len(present):
        interval = group_bootstrap(present[column].to_numpy(float), present["group"].tolist(), within=(0.0, 1.0))
        row |= {"energy": finite_mean(present[column].astype(float)), "energy_interval": list(interval)}
    return row
