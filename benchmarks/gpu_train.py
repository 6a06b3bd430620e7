"""Training of the small model on real images on a bare GPU machine: one file there, a few files back, in legs.

    python benchmarks/gpu_train.py pack --data DATA --side 128 --out runs/pack.zip
    python benchmarks/gpu_train.py train --pack runs/pack.zip --set model.base=MODEL --out leg1  # there
    python benchmarks/gpu_train.py train --pack runs/pack.zip --set model.base=MODEL --from leg1 --out leg2
    python benchmarks/gpu_train.py unpack --from leg2 --to runs/real/model

``train`` is the product's own loop (``diffva_ray.train.loop``), without Ray. A leg ends at the last checkpoint before
its deadline, or with the model; either way its folder ``--out`` holds ``leg.json`` and the state in parts below 16 MiB,
from which the next leg goes on exactly. A pack of 128 px serves ``--set model.resolution=64`` and ``=128``. On a CPU
legs and one uninterrupted training end with the same weights (tests/slow/test_gpu_scripts.py).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the package is not installed on a bare machine

PACK_BYTES = 60 * 10**6
PART_BYTES = 15 * 2**20
STATE_BYTES = 60 * 2**20
PACKING = 15.0  # seconds that a leg needs after its last checkpoint
MANIFEST = "manifest.csv"


class LegEnds(Exception):
    """Raised when the deadline comes before the next checkpoint would."""


@click.group()
def main() -> None:
    """Pack images, train in legs, unpack the model."""


@main.command()
@click.option("--data", required=True, help="A data set of any layout that diffva reads.")
@click.option("--side", default=128, show_default=True, help="Pixels a side of the packed images.")
@click.option("--limit", "limits", multiple=True, metavar="CLASS=N", help="At most N images of a class; repeat.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
def pack(data: str, side: int, limits: tuple[str, ...], out: Path) -> None:
    """Write the images of a data set as one zip of PNGs with a manifest. Keep it out of git: it contains images."""
    from diffva_ray.config.recipe import DataConfig
    from diffva_ray.data.datasets import open_dataset
    from diffva_ray.data.encoding import encode_grey
    from diffva_ray.train.sampling import ImageSet

    most = {label: int(count) for label, _, count in (limit.rpartition("=") for limit in limits)}
    images = ImageSet(open_dataset(data, DataConfig()), side, 2**20)
    taken, lines = Counter[str](), ["path,label,caption"]
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for n in sorted(range(len(images.images)), key=lambda n: order(images.images[n].path)):
            image = images.images[n]
            if taken[image.label] >= most.get(image.label, len(images.images)):
                continue
            taken[image.label] += 1
            name = f"{image.label}/{sum(taken.values()):06d}.png"
            archive.writestr(zipfile.ZipInfo(name), encode_grey(images.pixels(n)))
            lines.append(",".join(quoted(text) for text in (name, image.label, image.caption)))
        archive.writestr(zipfile.ZipInfo(MANIFEST), "\n".join([*lines, ""]))
    size = out.stat().st_size
    counts = ", ".join(f"{label} {count}" for label, count in sorted(taken.items()))
    click.echo(
        f"{out}: {size / 1e6:.1f} MB, {sum(taken.values())} images ({counts}), {len(images.unreadable)} unreadable"
    )
    if size > PACK_BYTES:
        raise click.ClickException(f"more than {PACK_BYTES / 1e6:.0f} MB; give --limit CLASS=N or a smaller --side")


def order(path: str) -> str:
    """Return the images in a fixed shuffled order, so that a limit does not prefer one folder."""
    return hashlib.sha256(path.encode()).hexdigest()


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


@main.command()
@click.option("--pack", "packed", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--recipe", "name", default="small", show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE")
@click.option("--from", "before", default=None, type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="The folder of the leg before.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder of this leg, new or empty.")
@click.option("--seconds", default=540.0, show_default=True)
@click.option("--threads", default=None, type=int, help="PyTorch's on a CPU; all cores by default.")
def train(
    packed: Path, name: str, overrides: tuple[str, ...], before: Path | None, out: Path, seconds: float,
    threads: int | None,
) -> None:  # fmt: skip
    """Train until the deadline or the end, and write the state for the next leg."""
    began = time.monotonic()
    from diffva_ray.config.recipe import RecipeError, load_recipe
    from diffva_ray.progress import set_up_logging

    set_up_logging()
    try:
        recipe = load_recipe(name, overrides)
    except RecipeError as error:
        raise click.ClickException(str(error)) from None
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise click.ClickException(f"--out {out}: holds files already; a leg has a folder of its own")
    with tempfile.TemporaryDirectory(prefix="diffva-train-", ignore_cleanup_errors=True) as scratch:
        about = leg(recipe, packed, Path(scratch), before, out, began + seconds, threads or cores())
    about |= {"command": command_of(name, overrides, seconds), "seconds": round(time.monotonic() - began, 1)}
    (out / "leg.json").write_text(json.dumps(about, indent=1) + "\n")
    click.echo("the model is trained" if about["finished"] else f"stopped; go on with --from {out}")


def leg(recipe: Any, packed: Path, scratch: Path, before: Path | None, out: Path, ends: float, threads: int) -> Any:
    """Run one leg; return the content of ``leg.json``."""
    import torch
    from gpu_sections.measure import machine

    from diffva_ray.config.recipe import fingerprint
    from diffva_ray.model.card import PROGRESS, read_card
    from diffva_ray.provenance import provenance
    from diffva_ray.storage.local import LocalStore
    from diffva_ray.train.checkpoint import Checkpoints
    from diffva_ray.train.loop import train as product_train
    from diffva_ray.train.progress import followed
    from diffva_ray.train.validation import validation_of

    check_state_size(recipe)
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    sections = recipe.model_dump(mode="json", include={"seed", "data", "model", "train"})
    sections["model"].pop("base")  # its path may be another one; what it holds is in the first leg's checkpoint
    mark = fingerprint({**sections, "pack": digest})
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(scratch / "images")
    model = scratch / "model"
    legs = 1
    if before is not None:
        said = json.loads((before / "leg.json").read_text())
        if said["finished"]:
            raise click.ClickException(f"--from {before}: that leg has ended the training; unpack it")
        if said["fingerprint"] != mark:
            raise click.ClickException(f"--from {before}: a training of another recipe, seed or pack")
        extract(before, model)
        legs = said["leg"] + 1
    keep, store = Checkpoints(model / ".train", 1), LocalStore(str(model))
    resumed = keep.latest()
    finished = True
    try:
        with followed(store):
            product_train(
                recipe, str(scratch / "images" / MANIFEST), str(model), fingerprint=mark, provenance=provenance(),
                report=Until(keep, ends), resume=resumed, threads=threads, validate=validation_of(recipe),
            )  # fmt: skip
    except LegEnds:
        finished = False
    newest, progress = keep.latest(), model / PROGRESS  # which is written when the first loss is
    wanted = [path for path in sorted(model.iterdir()) if path.name != ".train"] if finished else [newest]
    wanted += [progress] if progress.exists() else []
    parts = write_parts(archived(model, wanted), out)
    card = read_card(store) if finished else None
    history = json.loads(progress.read_text())["history"] if progress.exists() else []
    return {
        "leg": legs,
        "finished": finished,
        "fingerprint": mark,
        "pack_sha256": digest,
        "resumed_from": None if resumed is None else resumed.name,
        "reached": None if newest is None else newest.name,
        "model_digest": None if card is None else card["digest"],
        "parts": parts,
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "history": history,
    }


class Until:
    """A ``report`` callback that keeps a checkpoint, and ends the leg when the next one would be too late."""

    def __init__(self, keep: Any, ends: float) -> None:
        self.keep, self.ends, self.last, self.longest = keep, ends, time.monotonic(), 0.0

    def __call__(self, metrics: dict[str, float], checkpoint: Path | None) -> None:
        self.keep(metrics, checkpoint)
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last), now
        if now + 1.3 * self.longest + PACKING > self.ends:
            raise LegEnds


def check_state_size(recipe: Any) -> None:
    """Refuse a model whose state (weights, two moments and an average) is too large, before a leg is spent on it."""
    from diffva_ray.model.bundle import build

    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in build(recipe).modules.items()}
    denoiser, vae = sizes["unet"] + sizes["text_encoder"], sizes["vae"]
    needed = 4 * (denoiser + vae) + 12 * max(denoiser, vae)
    if needed > STATE_BYTES:
        raise click.ClickException(
            f"a checkpoint would have {needed / 2**20:.0f} MiB; at most {STATE_BYTES / 2**20:.0f} come back"
        )


def archived(folder: Path, wanted: list[Path]) -> bytes:
    """Return files and folders below ``folder`` as an uncompressed tar, because weights do not compress."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for path in wanted:
            archive.add(path, path.relative_to(folder).as_posix())
    return sink.getvalue()


