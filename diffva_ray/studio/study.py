"""A reader study of a run: a blinded sheet of images, and the key that says what each of them is.

::

    sheet/      what readers get: study.json, and for each item its image and the region that the run marks in it
    key.csv     what each item is; kept by whoever leads the study
    tables/     the results (``readers.py``)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.encoding import encode_grey, encode_mask, quantise
from diffva_ray.evaluate.records import as_records, finished, read_images, read_records
from diffva_ray.evaluate.tables import csv
from diffva_ray.generate.run import Run
from diffva_ray.schema import Record, digest
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store, join

KINDS = ("real", "counterfactual", "reconstruction")
SHEET, KEY = "study.json", "key.csv"
QUESTIONS = {  # column of the answers: what the reader is asked
    "finding": "Is there an abnormal finding?",
    "realistic": "Does it look like a real chest X-ray?",
    "region": "Is the marked region where the finding is?",
}
ANSWERS = ("study", "reader", "item", *QUESTIONS, "seconds")  # columns of the readers' CSV
REGION = 0.05  # |M| from which the region is marked, where the run has no threshold of its own
REPEATED = 0.2  # share of the items that show an earlier image again


def write_study(run: Run, out: str, items: int = 60, seed: int = 0) -> dict[str, int]:
    """Write a study of ``items`` items and its key to the folder ``out``; returns how many items there are of each
    kind, and how many are repeated.

    Every image of the run is used once, as one of KINDS, so that nobody compares two versions of an image; a fifth of
    the items show an image of the first half again. Labels are spread evenly over the kinds. Raises UnusableData for a
    run with too few images, and for a folder that holds a study already."""
    store = open_store(out)
    if store.exists(KEY):
        raise UnusableData(f"--out {out}: holds a study already; name another folder")
    frame = finished(read_records(run)).drop_duplicates("image_path")
    repeated = int(items * REPEATED)
    distinct = items - repeated
    if len(frame) < distinct:
        raise UnusableData(
            f"--images {items}: needs {distinct} images, {repeated} of which are shown twice, and {run.store.uri} has "
            f"{len(frame)} without error; give a smaller number"
        )
    # Choose the images, deal the kinds label by label, and shuffle again.
    random = np.random.default_rng(seed)
    chosen = frame.iloc[random.permutation(len(frame))[:distinct]].sort_values("label", kind="stable")
    dealt = [(record, KINDS[n % len(KINDS)]) for n, record in enumerate(as_records(chosen))]
    first = [dealt[n] for n in random.permutation(distinct)]
    half = (distinct + 1) // 2
    later = [*first[half:], *(first[n] for n in random.choice(half, repeated, replace=False))]
    shown = [*first[:half], *(later[n] for n in random.permutation(len(later)))]

    # Write image and region of each item under its number alone.
    study = digest([run.fingerprint, items, seed])[:12]
    threshold, rows = _threshold(run), list[dict[str, Any]]()
    for number, (record, kind) in enumerate(shown, 1):
        image, region = _pixels(run, record, kind, threshold)
        store.put(f"sheet/{number:03d}.png", image)
        store.put(f"sheet/{number:03d}.region.png", region)
        rows.append({"item": number, "kind": kind, **_origin(record, kind)})
    sheet = {"study": study, "items": items, "questions": QUESTIONS}
    store.put(f"sheet/{SHEET}", json.dumps(sheet, indent=1).encode())
    store.put(KEY, csv(pd.DataFrame([{"study": study, **row} for row in rows])).encode())
    return {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS} | {"repeated": repeated}


def _threshold(run: Run) -> float:
    """The best threshold of |M| in the run's tables, or REGION without one."""
    try:
        return float(json.loads(run.store.read("tables/thresholds.json"))["absolute"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return REGION


def _pixels(run: Run, record: Record, kind: str, threshold: float) -> tuple[bytes, bytes]:
    """The image of an item and its region as PNG files, which tell nothing but their pixels."""
    images = read_images(run, record)
    pixels = {"real": images.image, "counterfactual": images.counterfactual, "reconstruction": images.reconstruction}
    return encode_grey(quantise(pixels[kind])), encode_mask(np.abs(images.signed_map) > threshold)


def _origin(record: Record, kind: str) -> dict[str, Any]:
    """What the key says of an item besides its kind; the judge has judged image and counterfactual."""
    judged = {"real": record["judge_image"], "counterfactual": record["judge_counterfactual"]}.get(kind)
    names = ("record_id", "image_path", "label", "patient", "prompt")
    return {**{name: record[name] for name in names}, "judge_healthy": judged}  # type: ignore[literal-required]


@dataclass(frozen=True)
class Sheet:
    """The blinded part of a study, as a reader sees it. ``open_sheet`` opens one."""

    store: Store
    study: str  # id, which every answer repeats
    items: int

    def image(self, item: int, kind: str = "") -> bytes:
        """PNG of an item (from 1), or of its region for ``.region``."""
        return self.store.read(f"{item:03d}{kind}.png")

    def next_item(self, reader: str) -> int:
        """The first item that the reader has not answered; ``items`` + 1 at the end."""
        return len(self._lines(reader)) + 1

    def answer(self, reader: str, item: int, answers: dict[str, str], seconds: float) -> None:
        """Add a reader's answers to ``answers-READER.csv``, whose rows are in the order of the items. Answers to
        another item than the next are ignored: a page that was open twice."""
        lines = self._lines(reader)
        if item == len(lines) + 1:
            row = [self.study, reader, str(item), *(answers[name] for name in QUESTIONS), f"{seconds:.1f}"]
            text = "\n".join([",".join(ANSWERS), *lines, ",".join(row)]) + "\n"
            self.store.put(f"answers-{reader}.csv", text.encode())

    def _lines(self, reader: str) -> list[str]:
        try:
            return self.store.read(f"answers-{reader}.csv").decode().splitlines()[1:]
        except FileNotFoundError:
            return []


def open_sheet(uri: str) -> Sheet:
    """Open the sheet of a study. Raises UnusableData."""
    store = open_store(uri)
    try:
        about = json.loads(store.read(SHEET))
        return Sheet(store, about["study"], int(about["items"]))
    except FileNotFoundError:
        raise UnusableData(f"--study {uri}: no {SHEET} there; name the folder sheet/ of a diffva study") from None
    except (ValueError, KeyError, TypeError):
        raise UnusableData(f"{join(uri, SHEET)}: damaged; write the study again") from None
