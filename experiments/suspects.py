"""Measure how often `diffva inspect` calls ordinary chest X-rays suspects, and how often it finds damaged ones.

    python experiments/suspects.py NAME=DATA... [--choose DATA] [--out experiments/results/suspects.json]

Every DATA is a data set of ordinary frontal chest X-rays. *Suspects* are counted among them as they are: false alarms,
but for true ones such as "PORTABLE" in an image. *Found* is the share of damaged images that are suspects for the right
reason; a tenth of the data set is damaged in one way. The two thresholds of ``cropped`` are chosen on another data set,
--choose: those that find most crops with at most CHOSEN_FALSE suspects among the whole images. Lateral views are
needed to measure whether those without a column ``view`` are found; none was at hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from diffva_ray.data import suspects
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import BadImage, decode
from diffva_ray.data.inspection import COLOURED
from diffva_ray.data.suspects import Traits, coloured_share, traits
from diffva_ray.progress import LOG, set_up_logging
from diffva_ray.provenance import code_revision, publish

Grey = NDArray[np.float32]
SHARE, MOST, SEED = 0.1, 60, 0  # of a data set that is damaged; at most; of the choice
CHOSEN_FALSE = 0.01
GRID = ((0.4, 0.5, 0.6), (0.1, 0.15, 0.2, 0.25, 0.3))  # of A_PART, of CLEAR_PART
REASONS = ("inverted", "rotated", "cropped", "padded", "text", "not frontal")
PARTS = {  # left, upper, right and lower edge as shares
    "left half": (0, 0, 0.5, 1),
    "lower half": (0, 0.5, 1, 1),
    "upper 60 %": (0, 0, 1, 0.6),
    "middle 60 % of both sides": (0.2, 0.2, 0.8, 0.8),
    "corner, 60 % of both sides": (0.4, 0, 1, 0.6),
    "middle 75 % of both sides": (0.125, 0.125, 0.875, 0.875),
}


def cut(part: str, stretched: bool) -> Callable[[Grey], Grey]:
    """A crop, saved as it is or stretched to the shape of the whole."""

    def damaged(image: Grey) -> Grey:
        height, width = image.shape
        left, top, right, low = PARTS[part]
        piece = image[round(top * height) : round(low * height), round(left * width) : round(right * width)]
        resized = Image.fromarray(piece).resize((width, height), Image.Resampling.BICUBIC) if stretched else piece
        return np.clip(np.asarray(resized, np.float32), 0, 1)

    return damaged


def written(share: float) -> Callable[[Grey], Grey]:
    """A name in white letters, ``share`` of the image's height tall."""

    def damaged(image: Grey) -> Grey:
        canvas = Image.fromarray(quantise(image))
        font = ImageFont.load_default(max(6, round(share * image.shape[0])))
        ImageDraw.Draw(canvas).text((6, 6), "DOE JANE 1957", fill=255, font=font)
        return np.asarray(canvas, np.float32) / np.float32(255)

    return damaged


def framed(image: Grey) -> Grey:
    """A black border at both sides, 20 % of the width each."""
    return np.pad(image, ((0, 0), (round(0.2 * image.shape[1]),) * 2))


DAMAGE: dict[str, tuple[str, Callable[[Grey], Grey]]] = {  # what is done -> first word of the reason, the function
    "grey values inverted": ("inverted", lambda image: 1 - image),
    **{f"turned by {90 * k} degrees": ("rotated", lambda image, k=k: np.rot90(image, k)) for k in (1, 2, 3)},
    "mirrored": ("mirrored", lambda image: image[:, ::-1]),
    **{f"{part}, as it is": ("cropped", cut(part, False)) for part in PARTS},
    **{f"{part}, stretched": ("cropped", cut(part, True)) for part in PARTS},
    "black border at two sides": ("padded", framed),
    **{f"name in letters of {share:.0%} of the height": ("text", written(share)) for share in (0.02, 0.03, 0.04)},
}


def loaded(uri: str, limit: int) -> tuple[list[Grey], int]:
    """At most ``limit`` images of a data set, spread over it, and the number of coloured ones."""
    dataset = open_dataset(uri)
    images, colours = [], 0
    for path in dataset.sample_paths(limit):
        try:
            data = dataset.store.read(path)
            images.append(decode(data, bits=dataset.bits))
            colours += coloured_share(data) > COLOURED
        except BadImage as error:
            LOG.info("%s/%s: %s", uri, path, error)
    return images, colours


def reasons(images: dict[str, Traits]) -> dict[str, list[str]]:
    """First words of the reasons by image."""
    return {name: [text.split("?")[0].split(" or ")[0].split(",")[0] for text in found]
            for name, found in suspects.suspects(images).items()}  # fmt: skip


