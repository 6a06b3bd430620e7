"""The gallery: a stated sample of films, each as one picture of film, counterfactual, red overlay and signed map."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from diffva_ray.data.images import BadImage, quantise
from diffva_ray.evaluate.figures import Scale, direction, diverging, finished, map_scale, overlay
from diffva_ray.evaluate.records import Row, read_images, read_truth
from diffva_ray.generate.plan import Run
from diffva_ray.storage import Store, open_store

FOLDER = "report/images"
FILMS = 200  # shown at most
SIDE = 256  # of a panel, at most


@dataclass(frozen=True)
class Gallery:
    """``shown``: the records with a picture at ``images/<record_id>.png`` beside the page; ``of``: how many there
    are; ``size``: width and height of a picture."""

    shown: list[Row]
    of: int
    unreadable: int
    scale: Scale
    size: tuple[int, int]


def write_gallery(run: Run, records: pd.DataFrame, limit: int = FILMS) -> Gallery:
    """Write the pictures of a sample of ``ok`` records below ``report/images``. Films that cannot be read any more are
    counted and left out."""
    chosen = sample(records, limit)
    scale = map_scale(run, records)
    data = open_store(run.about["data_root"])
    with ThreadPoolExecutor(8) as pool:  # waits on the store, mostly
        written = list(pool.map(lambda row: _write(run, data, row, scale), chosen))
    shown = [row for row, done in zip(chosen, written) if done]
    size = strip_size(4, run.recipe.model.resolution)
    return Gallery(shown, len(finished(records)), len(chosen) - len(shown), scale, size)


def sample(records: pd.DataFrame, limit: int) -> list[Row]:
    """At most ``limit`` ``ok`` records: classes as evenly as their sizes allow, and within a class evenly over the
    range of SSIM; the same for the same records."""
    ok = finished(records).sort_values(["label", "ssim", "record_id"])
    counts = ok["label"].value_counts().sort_index()
    rows: list[Row] = []
    for label, share in shares(counts.to_dict(), limit).items():
        members = ok[ok["label"] == label]
        at = np.linspace(0, len(members) - 1, share).round().astype(int)
        rows += members.iloc[at].to_dict("records")
    return rows


def shares(counts: dict[str, int], limit: int) -> dict[str, int]:
    """How many of ``limit`` places each class gets: equal parts, what small classes leave going to the others."""
    given: dict[str, int] = {}
    waiting = sorted(counts, key=lambda label: (counts[label], label))
    for turn, label in enumerate(waiting):
        given[label] = min(counts[label], (limit - sum(given.values())) // (len(waiting) - turn))
    return dict(sorted(given.items()))


def _write(run: Run, data: Store, row: Row, scale: Scale) -> bool:
    try:
        images = read_images(run, data, row)
        lungs = read_truth(run, data, {**row, "lesion_mask_path": None, "twin_path": None}, {}).lungs
    except (OSError, BadImage):
        return False
    red = overlay(images.film, direction(run, row["label"]) * images.signed_map, scale.threshold, lungs)
    panels = [_rgb(images.film), _rgb(images.counterfactual), red, diverging(images.signed_map, scale.limit)]
    run.store.put(f"{FOLDER}/{row['record_id']}.png", strip(panels))
    return True


def _rgb(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.repeat(grey[..., None], 3, axis=2)


def strip_size(panels: int, resolution: int) -> tuple[int, int]:
    """Width and height of ``panels`` square pictures side by side, a thin line apart."""
    side = min(resolution, SIDE)
    return panels * side + (panels - 1) * max(side // 64, 1), side


def strip(panels: Sequence[NDArray[np.float32]]) -> bytes:
    """Square pictures [H, H, 3] in [0, 1] side by side as one PNG, reduced to ``SIDE`` pixels where they are larger."""
    width, side = strip_size(len(panels), panels[0].shape[0])
    sheet = Image.new("RGB", (width, side))
    step = (width - side) // max(len(panels) - 1, 1)
    for n, panel in enumerate(panels):
        picture = Image.fromarray(quantise(panel))
        if picture.width > side:
            picture = picture.resize((side, side), Image.Resampling.BOX)
        sheet.paste(picture, (n * step, 0))
    sink = BytesIO()
    sheet.save(sink, "PNG")
    return sink.getvalue()
