"""Random fault histories: a run with repeated failures, torn files and kills ends like an undisturbed one.

    make chaos                                       # 1,000 inline and 50 on a Ray cluster; writes the result file
    python tests/chaos/histories.py --inline 50      # fewer
    python tests/chaos/histories.py --first 417      # repeat one of them

An inline history is a sequence of lives (processes, simulated one after the other in this process): plan, generate and
reduce on a ``FaultyStore``, until a life reaches the end. The result is compared with an undisturbed run: every column
of every record, all images and attribution maps, features and tables; and ``diffva verify`` runs.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
from faults import Faults, FaultyStore, Stopped

from diffva_ray.config.recipe import Recipe, load_recipe
from diffva_ray.data.phantoms import phantom_set
from diffva_ray.evaluate.records import read_records
from diffva_ray.evaluate.reduction import Options, reduce_run
from diffva_ray.generate import processes, worker
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import FOLDERS, Run, find_run
from diffva_ray.generate.verification import verify
from diffva_ray.provenance import code_revision
from diffva_ray.storage import opening
from diffva_ray.storage import store as storage
from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.store import StoreError
from diffva_ray.train.checkpoint import discard
from diffva_ray.train.loop import train
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run

SIZES = (
    "name=chaos", "model.resolution=16", "model.vae.block_out_channels=[4, 4, 8]", "model.vae.norm_num_groups=4",
    "model.unet.block_out_channels=[8, 16]", "model.unet.sample_size=4", "model.unet.norm_num_groups=8",
    "generate.method=sdedit", "generate.source_prompt=''", "generate.negative_prompt=''", "generate.strength=1.0",
    "generate.num_inference_steps=2", "generate.min_side=16", "generate.micro_batch=2", "generate.shard_size=3",
    "train.stages.0.steps=2", "train.stages.0.batch_size=4", "train.stages.1.steps=2", "train.stages.1.batch_size=4",
    "train.stages.2.steps=1", "train.stages.2.batch_size=4", "evaluate.max_quarantined_fraction=0.5",
)  # fmt: skip
IMAGES, SHARDS = 12, 3  # nine abnormal images, three to a shard


class Bench:
    """Images, a model and an undisturbed run, with which histories are compared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe: Recipe = load_recipe("phantom", SIZES)
        self.data, self.model = str(folder / "images"), str(folder / "model")
        for _ in phantom_set(LocalStore(self.data), IMAGES, 16, seed=5):
            pass
        broken = sorted((folder / "images" / "COVID" / "images").iterdir())[0]
        broken.write_bytes(broken.read_bytes()[:100])  # one record that ends quarantined
        train(
            self.recipe,
            self.data,
            self.model,
            fingerprint="chaos",
            provenance={"data_kind": "phantoms"},
            report=discard,
            threads=1,
        )
        self.loaded = worker.load(self.model, self.recipe)
        started = time.monotonic()
        self.live(self.folder / "undisturbed")
        self.seconds = time.monotonic() - started
        self.expected = self.outcome(self.folder / "undisturbed")

    def live(self, out: Path) -> None:
        """One life: plan or continue, generate, reduce. The model is loaded once for all lives."""
        with patch.object(worker, "load", lambda model, recipe=None: self.loaded):
            execution = Execution(executor="inline")
            generate_run(self.recipe, self.data, self.model, str(out), Request(), execution)
        run = find_run(opening.open_store(str(out)))
        assert run is not None
        reduce_run(run, self.data, Options())

    @staticmethod
    def outcome(out: Path) -> dict[str, Any]:
        """Return a finished run's records, files (images and features) and tables."""
        run = find_run(LocalStore(str(out)))
        assert run is not None
        files = {path: run.store.read(path) for kind in (*FOLDERS, "features") for path, _ in run.store.list(kind)}
        return {
            "records": read_records(run),
            "files": files,
            "tables": json.loads(run.store.read("tables/metrics.json")),
            "quarantine": run.store.read("quarantine.parquet"),
        }

    def differences(self, out: Path) -> list[str]:
        """Return what differs from the undisturbed run."""
        found, expected = self.outcome(out), self.expected
        differing = []
        if not found["records"].equals(expected["records"]):
            differing.append("records")
        differing += [key for key in ("files", "tables", "quarantine") if found[key] != expected[key]]
        run = find_run(LocalStore(str(out)))
        assert isinstance(run, Run)
        differing += [problem.what for problem in verify(run)]
        if not run.store.exists("_SUCCESS"):
            differing.append("no _SUCCESS")
        return differing

    def history(self, seed: int) -> tuple[Counter[str], list[str], float]:
        """Run one inline history; return fault counts, differences (normally none) and seconds."""
        out = self.folder / f"history-{seed}"
        shutil.rmtree(out, ignore_errors=True)
        faults = Faults(seed)
        started = time.monotonic()
        before, pauses, identity = opening.STORES[""], storage.PAUSES, processes.this_process
        opening.STORES[""] = lambda uri: (
            FaultyStore(uri, faults) if uri.startswith(str(out)) or uri == self.data else before(uri)
        )
        storage.PAUSES = (0.0, 0.0)
        try:
            while True:
                faults.begin()
                processes.this_process = faults.process
                faults.counts["lives"] += 1
                try:
                    self.live(out)
                    break
                except Stopped:
                    pass
                except StoreError:
                    faults.counts["lives ended by the store"] += 1
        finally:
            opening.STORES[""], storage.PAUSES, processes.this_process = before, pauses, identity
        seconds = time.monotonic() - started
        differing = self.differences(out)
        if not differing:
            shutil.rmtree(out)
        return faults.counts, differing, seconds