def chosen(images: list[Grey]) -> list[int]:
    """The indices of the images that are damaged."""
    count = min(MOST, round(SHARE * len(images)))
    indices: list[int] = np.random.default_rng(SEED).choice(len(images), count, replace=False).tolist()
    return indices


def found(plain: dict[str, Traits], images: list[Grey], kind: str) -> float:
    """Share of the damaged images that are suspects for the reason of the damage."""
    expected, damage = DAMAGE[kind]
    damaged = {str(at): traits(np.ascontiguousarray(damage(images[at]), np.float32)) for at in chosen(images)}
    suspected = reasons({**plain, **damaged})
    return float(np.mean([expected in suspected.get(name, []) for name in damaged]))


def coloured(images: list[Grey]) -> dict[str, float]:
    """Share of images in colour, as JPEG, that are found: with a red rectangle of 2 % of the pixels, and grey ones."""
    shares: dict[str, list[bool]] = {"a red rectangle of 2 % of the pixels": [], "grey, saved as colour JPEG": []}
    for at in chosen(images):
        pixels = np.stack([quantise(images[at])] * 3, 2)
        red = pixels.copy()
        height, width = images[at].shape
        red[: height // 7, : width // 7] = 255, 0, 0
        for name, values in zip(shares, (red, pixels)):
            buffer = BytesIO()
            Image.fromarray(values).save(buffer, "JPEG", quality=85)
            shares[name].append(coloured_share(buffer.getvalue()) > COLOURED)
    return {name: round(float(np.mean(values)), 3) for name, values in shares.items()}


def measured(uri: str, limit: int) -> dict[str, Any]:
    """Suspects among the images as they are, and the share of damaged ones that is found, of one data set."""
    images, colours = loaded(uri, limit)
    plain = {str(number): traits(image) for number, image in enumerate(images)}
    alarms = Counter(word for words in reasons(plain).values() for word in words)
    LOG.info("%s: %d images, suspects %s", uri, len(images), dict(alarms))
    detection = {kind: round(found(plain, images, kind), 3) for kind in DAMAGE}
    sides = Counter(f"{image.shape[1]}x{image.shape[0]}" for image in images)
    return {
        "images": len(images),
        "size": sides.most_common(1)[0][0],
        "damaged": len(chosen(images)),
        "suspects": {**{word: alarms[word] for word in REASONS}, "coloured": colours},
        "found": {**detection, **coloured(images)},
    }


def choice(uri: str, limit: int) -> dict[str, Any]:
    """False alarms and detection of crops at every pair of thresholds; the pair that is chosen."""
    images, _ = loaded(uri, limit)
    plain = {str(number): traits(image) for number, image in enumerate(images)}
    stretched = [kind for kind in DAMAGE if kind.endswith("stretched")]
    rows = []
    for suspects.A_PART, suspects.CLEAR_PART in product(*GRID):
        rows.append({
            "a_part": suspects.A_PART, "clear_part": suspects.CLEAR_PART,
            "suspects": round(sum("cropped" in words for words in reasons(plain).values()) / len(images), 4),
            "found": {kind: round(found(plain, images, kind), 3) for kind in stretched},
        })  # fmt: skip
        LOG.info("%s", rows[-1])
    allowed = [row for row in rows if row["suspects"] <= CHOSEN_FALSE]
    best = max(allowed, key=lambda row: np.mean(list(row["found"].values())), default=None)
    return {"images": len(images), "rows": rows, "chosen": best and [best["a_part"], best["clear_part"]]}


@click.command()
@click.argument("data", nargs=-1)
@click.option("--choose", help="Data set on which the thresholds of `cropped` are chosen.")
@click.option("--limit", default=450, show_default=True, help="Images of a data set.")
@click.option("--out", type=click.Path(path_type=Path), help="Result file (JSON).")
def main(data: tuple[str, ...], choose: str | None, limit: int, out: Path | None) -> None:
    """Measure and write the result."""
    set_up_logging()
    kept = suspects.A_PART, suspects.CLEAR_PART
    choices = choice(choose, limit) if choose else None
    suspects.A_PART, suspects.CLEAR_PART = kept
    result = {
        "what": "suspects of inspect: number among images as they are, and share of the damaged images that are found",
        "thresholds": {"a_part": kept[0], "clear_part": kept[1]},
        **({"choice": choices} if choices else {}),
        "data": [{"name": name, **measured(uri, limit)} for name, uri in (part.split("=", 1) for part in data)],
        "revision": code_revision(),
    }
    publish(result, out)


if __name__ == "__main__":
    main()
