"""Measure images per second by file format, of this revision and of an earlier one.

    git worktree add /tmp/before REVISION
    python benchmarks/decode.py --before /tmp/before --out benchmarks/results/decode.json

Phantoms of 1024 pixels are decoded and resized to 512 by one thread, as generation does. Turns of the two revisions
alternate; every turn is a process, and the best turn counts, so that other work on the machine disturbs both alike.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIDE, SIZE, SECONDS = 1024, 512, 1.0
# glibc gives memory back and fetches it again (2000 page faults an image, 4 ms), or not, by the order of the formats
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "2000000000"}


def files() -> dict[str, bytes]:
    """One file of each format, with the same content."""
    sys.path.insert(0, str(ROOT / "tests"))
    from dicom_files import dicom

    from diffva_ray.data.phantoms import phantom

    grey = phantom("COVID", 0, 0, SIDE).image.astype(np.float64)
    eight, twelve, sixteen = (np.round(grey * (2**bits - 1)).astype(np.uint16) for bits in (8, 12, 16))
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    return {
        "PNG 8-bit": saved(eight.astype(np.uint8), "PNG"),
        "PNG 16-bit": saved(sixteen, "PNG"),
        "JPEG": saved(eight.astype(np.uint8), "JPEG", quality=95),
        "TIFF 16-bit": saved(sixteen, "TIFF"),
        "DICOM": dicom(twelve),
        "DICOM with window": dicom(twelve, **window),
        "DICOM with window and padding": dicom(twelve, **window, PixelPaddingValue=0),
    }


def saved(values: np.ndarray, kind: str, **options: Any) -> bytes:
    """An image file of the values."""
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, kind, **options)
    return buffer.getvalue()


def measure(folder: Path) -> dict[str, float]:
    """Images per second of the installed revision, by file of the folder."""
    from diffva_ray.data.images import decode_square

    rates = {}
    files = sorted(folder.iterdir())
    for file in files:  # the first images of a process are slower, until its memory has grown
        decode_square(file.read_bytes(), SIZE)
    for file in files:
        data = file.read_bytes()
        decode_square(data, SIZE)
        count, began = 0, time.process_time()
        while time.process_time() - began < SECONDS:
            decode_square(data, SIZE)
            count += 1
        rates[file.name] = count / (time.process_time() - began)
    return rates


def revision(checkout: Path) -> str:
    """The commit of a checkout."""
    return subprocess.run(
        ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip


@click.command()
@click.option("--before", type=click.Path(exists=True, path_type=Path), help="Checkout of the earlier revision.")
@click.option("--turns", default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Result file (JSON).")
@click.option("--measure", "folder", type=click.Path(path_type=Path), hidden=True)
def main(before: Path | None, turns: int, out: Path | None, folder: Path | None) -> None:
    """Measure both revisions in turns and write the best rates."""
    if folder is not None:
        click.echo(json.dumps(measure(folder)))
        return
    checkouts = {"after": ROOT, **({"before": before.resolve()} if before else {})}
    best: dict[str, dict[str, float]] = {name: {} for name in checkouts}
    with tempfile.TemporaryDirectory() as place:
        for name, data in files().items():
            (Path(place) / name).write_bytes(data)
        for _ in range(turns):
            for name, checkout in checkouts.items():
                environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", **KEPT_MEMORY}
                command = [sys.executable, str(Path(__file__)), "--measure", place]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                for kind, rate in json.loads(done.stdout).items():
                    best[name][kind] = max(rate, best[name].get(kind, 0.0))
    result = {
        "what": f"images per CPU second, {SIDE} to {SIZE} pixels, one thread; best of {turns} turns",
        "machine": {"processor": processor(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "revisions": {name: revision(checkout) for name, checkout in checkouts.items()},
        "images_per_second": {
            kind: {name: round(rates[kind], 1) for name, rates in best.items()} for kind in best["after"]
        },
    }
    from diffva_ray.provenance import publish  # here, because the measured revisions may lack it

    publish(result, out)


def processor() -> str:
    """Name of the processor, on Linux from /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
