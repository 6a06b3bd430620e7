"""Fault histories on a Ray cluster of several raylets with fake GPUs: workers, nodes and drivers are killed while
storage is slow and sometimes fails. Which faults happen, and at which shard, follows from the seed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from diffva_ray.evaluate.reduction import Options, reduce_run
from diffva_ray.generate.run import Run, find_run
from diffva_ray.storage.local import LocalStore

FAULTS = ("worker", "node", "driver")
NODES = 2
QUIET = {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_DEDUP_LOGS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
MAX_LIFE = 180.0  # seconds; a driver that lives longer hangs


class ClusterBench:
    """A cluster that all histories use, and an undisturbed run on it."""

    def __init__(self, bench: Any) -> None:
        self.bench = bench
        self.recipe = bench.folder / "recipe.json"
        self.recipe.write_text(json.dumps(bench.recipe.model_dump(mode="json")))
        os.environ.update(QUIET)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0})
        for _ in range(NODES):
            self.cluster.add_node(num_cpus=1, num_gpus=1)
        out = bench.folder / "undisturbed-on-cluster"
        started = time.monotonic()
        driver = self._start(out, -1)
        driver.wait(MAX_LIFE)
        assert driver.returncode == 0
        self.seconds = time.monotonic() - started
        self._reduce(out)
        self.expected = bench.outcome(out)
        inline = bench.expected["files"]
        assert self.expected["files"] == inline, "the cluster generates other pixels than a plain loop"

    def history(self, seed: int) -> tuple[Counter[str], list[str], float]:
        """Run one history, as ``Bench.history`` does."""
        out = self.bench.folder / f"cluster-{seed}"
        shutil.rmtree(out, ignore_errors=True)
        rng, counts, started = random.Random(seed), Counter[str](), time.monotonic()
        faults = [rng.choice(FAULTS) for _ in range(rng.randint(1, 3))]
        while True:
            counts["lives"] += 1
            code = self._life(out, seed, faults, rng, counts)
            if code == 0:
                break
            counts["lives ended by a failure"] += code is not None
            if counts["lives"] > 12:
                return counts, [f"not finished after {counts['lives']} lives"], time.monotonic() - started
        seconds = time.monotonic() - started
        self._reduce(out)
        kept, self.bench.expected = self.bench.expected, self.expected
        try:
            wrong = self.bench.differences(out)
        finally:
            self.bench.expected = kept
        if not wrong:
            shutil.rmtree(out)
        return counts, wrong, seconds

    def close(self) -> None:
        self.cluster.shutdown()

    def _start(self, out: Path, seed: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(Path(__file__).with_name("driver.py")), out, self.bench.data, self.bench.model]
        environment = {**os.environ, "RAY_ADDRESS": self.cluster.address, "OMP_NUM_THREADS": "1"}
        with open(f"{out}.log", "ab") as log:
            return subprocess.Popen(
                [*map(str, command), str(seed), str(self.recipe)], env=environment, stdout=log, stderr=log
            )

    def _life(self, out: Path, seed: int, faults: list[str], rng: random.Random, counts: Counter[str]) -> int | None:
        """Run one driver and inject faults; return its exit code, None if it was killed."""
        driver, deadline, seen = self._start(out, seed), time.monotonic() + MAX_LIFE, set[str]()
        run: Run | None = None
        while (code := driver.poll()) is None:
            time.sleep(0.03)
            if time.monotonic() > deadline:
                driver.kill()
                counts["hanging drivers"] += 1
                return None
            run = run or find_run(LocalStore(str(out)))
            if run is None or not faults:
                continue
            tries = [path for path, _ in run.store.list("attempts") if "/try~" in path and path not in seen]
            if not tries:
                continue
            seen.update(tries)
            if rng.random() < 0.5:  # leave this attempt alone
                continue
            time.sleep(rng.random() * 0.5)
            fault = faults.pop()
            counts[f"{fault} kills"] += 1
            if fault == "driver":
                driver.kill()
                driver.wait()
                time.sleep(1)
                return None
            self._inject(fault, run, rng.choice(tries))
        return code

    def _inject(self, fault: str, run: Run, marker: str) -> None:
        """Kill the worker of an attempt, or its whole node, which is replaced."""
        node = marker.rpartition("/")[2].split("~")[3]
        if fault == "node":
            for raylet in list(self.cluster.worker_nodes):
                if raylet.node_id == node:
                    self.cluster.remove_node(raylet, allow_graceful=False)
                    self.cluster.add_node(num_cpus=1, num_gpus=1)
            return
        with suppress(FileNotFoundError, ProcessLookupError, ValueError):  # it has finished already
            os.kill(json.loads(run.store.read(marker))["pid"], signal.SIGKILL)

    def _reduce(self, out: Path) -> None:
        run = find_run(LocalStore(str(out)))
        assert run is not None
        reduce_run(run, self.bench.data, Options())
