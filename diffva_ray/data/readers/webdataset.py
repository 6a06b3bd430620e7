"""Reads WebDataset tar archives: ``key.png`` with ``key.json``, ``key.cls`` or ``key.txt``.

Format: https://github.com/webdataset/webdataset and https://huggingface.co/docs/hub/datasets-webdataset
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from diffva_ray.data import manifest
from diffva_ray.data.dataset import Dataset, UnusableData, is_hidden
from diffva_ray.data.images import IMAGE_EXTENSIONS
from diffva_ray.data.listing import Collection, Listing, base
from diffva_ray.data.readers.split_folders import SPLITS
from diffva_ray.data.tables import Line, Table, as_cell
from diffva_ray.progress import one_line

KIND = "webdataset"
LAYOUT = "tar archives of key.png with key.json, key.cls or key.txt (WebDataset)"
ANNOTATIONS = (".json", ".cls", ".txt")
PARTS = {"mask": "mask", "lung_mask": "mask", "seg": "lesion", "lesion": "lesion"}  # second extension -> role
IMAGE = ("image", "img", "input")  # second extensions of the image itself
THREADS = 16


def read(listing: Listing) -> Dataset | None:
    """The images of all archives. The label is in the JSON, else in the ``.cls``, else the folder in the archive, else
    the ``.txt``, which is a caption where there is another label. Tars of folders are left to the other readers."""
    keys: dict[str, dict[str, str]] = {}  # path without extensions -> path by role or extension
    flat = ""
    for entry in listing.entries:
        _, inside, name = entry.path.partition(".tar/")
        if inside and not is_hidden(entry.path):
            _add(keys, entry.path)
            flat = flat or (entry.path if "/" not in name and name.lower().endswith(IMAGE_EXTENSIONS) else "")
    samples = {key: files for key, files in keys.items() if "image" in files}
    if not any(end in files for files in samples.values() for end in ANNOTATIONS):
        if flat:
            raise UnusableData(
                f"{listing.store.uri}: {flat} has no label: neither key.json nor key.cls or key.txt is beside key.png"
            )
        return None
    with ThreadPoolExecutor(THREADS) as pool:
        rows = list(pool.map(lambda item: _row(listing, *item), samples.items()))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    archives = len({path.partition(".tar/")[0] for path in samples})
    name = f"{archives} tar archive{'s' * (archives > 1)}"
    table = Table(columns, [Line(row["path"], {column: row.get(column, "") for column in columns}) for row in rows], [])
    # the path is the image, whatever other columns are called
    config = listing.config.model_copy(update={"columns": {**listing.config.columns, "image": "path"}})
    images = Collection(replace(listing, config=config), KIND, f"{name} with {'|'.join(ANNOTATIONS)} beside images")
    images.skipped |= {path for files in samples.values() for role, path in files.items() if role != "image"}
    manifest.add_rows(images, table, name)
    return images.dataset()


def _add(keys: dict[str, dict[str, str]], path: str) -> None:
    """Adds a file to its sample."""
    stem, _, end = path.rpartition(".")
    end = f".{end.lower()}"
    if end in ANNOTATIONS:
        keys.setdefault(stem, {})[end] = path
    elif end in IMAGE_EXTENSIONS:
        key, _, part = stem.rpartition(".")
        if part.lower() in PARTS:
            keys.setdefault(key, {})[PARTS[part.lower()]] = path
        else:
            keys.setdefault(key if part.lower() in IMAGE else stem, {})["image"] = path


def _row(listing: Listing, key: str, files: Mapping[str, str]) -> dict[str, str]:
    """The cells of a sample."""
    row = _json(listing, files[".json"]) if ".json" in files else {}
    text = {end: _text(listing, files[end]) for end in (".cls", ".txt") if end in files}
    folder = key.rpartition(".tar/")[2].rpartition("/")[0]
    labelled = {"label", listing.config.columns.get("label", "label")} & row.keys()
    usual = {re.sub(r"[\s\-]+", "_", column).casefold() for column in row} & {*manifest.ROLES["label"]}
    if not labelled and not usual:
        row["label"] = text.get(".cls") or base(folder) or text.pop(".txt", "")
    if ".txt" in text:
        row.setdefault("caption", text[".txt"])
    shard = re.split(r"[-_.]", base(key.rpartition(".tar/")[0]).lower())[0]
    if shard in SPLITS:
        row.setdefault("split", SPLITS[shard])
    return {**row, "path": files["image"], **{role: files[role] for role in ("mask", "lesion") if role in files}}


def _json(listing: Listing, path: str) -> dict[str, str]:
    try:
        values = json.loads(listing.store.read(path))
    except ValueError as error:
        raise UnusableData(f"{path}: not JSON ({one_line(error)})") from None
    if not isinstance(values, dict):
        raise UnusableData(f"{path}: not a JSON object")
    return {str(name): as_cell(value) for name, value in values.items()}


def _text(listing: Listing, path: str) -> str:
    return listing.store.read(path).decode("utf-8", "replace").strip()
