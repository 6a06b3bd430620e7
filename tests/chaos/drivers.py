"""Histories of two or three drivers that work on one run at once, with equal or different settings.

A driver is paused at a step of its store while another one lives through its own faults; then the first one goes on.
Each driver is a process for the others: a real child process has its number and start time, and is killed when the
driver is. Besides, a driver may have another CPU (its pixels are brighter), the data's mount is lost, or an image is
replaced by one of equal size, until the driver ends, and the run is retried after its broken image is mended.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
from faults import Faults, FaultyStore, Stopped

from diffva_ray import provenance
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.dataset import UnusableData
from diffva_ray.evaluate.records import read_records
from diffva_ray.evaluate.reduction import Incomplete, Options, reduce_run
from diffva_ray.generate import committed, processes, worker
from diffva_ray.generate.committed import PATHS, overlays
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import FingerprintDiffers, PlanError, Run, find_run, open_run, part
from diffva_ray.generate.shard_files import stored_features_path
from diffva_ray.generate.verification import verify
from diffva_ray.storage import opening
from diffva_ray.storage import store as storage
from diffva_ray.storage.store import StoreError
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run, retry_run

BRIGHTER = 0.02  # of the counterfactuals of the other CPU
OF_PLACE = (*PATHS, "device")  # columns that may differ from those of the undisturbed run
ENDINGS = (StoreError, FingerprintDiffers, PlanError, UnusableData, Incomplete)


@dataclass
class Driver(Faults):
    """One driver: its faults, settings and CPU. ``crowd`` runs another driver while this one is paused."""

    seed_of_run: int = 0
    other_cpu: bool = False
    allowed: bool = True  # --allow-environment-change
    pauses: int = 2
    crowd: Any = None
    child: subprocess.Popen[bytes] | None = None  # has the identity of the driver's process
    gate: Any = field(default_factory=threading.RLock)

    def begin(self) -> None:
        super().begin()
        self.child = subprocess.Popen(["sleep", "3600"])

    def end(self) -> None:
        assert self.child is not None
        self.child.kill()
        self.child.wait()

    def process(self) -> dict[str, Any]:
        assert self.child is not None
        return {**IDENTITY(), "pid": self.child.pid, "started": processes._start_time(self.child.pid)}

    def at(self, step: str, path: str) -> None:
        with self.gate:  # a paused process is paused in all its threads
            if not self.dead and self.life <= self.lives:
                number = self._random("crowd", f"{step} {path}")
                if number < 0.02 and self.pauses:
                    self.pauses -= 1
                    self.crowd.pause(self)
                elif number > 0.98 and "/images/" in path:
                    self.crowd.lose_mount(self)
                elif number > 0.95 and "/images/" in path:
                    self.crowd.replace_image(self)
            super().at(step, path)


IDENTITY = processes.this_process
HOURS = 3600  # seconds: runs are planned one hour ago, of images that are two hours old


class CrowdBench:
    """Undisturbed runs of each setting and CPU, and histories that are compared with them."""

    def __init__(self, bench: Any) -> None:
        self.bench, self.data = bench, Path(bench.data)
        self.broken = sorted((self.data / "COVID" / "images").iterdir())[0]
        self.bad, self.sound = (
            self.broken.read_bytes(),
            sorted((self.data / "COVID" / "images").iterdir())[1].read_bytes(),
        )
        self.images = [file for file in sorted(self.data.glob("*/images/*")) if file != self.broken]
        for file in self.data.rglob("*.png"):
            os.utime(file, (time.time() - 2 * HOURS,) * 2)
        self.replaced: tuple[Path, bytes] | None = None  # the image that is another one now, and its content
        self.disturbed = set[str]()  # paths of the images that were replaced in this history
        self.current: Driver | None = None
        self.drivers: list[Driver] = []
        self.expected: dict[tuple[str, int, bool], Any] = {}
        started = time.monotonic()
        for seed_of_run in (0, 1):
            for other_cpu in (False, True):
                out = bench.folder / f"alone-{seed_of_run}-{other_cpu}"
                self.out = out
                driver = Driver(0, 0, 0, 0, 0, lives=0, seed_of_run=seed_of_run, other_cpu=other_cpu, crowd=self)
                self.drivers = [driver]
                with self._simulated(out):
                    for name, work in self._works(out):
                        assert self._life(driver, work), name
                        self.expected[name, seed_of_run, other_cpu] = _by_id(open_run(str(out)))
        self.seconds = (time.monotonic() - started) / 4

    def _works(self, out: Path) -> Iterator[tuple[str, Callable[[Driver], None]]]:
        """Generate; then, with the broken image mended, retry."""
        self.write(self.broken, self.bad)

        def generate(driver: Driver) -> None:
            recipe = self.bench.recipe.model_copy(update={"seed": driver.seed_of_run})
            execution = Execution(executor="inline", allow_environment_change=driver.allowed)
            generate_run(recipe, str(self.data), self.bench.model, str(out), Request(), execution)

        yield "generate", generate
        self.write(self.broken, self.sound)

        def retry(driver: Driver) -> None:
            retry_run(_open(out), Execution(executor="inline", allow_environment_change=driver.allowed))

        yield "retry", retry
        self.write(self.broken, self.bad)

    def write(self, file: Path, content: bytes, hours: float = 2) -> None:
        """Write a file of the data set, so many hours ago."""
        file.write_bytes(content)
        os.utime(file, (time.time() - hours * HOURS,) * 2)

    @contextmanager
    def _simulated(self, out: Path) -> Iterator[None]:
        before = opening.STORES[""]

        def opened(uri: str) -> Any:
            concerned = self.current and uri.startswith((str(out), str(self.data)))
            return FaultyStore(uri, self.current) if concerned else before(uri)

        def engine(*arguments: Any) -> CounterfactualEngine:
            made = (OtherCPU if self.current.other_cpu else CounterfactualEngine)(*arguments)
            return made

        with ExitStack() as stack:
            for target, name, value in (
                (worker, "load", lambda model, recipe=None: copy.deepcopy(self.bench.loaded)),
                (worker, "CounterfactualEngine", engine),
                (processes, "this_process", lambda: self.current.process()),
                (storage, "PAUSES", (0.0, 0.0)),
                (provenance, "now", an_hour_ago),
                (committed, "now", an_hour_ago),
            ):
                stack.enter_context(patch.object(target, name, value))
            stack.enter_context(patch.dict(opening.STORES, {"": opened}))
            yield

    def _life(self, driver: Driver, work: Callable[[Driver], None]) -> bool:
        """One life of a driver; whether it came to its end."""
        before, self.current, self.work = self.current, driver, work
        driver.begin()
        opening.opened.cache_clear()  # of the process: it holds stores of another driver
        driver.counts["lives"] += 1
        try:
            work(driver)
            self.reduce()
            return True
        except Stopped:
            pass
        except ENDINGS as error:
            driver.counts[f"ended by {type(error).__name__}"] += 1
            self.last = f"{type(error).__name__}: {error}"
        finally:
            driver.dead = True
            driver.end()
            self.current = before
            opening.opened.cache_clear()
            if (gone := self.data.with_name("gone")).exists():
                shutil.rmtree(self.data, ignore_errors=True)
                gone.rename(self.data)
            if self.replaced:
                self.write(*self.replaced)
                self.replaced = None
        return False

    def reduce(self) -> None:
        run = _open(self.out)
        reduce_run(run, str(self.data), Options())

    def pause(self, driver: Driver) -> None:
        """Let another driver, which is not paused itself, live once."""
        idle = [other for other in self.drivers if other.child is None or other.child.poll() is not None]
        if idle:
            driver.counts["pauses"] += 1
            driver.child.send_signal(signal.SIGSTOP)
            self._life(idle[self.random.randrange(len(idle))], self.work)
            driver.child.send_signal(signal.SIGCONT)

    def lose_mount(self, driver: Driver) -> None:
        if not self.data.with_name("gone").exists():
            driver.counts["lost mounts"] += 1
            self.data.rename(self.data.with_name("gone"))
            self.data.mkdir()

    def replace_image(self, driver: Driver) -> None:
        """Replace an image by a file of equal size; one image in a history, so that the run is not over its limit."""
        if self.images[0].exists() and not self.replaced:
            file = self.images[driver.seed // 10 % len(self.images)]  # one of a history
            driver.counts["replaced images"] += 1
            self.replaced = file, file.read_bytes()
            self.disturbed.add(str(file.relative_to(self.data)))
            self.write(file, bytes(reversed(self.replaced[1])), hours=0)

    def history(self, seed: int) -> tuple[Counter[str], list[str], float]:
        """Run one history; as ``Bench.history``."""
        out = self.bench.folder / f"crowd-{seed}"
        shutil.rmtree(out, ignore_errors=True)
        self.out, self.random, self.disturbed = out, random.Random(seed), set()
        kinds = [(self.random.random() < 0.3, self.random.random() < 0.3, self.random.random() < 0.8) for _ in range(3)]
        self.drivers = [
            Driver(seed * 10 + n, lives=3, seed_of_run=int(differs and n > 0), other_cpu=other, allowed=ok, crowd=self)
            for n, (differs, other, ok) in enumerate(kinds[: self.random.choice((2, 3))])
        ]
        differing, started = list[str](), time.monotonic()
        with self._simulated(out):
            for name, work in self._works(out):
                for life in range(40):
                    driver = self.drivers[life % len(self.drivers)]
                    if self._life(driver, work):
                        break
                else:
                    differing.append(f"{name}: no driver came to its end ({self.last})")
                    break
                differing += [f"{name}: {what}" for what in self._differences(name, open_run(str(out)))]
                for driver in self.drivers:
                    driver.life, driver.pauses = 0, 2
        seconds = time.monotonic() - started
        if not differing:
            shutil.rmtree(out)
        counts = sum((driver.counts for driver in self.drivers), Counter[str]())
        counts["drivers"] = len(self.drivers)
        return counts, differing, seconds

    def _differences(self, name: str, run: Run) -> list[str]:
        found, seed = _by_id(run), run.keys["seed"]
        alone = {cpu: self.expected[name, seed, cpu] for cpu in (False, True)}
        wrong = [problem.what for problem in verify(run)]
        if list(found) != list(alone[False]):
            wrong.append("records lost or doubled")
        for record, (row, features) in found.items():
            expected_row, expected_features = alone[row["device"] == OtherCPU.device_name].get(record, ({}, None))
            if name == "generate" and row["image_path"] in self.disturbed and "changed since" in str(row["error"]):
                self.drivers[0].counts["rows of replaced images"] += 1  # errors, until they are retried
                continue
            if row["status"] != expected_row.get("status"):
                wrong.append(f"blamed: {record} {row['status']}: {row['error']}")
            elif not _equal(row, expected_row) or not np.array_equal(features, expected_features):
                wrong.append(f"{record} differs")
        return wrong + ([] if run.store.exists("_SUCCESS") else ["no _SUCCESS"])


def an_hour_ago() -> str:
    return (datetime.now(timezone.utc) - timedelta(seconds=HOURS)).isoformat(timespec="seconds")


class OtherCPU(CounterfactualEngine):
    """The engine on a CPU that rounds differently."""

    device_name = "another CPU"

    def __call__(self, *arguments: Any) -> Any:
        batch = super().__call__(*arguments)
        for image in batch.counterfactuals:
            image += BRIGHTER
        return batch


def _open(out: Path) -> Run:
    run = find_run(opening.open_store(str(out)))
    assert run is not None
    return run


def _by_id(run: Run) -> dict[str, tuple[dict[str, Any], Any]]:
    """Each record's row and features, in the order of the records; a doubled one has no place in it."""
    frame, features = read_records(run), dict[str, Any]()
    for one in (run, *overlays(run)):
        for shard in sorted(one.done()):
            path = stored_features_path(one.store, shard)
            if one.store.exists(path):
                with np.load(one.store.root / path) as stored:
                    arrays = [stored[name] for name in sorted(stored.files) if name != "ids"]
                    features |= {str(name): np.stack(rows) for name, *rows in zip(stored["ids"], *arrays, strict=True)}
    assert frame["record_id"].is_unique, part(0)
    return {row["record_id"]: (row, features.get(row["record_id"])) for row in frame.to_dict("records")}


def _equal(row: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(
        row[name] == expected[name] or (pd.isna(row[name]) and pd.isna(expected[name]))
        for name in row if name not in OF_PLACE
    )  # fmt: skip
