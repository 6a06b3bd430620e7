"""Measure this product on a GPU, in at most nine minutes, on a machine with torch and a few wheels.

    python benchmarks/gpu.py [--model runs/demo/model] [--out benchmarks/results/gpu.json]
    python benchmarks/gpu.py --device cpu --tiny --out /tmp/gpu.json      # the same path with toy networks: no numbers

Six sections in order of importance: ceilings, correctness, networks, images against diffusers' pipeline, a worker,
training. Networks have Stable Diffusion v1.4's size and random weights (sd14_random.yaml); ``--model`` adds a trained
small model, which gives the AUROC of each dtype. A failure (no memory, no compiler) is a row with the reason, skipped
rows are listed, and the result file is complete after every row. Exit code 1: a correctness check failed; 3: something
hung and was ended after the deadline.

Needs torch 2.6 or later, diffusers, transformers, accelerate, pydantic, pyarrow, pandas, scikit-image and their
dependencies; neither Ray nor an S3 client. docs/throughput.md has the command for a machine without internet access.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import click

BEGAN = time.monotonic()  # imports take their part of the deadline
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the package is not installed on a bare machine

SHARES = {  # seconds of each section, of 540; what one leaves over the next ones have
    "setup": 20.0,
    "ceilings": 20.0,
    "correctness": 110.0,
    "networks": 140.0,
    "images": 110.0,
    "worker": 60.0,
    "training": 80.0,
}
BUILD_SECONDS = 60.0  # for the networks, whatever the imports took


def run(
    device: str, tiny: bool, dtype: str | None, model: str | None, seconds: float, only: tuple[str, ...], out: Path,
    command: str,
) -> int:  # fmt: skip
    """Run the sections; return the exit code."""
    import torch
    from gpu_sections import measure
    from gpu_sections.book import Book
    from gpu_sections.subject import Subject

    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("no GPU that this torch can use; --device cpu --tiny shows that the path works")
    shares = {name: share for name, share in SHARES.items() if not only or name in ("setup", *only)}
    # Slow imports must not use up the time to build the networks, without which nothing can be measured.
    shares["setup"] = max(shares["setup"], time.monotonic() - BEGAN + BUILD_SECONDS)
    about = {"command": command, "tiny": tiny, "machine": measure.machine(torch.device(device))}
    out.parent.mkdir(parents=True, exist_ok=True)
    book = Book(out, seconds, shares, about, measure.release, BEGAN)
    book.end_what_hangs()
    with tempfile.TemporaryDirectory(prefix="diffva-gpu-", ignore_cleanup_errors=True) as scratch:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{scratch}/inductor")
        made: list[Subject] = []
        with book.section("setup"):
            book.row(
                "networks are built",
                lambda: made.append(Subject.made(device, dtype, tiny, Path(scratch), model)) or {},
                checked=True,
            )
            if not made:
                book.check("networks are built", False, "not built", "built")
        gc.freeze()  # existing objects stay, so collecting garbage after every row is fast
        if made:
            measure_all(book, made[0], list(shares)[1:])
        gc.unfreeze()
        book.write(finished=True)
    click.echo(book.table())
    click.echo(f"{out}: {book.found['seconds_used']:.0f} s of {seconds:.0f}")
    return 1 if book.failed_checks else 0


def measure_all(book, subject, names: list[str]) -> None:  # type: ignore[no-untyped-def]
    import torch

    bench = None
    for name in names:
        module = importlib.import_module(f"gpu_sections.{name}")
        with book.section(name):
            if name == "networks":
                bench = module.section(book, subject)
            elif name == "images":
                module.section(book, subject, bench)
                bench = None  # its networks would take memory from training
                torch._dynamo.reset()
            else:
                module.section(book, subject)


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="Toy networks and little work, to test the path.")
@click.option("--dtype", default=None, type=click.Choice(["float16", "bfloat16", "float32"]),
              help="Of everything that is timed; by default the recipe's own.")  # fmt: skip
@click.option("--model", default=None, help="A trained small model's folder (the demo's), for AUROC over dtypes.")
@click.option("--seconds", default=540.0, show_default=True, help="Deadline of the whole command.")
@click.option("--only", multiple=True, type=click.Choice(list(SHARES)[1:]), help="Run only these sections; repeatable.")
@click.option("--out", default="benchmarks/results/gpu.json", show_default=True, type=click.Path(path_type=Path))
@click.option("--child", default=None, hidden=True, help="A job for a process of the correctness section.")
def main(
    device: str, tiny: bool, dtype: str | None, model: str | None, seconds: float, only: tuple[str, ...], out: Path,
    child: str | None,
) -> None:  # fmt: skip
    if child is not None:
        from gpu_sections import determinism

        determinism.child(json.loads(child))
        return
    words = [*(["--device cpu"] if device == "cpu" else []), *(["--tiny"] if tiny else [])]
    words += [f"--dtype {dtype}"] if dtype else []
    words += ["--model MODEL"] if model else []
    words += [f"--seconds {seconds:g}", *(f"--only {name}" for name in only)]
    raise SystemExit(run(device, tiny, dtype, model, seconds, only, out, f"python benchmarks/gpu.py {' '.join(words)}"))


if __name__ == "__main__":
    main()
