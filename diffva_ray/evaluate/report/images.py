"""What the viewer shows of an image: its pictures as files beside the page, outlines as paths, its own scores.

Two files a record. The strip has image, counterfactual and, where it is known, the ground-truth counterfactual side by
side; the map is coloured and transparent where nothing changed, so that it serves both alone and over the image.
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
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import approximate_polygon, find_contours

from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import BadImage, decode, decode_map, to_square
from diffva_ray.evaluate.records import Boxes, finished, grey, read_truth
from diffva_ray.generate.run import Run
from diffva_ray.metrics.localization import positive, score
from diffva_ray.schema import Row

FOLDER = "report/images"
LISTED = 20_000  # records in the viewer, at most
PIXELS = 1_300_000_000  # of images in the viewer, at most: 20 000 of 256 pixels, 5 000 of 512
SIDE = 512  # of a picture, at most
LOSSLESS = 128  # pixels of side up to which a picture is PNG
BRIGHTER, DARKER = (224, 52, 8), (18, 104, 240)  # than the counterfactual; apart in every common colour blindness
PICTURES_VERSION = 1  # raised when the pictures of a record change
BATCH = 256  # records read at a time


@dataclass(frozen=True)
class Pictured:
    """``key`` names the two files of a record; ``truth`` is whether the strip has the ground-truth counterfactual;
    ``lesion`` and ``lungs`` are SVG paths on the grid of the model, empty where unknown; scores are None without a
    lesion to find."""

    key: str
    truth: bool
    lesion: str
    lungs: str
    auroc: float | None
    dice_best: float | None


@dataclass(frozen=True)
class Palette:
    """How maps are coloured: fully from ``limit`` on."""

    limit: float

    def key(self, row: Row, boxes: Boxes) -> str:
        """Changes when anything that the pictures of ``row`` show does."""
        seen = [PICTURES_VERSION, self.limit, boxes.get(row["image_path"])]
        seen += [
            row[name]
            for name in (
                "image_sha256",
                "counterfactual_sha256",
                "attribution_sha256",
                "lesion_mask_path",
                "ground_truth_path",
            )
        ]
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:8]


def strip_file(record: str, key: str, resolution: int) -> str:
    """Name of the picture of image, counterfactual and ground-truth counterfactual."""
    return f"{record}-{key}.{'png' if resolution <= LOSSLESS else 'webp'}"


def map_file(record: str, key: str) -> str:
    return f"{record}-{key}-map.png"


def most(resolution: int) -> int:
    """How many records the viewer takes, images of that many pixels a side."""
    return min(LISTED, PIXELS // min(resolution, SIDE) ** 2)


def sample(records: pd.DataFrame, limit: int) -> list[Row]:
    """At most ``limit`` ``ok`` records: classes as evenly as their sizes allow, and within a class evenly over the
    range of SSIM; the same for the same records, and in their order."""
    ok = finished(records)
    if len(ok) > limit:
        ranked = ok[["label", "ssim", "record_id"]].sort_values(["label", "ssim", "record_id"])
        kept: list[Any] = []
        for label, share in shares(ranked["label"].value_counts().sort_index().to_dict(), limit).items():
            members = ranked[ranked["label"] == label]
            kept += members.index[np.linspace(0, len(members) - 1, share).round().astype(int)].tolist()
        ok = ok.loc[sorted(kept)]
    return ok.to_dict("records")


def shares(counts: dict[str, int], limit: int) -> dict[str, int]:
    """How many of ``limit`` localization each class gets: equal parts, what small classes leave going to the others."""
    given: dict[str, int] = {}
    waiting = sorted(counts, key=lambda label: (counts[label], label))
    for turn, label in enumerate(waiting):
        given[label] = min(counts[label], (limit - sum(given.values())) // (len(waiting) - turn))
    return dict(sorted(given.items()))


def write_pictures(
    run: Run, rows: Sequence[Row], palette: Palette, boxes: Boxes, before: dict[str, Pictured]
) -> dict[str, Pictured]:
    """The pictures of ``rows`` below ``report/images``, by record id; those of an earlier report are kept where they
    still hold (``before``), and others there are deleted. An image that cannot be read any more is left out."""
    there = {entry.path.removeprefix(f"{FOLDER}/") for entry in run.store.list(FOLDER)}
    size = run.recipe.model.resolution

    def files(record: str, key: str) -> set[str]:
        return {strip_file(record, key, size), map_file(record, key)}

    def picture(row: Row) -> Pictured | None:
        known = before.get(row["record_id"])
        key = palette.key(row, boxes)
        if known is not None and known.key == key and files(row["record_id"], key) <= there:
            return known
        return _write(run, row, key, palette, boxes)

    found: dict[str, Pictured] = {}
    with ThreadPoolExecutor(8) as pool:  # waits on the store, mostly
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            made = zip(batch, pool.map(picture, batch))
            found |= {row["record_id"]: pictured for row, pictured in made if pictured is not None}
    kept = set().union(*(files(record, pictured.key) for record, pictured in found.items()))
    for name in sorted(there - kept):
        run.store.delete(f"{FOLDER}/{name}")
    return found


def _write(run: Run, row: Row, key: str, palette: Palette, boxes: Boxes) -> Pictured | None:
    size, record = run.recipe.model.resolution, row["record_id"]
    try:
        image = to_square(decode(run.data.read(row["image_path"]), bits=run.recipe.data.bits), size)
        counterfactual = grey(run.store, row["counterfactual_path"])
        signed = decode_map(run.store.read(row["attribution_path"]))
        truth = read_truth(run, row, boxes)
    except (OSError, BadImage):
        return None
    panels = [image, counterfactual] + ([truth.counterfactual] if truth.counterfactual is not None else [])
    run.store.put(f"{FOLDER}/{strip_file(record, key, size)}", strip(panels))
    run.store.put(f"{FOLDER}/{map_file(record, key)}", coloured(signed, palette.limit))
    found = score(positive(signed), truth.lesion, truth.region) if truth.lesion is not None else None
    return Pictured(
        key,
        truth.counterfactual is not None,
        outline(truth.lesion),
        outline(truth.lungs),
        None if found is None else found.auroc,
        None if found is None else found.dice_best,
    )


def strip(panels: Sequence[NDArray[np.float32]]) -> bytes:
    """Square grey pictures [H, H] in [0, 1] side by side: PNG when they are small, else WebP; at most ``SIDE`` high."""
    side = min(panels[0].shape[0], SIDE)
    sheet = Image.new("L", (side * len(panels), side))
    for n, panel in enumerate(panels):
        picture = Image.fromarray(quantise(panel))
        sheet.paste(
            picture if picture.width == side else picture.resize((side, side), Image.Resampling.BOX), (n * side, 0)
        )
    sink = BytesIO()
    if panels[0].shape[0] <= LOSSLESS:
        sheet.save(sink, "PNG", compress_level=6)
    else:
        sheet.convert("RGB").save(sink, "WEBP", quality=90, method=3)
    return sink.getvalue()


def coloured(signed_map: NDArray[np.float32], limit: float) -> bytes:
    """A signed map [H, H] as a PNG of 255 colours: denser the further from zero, red above it, blue below."""
    levels = np.rint(np.clip(signed_map / limit, -1, 1) * 127 + 127).astype(np.uint8)
    picture = Image.fromarray(levels, "P")
    strength = (np.arange(256) - 127) / 127
    picture.putpalette(np.where(strength[:, None] > 0, BRIGHTER, DARKER).astype(np.uint8).tobytes())
    if picture.width > SIDE:
        picture = picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    alpha = np.rint(255 * np.clip(np.abs(strength), 0, 1) ** 0.9).astype(np.uint8)
    sink = BytesIO()
    picture.save(sink, "PNG", transparency=alpha.tobytes(), compress_level=6)
    return sink.getvalue()


def outline(mask: NDArray[np.bool_] | None) -> str:
    """The border of a mask as an SVG path on its own grid: digits, ``M``, ``L`` and ``Z`` only."""
    if mask is None or not mask.any():
        return ""
    tolerance = max(mask.shape[0] / 400, 0.2)
    contours = find_contours(np.pad(mask.astype(float), 1), 0.5)
    return "".join(_path(approximate_polygon(line, tolerance) - 0.5) for line in contours if len(line) > 3)


def _path(points: Iterable[Sequence[float]]) -> str:
    return "M" + "L".join(f"{x:.4g} {y:.4g}" for y, x in points) + "Z"
