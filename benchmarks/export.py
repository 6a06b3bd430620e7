"""Measure time and memory of ``diffva export``: of its own work on all records, and of writing files of images.

    python benchmarks/export.py --records 10000,100000,1000000 --files 2000,20000 --run runs/demo/run

Records are those of ``planning.py``: synthetic, in real Parquet parts. The images do not exist: the store ``Pretended``
has the same PNG files at the path of every image, so that each is read, decoded, compared with its digest and written.
``driver`` is the work of the command itself: it verifies the run, chooses records and splits, and writes card, lineage
and metadata; the files are left out. ``files`` is a whole export to Hugging Face in one process. Every
measurement is a separate process, whose peak of memory is stated. ``run`` is a whole export of a real run from disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import planning
import pyarrow.parquet as pq


def pretended_images(size: int) -> tuple[dict[str, bytes], dict[str, str]]:
    """The PNG files by the first part of their path, and the columns of the records that hold their digests."""
    from diffva_ray.data.encoding import encode_grey, encode_map, encode_mask, map_levels, pixel_digest

    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:size, 0:size] / size
    grey = (200 * np.sqrt(rows * columns) + random.integers(0, 20, (size, size))).astype(np.uint8)
    signed = (np.exp(-40 * ((rows - 0.4) ** 2 + (columns - 0.6) ** 2)) / 2).astype(np.float32)
    grey_file, map_file = encode_grey(grey), encode_map(signed)
    files = {"counterfactuals": grey_file, "reconstructions": grey_file, "attributions": map_file}
    files |= dict.fromkeys(planning.CLASSES, grey_file) | {"masks": encode_mask(signed > 0.1)}
    digests = {f"{kind}_sha256": pixel_digest(grey) for kind in ("counterfactual", "reconstruction")}
    digests |= {
        "attribution_sha256": pixel_digest(map_levels(signed)),
        "image_sha256": hashlib.sha256(grey_file).hexdigest(),
    }
    return files, digests


def prepared(folder: str, records: int) -> dict[str, Any]:
    """Write plan and parts of a reduced run. Not measured."""
    from diffva_ray.evaluate.reduction import parts_digest
    from diffva_ray.generate.run import SUCCESS

    planning.plan(folder, records)
    run = planning.opened(folder)
    images, digests = pretended_images(run.recipe.model.resolution)
    planning.FILLED |= digests
    for label in planning.CLASSES:  # of the data set only these are there, for readers of data sets to recognise it
        (Path(folder) / "data" / label / "images").mkdir(parents=True)
        (Path(folder) / "data" / label / "images" / f"{label}.png").write_bytes(images[label])
    about = json.loads((Path(folder) / "run.json").read_text())
    about |= {"data": f"{folder}/data", "data_root": f"{folder}/data", "started": "2026-01-01T00:00:00"}
    (Path(folder) / "run.json").write_text(json.dumps(about))
    (Path(folder) / "records").mkdir()
    planning.write_parts(folder, records)
    run.store.put(SUCCESS, json.dumps({"parts": parts_digest(run)}).encode())
    return {}


def pretend(folder: str) -> Any:
    """Open the run of ``folder`` where every image is there."""
    from diffva_ray.generate.run import FOLDERS, find_run, part
    from diffva_ray.storage import opening
    from diffva_ray.storage.local import LocalStore
    from diffva_ray.storage.store import Entry

    run = planning.opened(folder)
    shards, (files, _) = run.shards, pretended_images(run.recipe.model.resolution)

    class Pretended(LocalStore):
        """A folder that has every image that its records name."""

        def list(self, prefix: str = "") -> list[Entry]:
            kind, _, name = prefix.partition("/")
            if prefix == "features":
                return [Entry(f"features/{part(shard)}.npz", 70_000) for shard in range(shards)]
            if kind not in FOLDERS or not name:
                return super().list(prefix)
            table = pq.ParquetFile(f"{folder}/records/{Path(name).stem}.parquet")
            ids = table.read(["record_id"]).column(0).to_pylist()
            return [Entry(f"{prefix}/{record}.png", len(files[kind])) for record in ids]

        def exists(self, path: str) -> bool:
            return path.endswith(".png") or super().exists(path)

        def read(self, path: str, unmodified_since: float | None = None) -> bytes:
            if not path.endswith(".png"):
                return super().read(path, unmodified_since)
            return files["masks" if "/masks/" in path else path.partition("/")[0]]

    opening.STORES[""] = Pretended
    return find_run(Pretended(folder))


def driver(folder: str, records: int) -> dict[str, Any]:
    """Measure the command's own work; the files of records are left out."""
    from diffva_ray.export.exporting import ExportOptions, export_run
    from diffva_ray.export.writing import LocalWriter, Work

    numbers: list[int] = []

    class Nothing(LocalWriter):
        def write(self, work: Work, pending: Sequence[int]) -> list[list[str]]:
            numbers.extend(pending)
            return []

    run = pretend(folder)
    began = time.perf_counter()
    exported = export_run(run, f"{folder}/export", ExportOptions(format="huggingface"), Nothing())
    assert exported.counts.accepted == records
    return {"seconds": time.perf_counter() - began, "files": len(exported.counts.files)}