def write_parts(data: bytes, out: Path) -> list[dict[str, Any]]:
    """Write the bytes in files of at most PART_BYTES."""
    parts = []
    for n, at in enumerate(range(0, len(data), PART_BYTES)):
        part = data[at : at + PART_BYTES]
        (out / f"state-{n:02d}.part").write_bytes(part)
        parts.append({"file": f"state-{n:02d}.part", "bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()})
    return parts


def read_parts(folder: Path) -> Iterator[bytes]:
    """Read the parts that ``leg.json`` names. Raises ClickException for a missing or damaged part."""
    for part in json.loads((folder / "leg.json").read_text())["parts"]:
        file = folder / part["file"]
        data = file.read_bytes() if file.exists() else b""
        if hashlib.sha256(data).hexdigest() != part["sha256"]:
            raise click.ClickException(f"{file}: missing or damaged")
        yield data


def extract(folder: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(b"".join(read_parts(folder)))) as archive:
        archive.extractall(target, filter="data")


@main.command()
@click.option("--from", "folder", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--to", "target", required=True, type=click.Path(path_type=Path))
def unpack(folder: Path, target: Path) -> None:
    """Extract the model folder from the leg that finished the training."""
    about = json.loads((folder / "leg.json").read_text())
    if not about["finished"]:
        raise click.ClickException(f"--from {folder}: the training has not ended; go on with train --from {folder}")
    if target.exists():
        raise click.ClickException(f"--to {target}: is there already")
    beside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    extract(folder, beside)
    beside.replace(target)
    click.echo(f"{target}: model {about['model_digest'][:12]}")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command_of(name: str, overrides: tuple[str, ...], seconds: float) -> str:
    shown = [text.partition("=")[0] + "=MODEL" if text.startswith("model.base=") else text for text in overrides]
    words = [f"--recipe {name}", *(f"--set {text}" for text in shown), f"--seconds {seconds:g}"]
    return f"python benchmarks/gpu_train.py train --pack PACK {' '.join(words)}"


if __name__ == "__main__":
    main()