def together(inline: int, first: int, processes: int, out: Path | None) -> int:
    """Share inline histories among ``processes``, and write the sums of their results. Returns the exit code."""
    shares = [range(first + inline * n // processes, first + inline * (n + 1) // processes) for n in range(processes)]
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder) / f"{share.start}.json" for share in shares]
        running = [
            subprocess.Popen(
                [sys.executable, __file__, f"--inline={len(share)}", f"--first={share.start}", f"--out={part}"]
            )
            for share, part in zip(shares, parts)
        ]
        codes = [process.wait() for process in running]
        results = [json.loads(part.read_text()) for part in parts]
    total = Counter[str]()
    for result in results:
        total.update(result["inline"])
    total["time over undisturbed"] = round(total["time over undisturbed"] / processes, 2)
    result = {**results[0], "processes": processes, "inline": dict(total)}
    click.echo(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
    return max(codes)


@click.command()
@click.option("--inline", default=0, help="Histories in this process.")
@click.option("--drivers", default=0, help="Histories of two or three drivers at once, in this process.")
@click.option("--cluster", default=0, help="Histories on a Ray cluster of several nodes.")
@click.option("--first", default=0, help="Seed of the first one.")
@click.option("--processes", default=1, help="Processes at once, each with a share of the inline histories.")
@click.option("--out", type=click.Path(path_type=Path), help="Result file (JSON).")
def main(inline: int, drivers: int, cluster: int, first: int, processes: int, out: Path | None) -> None:
    """Run histories; exit 1 and name the seeds when one of them differs."""
    if processes > 1:
        sys.exit(together(inline, first, processes, out))
    bench = Bench(Path(tempfile.mkdtemp(prefix="diffva-chaos-")))
    result: dict[str, Any] = {
        "code": code_revision(), "machine": f"{platform.machine()}, {os.cpu_count()} cores", "first_seed": first,
    }  # fmt: skip
    failed: list[str] = []
    for name, count in (("inline", inline), ("drivers", drivers), ("cluster", cluster)):
        if not count:
            continue
        total, seconds = Counter[str](), 0.0
        if name == "cluster":
            from cluster import ClusterBench

            runner: Any = ClusterBench(bench)
        elif name == "drivers":
            from drivers import CrowdBench

            runner = CrowdBench(bench)
        else:
            runner = bench
        for seed in range(first, first + count):
            counts, differing, took = runner.history(seed)
            total += counts
            seconds += took
            if differing:
                failed.append(f"{name} seed {seed}: {'; '.join(differing[:3])}")
                click.echo(failed[-1])
            elif (seed - first) % 50 == 49 or name == "cluster":
                click.echo(
                    f"{name}: {seed - first + 1} of {count}, {seconds / (seed - first + 1):.2f} s each, {dict(total)}"
                )
        undisturbed = runner.seconds * count
        if (attempts := total.pop("attempts", 0)) and name == "inline":
            total["shards redone"] = attempts - SHARDS * count
        result[name] = {
            "histories": count, "differing": sum(line.startswith(name) for line in failed), **total,
            "seconds": round(seconds, 1),
            "time over undisturbed": round(seconds / undisturbed, 2),
        }  # fmt: skip
        if name == "cluster":
            runner.close()
    click.echo(json.dumps(result, indent=1))
    if out:
        before = json.loads(out.read_text()) if out.exists() else {}
        same = before.get("code") == result["code"]  # else of other code: parts of one revision stand in one file
        out.write_text(json.dumps({**before, **result} if same else result, indent=1) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