def files(folder: str, records: int) -> dict[str, Any]:
    """Measure a whole export in this process."""
    from diffva_ray.export.exporting import ExportOptions, export_run

    run = pretend(folder)
    began = time.perf_counter()
    exported = export_run(run, f"{folder}/export", ExportOptions(format="huggingface"))
    seconds = time.perf_counter() - began
    assert exported.counts.accepted == records
    written = list(Path(folder, "export", "data").iterdir())
    size = sum(file.stat().st_size for file in written) / 1e6
    return {"seconds": seconds, "records_per_second": records / seconds, "files": len(written), "megabytes": size}


STEPS = {"prepared": prepared, "driver": driver, "files": files}


def measured(step: str, folder: str, records: int) -> dict[str, Any]:
    """Run one step in its own process."""
    command = [sys.executable, __file__, "--one", step, folder, str(records)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def real(run: str) -> dict[str, Any]:
    """Export a run from disk to every format."""
    found: dict[str, Any] = {}
    for kind in ("huggingface", "webdataset", "coco", "dicom"):
        with tempfile.TemporaryDirectory(prefix="diffva-export-") as folder:
            command = [sys.executable, "-m", "diffva_ray", "export", run, "--to", kind, "--out", f"{folder}/out"]
            began = time.perf_counter()
            subprocess.run([*command, "--executor", "inline"], check=True, capture_output=True)
            found[kind] = round(time.perf_counter() - began, 1)
    return found


@click.command()
@click.option(
    "--records", default="10000,100000,1000000", show_default=True, help="Sizes at which the driver is measured."
)
@click.option("--files", "sizes", default="2000,20000", show_default=True, help="Sizes of whole exports.")
@click.option("--run", help="A reduced run, exported to every format.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "export.json")
@click.option("--one", nargs=3, hidden=True)
def main(records: str, sizes: str, run: str | None, out: Path, one: tuple[str, str, str] | None) -> None:
    if one:
        found = STEPS[one[0]](one[1], int(one[2]))
        found["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({key: round(value, 3) for key, value in found.items()}))
        return
    from diffva_ray.provenance import code_revision, version

    curve = []
    for step, counts in (("files", sizes), ("driver", records)):
        for count in map(int, counts.split(",")):
            with tempfile.TemporaryDirectory(prefix="diffva-export-") as folder:
                measured("prepared", folder, count)
                curve.append({"step": step, "records": count, **measured(step, folder, count)})
            click.echo(json.dumps(curve[-1]))
    result = {
        "command": f"python benchmarks/export.py --records {records} --files {sizes}" + (" --run RUN" if run else ""),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "versions": {name: version(name) for name in ("pyarrow", "numpy", "pillow")},
        "code": code_revision(),
        "curve": curve,
        "run_seconds": real(run) if run else None,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
