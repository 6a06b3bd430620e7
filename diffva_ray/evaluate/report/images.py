"""Panels of the viewer: two image files for each record, SVG outlines of lesion and lungs, and scores of its map.

The strip holds image, counterfactual and, if known, the ground-truth counterfactual side by side. The map is coloured,
and transparent where nothing changed, so it can be displayed alone or over the image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import approximate_polygon, find_contours

from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import BadImage, decode_map
from diffva_ray.evaluate.drawing import BRIGHTER, DARKER
from diffva_ray.evaluate.records import Lesions, as_records, finished, grey, read_input, read_truth
from diffva_ray.generate.run import Run
from diffva_ray.metrics.localization import positive, score
from diffva_ray.schema import Record

FOLDER = "report/images"
MAX_LISTED = 20_000  # records in the viewer
MAX_PIXELS = 1_300_000_000  # pixels of all images in the viewer: 20 000 of 256 x 256, 5 000 of 512 x 512
MAX_SIDE = 512  # pixels of a panel's side
MAX_PNG_SIDE = 128  # up to this side a strip is PNG, above it WebP
PANELS_VERSION = 2  # raised when the panels of a record change
BATCH_SIZE = 256  # records processed at a time


@dataclass(frozen=True)
class PanelFiles:
    """The panels of one record."""

    key: str  # part of the names of its two files
    truth: bool  # whether the strip includes the ground-truth counterfactual
    lesion: str  # SVG path on the grid of the model; empty if unknown
    lungs: str  # likewise
    auroc: float | None  # of the map; None without a known lesion
    dice_best: float | None  # likewise


@dataclass(frozen=True)
class Palette:
    """The colour scale of all maps."""

    limit: float  # |M| of the full colour

    def key(self, row: Record, lesions: Lesions) -> str:
        """A key that changes whenever the panels of ``row`` do."""
        parts = [
            PANELS_VERSION, self.limit, lesions.get(row["image_path"]), row["image_sha256"],
            row["counterfactual_sha256"], row["attribution_sha256"], row["lesion_mask_path"], row["ground_truth_path"],
        ]  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def strip_file(record: str, key: str, resolution: int) -> str:
    """Name of the file with image, counterfactual and ground-truth counterfactual."""
    return f"{record}-{key}.{'png' if resolution <= MAX_PNG_SIDE else 'webp'}"


def map_file(record: str, key: str) -> str:
    """Name of the file with the map."""
    return f"{record}-{key}-map.png"


def max_listed(resolution: int) -> int:
    """The largest number of records in the viewer, for images of ``resolution`` pixels a side."""
    return min(MAX_LISTED, MAX_PIXELS // min(resolution, MAX_SIDE) ** 2)


def sample(records: pd.DataFrame, limit: int) -> list[Record]:
    """At most ``limit`` records with status ``ok``, in their order: evenly over classes as far as their sizes allow,
    and within a class evenly over the range of SSIM. The result is deterministic."""
    ok = finished(records)
    if len(ok) > limit:
        ranked = ok[["label", "ssim", "record_id"]].sort_values(["label", "ssim", "record_id"])
        kept: list[Any] = []
        for label, share in shares(ranked["label"].value_counts().sort_index().to_dict(), limit).items():
            members = ranked[ranked["label"] == label]
            kept += members.index[np.linspace(0, len(members) - 1, share).round().astype(int)].tolist()
        ok = ok.loc[sorted(kept)]
    return as_records(ok)


def shares(counts: dict[str, int], limit: int) -> dict[str, int]:
    """Divide ``limit`` records among classes: equal parts; what small classes do not use goes to the others."""
    given: dict[str, int] = {}
    ascending = sorted(counts, key=lambda label: (counts[label], label))
    for turn, label in enumerate(ascending):
        given[label] = min(counts[label], (limit - sum(given.values())) // (len(ascending) - turn))
    return dict(sorted(given.items()))


def write_panels(
    run: Run, rows: Sequence[Record], palette: Palette, lesions: Lesions, earlier: dict[str, PanelFiles]
) -> dict[str, PanelFiles]:
    """Write the panels of ``rows`` below ``report/images`` and return them by record id.

    Panels of an ``earlier`` report that are still valid are kept, all other files there are deleted. A record whose
    images can no longer be read is left out.
    """
    existing = {entry.path.removeprefix(f"{FOLDER}/") for entry in run.store.list(FOLDER)}
    size = run.recipe.model.resolution

    def files(record: str, key: str) -> set[str]:
        return {strip_file(record, key, size), map_file(record, key)}

    def panels_of(row: Record) -> PanelFiles | None:
        old = earlier.get(row["record_id"])
        key = palette.key(row, lesions)
        if old is not None and old.key == key and files(row["record_id"], key) <= existing:
            return old
        return _write(run, row, key, palette, lesions)

    results: dict[str, PanelFiles] = {}
    with ThreadPoolExecutor(8) as pool:  # most of the time is spent waiting for the store
        for start in range(0, len(rows), BATCH_SIZE):
            batch = rows[start : start + BATCH_SIZE]
            for row, panels in zip(batch, pool.map(panels_of, batch)):
                if panels is not None:
                    results[row["record_id"]] = panels
    kept = set().union(*(files(record, panels.key) for record, panels in results.items()))
    for name in sorted(existing - kept):
        run.store.delete(f"{FOLDER}/{name}")
    return results


def _write(run: Run, row: Record, key: str, palette: Palette, lesions: Lesions) -> PanelFiles | None:
    size, record = run.recipe.model.resolution, row["record_id"]
    try:
        image = read_input(run, row)
        counterfactual = grey(run.store, row["counterfactual_path"])
        signed = decode_map(run.store.read(row["attribution_path"]))
        truth = read_truth(run, row, lesions)
    except (OSError, BadImage):
        return None
    panels = [image, counterfactual] + ([truth.counterfactual] if truth.counterfactual is not None else [])
    run.store.put(f"{FOLDER}/{strip_file(record, key, size)}", strip(panels))
    run.store.put(f"{FOLDER}/{map_file(record, key)}", coloured(signed, palette.limit))
    scores = score(positive(signed), truth.lesion, truth.region) if truth.lesion is not None else None
    return PanelFiles(
        key,
        truth.counterfactual is not None,
        outline(truth.lesion),
        outline(truth.lungs),
        None if scores is None else scores.auroc,
        None if scores is None else scores.dice_best,
    )


def strip(panels: Sequence[NDArray[np.float32]]) -> bytes:
    """Square grey images [H, H] in [0, 1] side by side: PNG for a small H, else WebP; at most ``MAX_SIDE`` high."""
    side = min(panels[0].shape[0], MAX_SIDE)
    sheet = Image.new("L", (side * len(panels), side))
    for n, panel in enumerate(panels):
        pixels = Image.fromarray(quantise(panel))
        if pixels.width != side:
            pixels = pixels.resize((side, side), Image.Resampling.BOX)
        sheet.paste(pixels, (n * side, 0))
    sink = BytesIO()
    if panels[0].shape[0] <= MAX_PNG_SIDE:
        sheet.save(sink, "PNG", compress_level=6)
    else:
        sheet.convert("RGB").save(sink, "WEBP", quality=90, method=3)
    return sink.getvalue()


def coloured(signed_map: NDArray[np.float32], limit: float) -> bytes:
    """A signed map [H, H] as a PNG of 255 colours: orange above zero, blue below, more opaque farther from zero."""
    levels = np.rint(np.clip(signed_map / limit, -1, 1) * 127 + 127).astype(np.uint8)
    pixels = Image.fromarray(levels, "P")
    strength = (np.arange(256) - 127) / 127
    colours = np.where(strength[:, None] > 0, to_rgb(BRIGHTER), to_rgb(DARKER))
    pixels.putpalette(np.rint(255 * colours).astype(np.uint8).tobytes())
    if pixels.width > MAX_SIDE:
        pixels = pixels.resize((MAX_SIDE, MAX_SIDE), Image.Resampling.NEAREST)
    alpha = np.rint(255 * np.clip(np.abs(strength), 0, 1) ** 0.9).astype(np.uint8)
    sink = BytesIO()
    pixels.save(sink, "PNG", transparency=alpha.tobytes(), compress_level=6)
    return sink.getvalue()


def outline(mask: NDArray[np.bool_] | None) -> str:
    """The border of a mask as an SVG path on the grid of the mask; only digits, ``M``, ``L`` and ``Z``."""
    if mask is None or not mask.any():
        return ""
    tolerance = max(mask.shape[0] / 400, 0.2)
    contours = find_contours(np.pad(mask.astype(float), 1), 0.5)
    return "".join(_path(approximate_polygon(line, tolerance) - 0.5) for line in contours if len(line) > 3)


def _path(points: Iterable[Sequence[float]]) -> str:
    return "M" + "L".join(f"{x:.4g} {y:.4g}" for y, x in points) + "Z"
