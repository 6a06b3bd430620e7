"""A Ray head of our own on loopback, with token authentication, as an operator would start it; and jobs on it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
RUNTIME_ENV = ROOT / "cluster" / "runtime_env.yaml"
SECRET = "only-this-cluster-knows"  # in the nodes' environment, as credentials are; must appear in no output


class Head:
    """``ray start --head`` on 127.0.0.1. All its processes carry the path of its token in their environment, which is
    how they are found when the head stops: ``ray stop`` would end every Ray on the machine."""

    def __init__(self, bin: Path = BIN, autoscaling: Callable[[str], dict[str, Any]] | None = None) -> None:
        """``bin``: the commands of the environment that nodes have. ``autoscaling`` makes a launcher's configuration
        from the address of GCS."""
        self.bin = bin
        self.folder = Path(tempfile.mkdtemp(prefix="dj-", dir="/tmp"))  # short: sockets' names end at 107 characters
        self.token = secrets.token_hex(32)
        (self.folder / "token").touch(0o600)
        (self.folder / "token").write_text(self.token)
        gcs, dashboard, agent, client, metrics = free_ports(5)
        self.address, self.gcs = f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}"
        self.metrics = f"http://127.0.0.1:{metrics}/metrics"
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_"))},
            "PATH": f"{bin}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # undocumented: on Linux, all of Ray then keeps to 127.0.0.1
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
        }
        grown: list[Any] = []
        if autoscaling is not None:
            (self.folder / "autoscaling.json").write_text(json.dumps(autoscaling(self.gcs)))
            grown = ["--autoscaling-config", self.folder / "autoscaling.json"]
            self.environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        started = self.ray(
            "start", "--head", "--port", gcs, "--node-ip-address", "127.0.0.1", "--include-dashboard", "true",
            "--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent,
            "--ray-client-server-port", client, "--metrics-export-port", metrics,
            "--num-cpus", 0 if grown else 1, *grown,
            "--temp-dir", self.folder / "r", "--object-store-memory", 200_000_000, "--disable-usage-stats",
            AWS_SECRET_ACCESS_KEY=SECRET,
        )  # fmt: skip
        if started.returncode:
            self.stop()
            raise RuntimeError(started.stdout + started.stderr)

    def ray(self, *words: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Ray's command line."""
        command = [str(word) for word in (self.bin / "ray", *words)]
        return subprocess.run(
            command, cwd=ROOT, env={**self.environment, **environment}, capture_output=True, text=True, timeout=400
        )

    def submit(self, name: str, verb: str, *options: Any, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``ray job submit`` as docs/cluster.md does."""
        follow = [] if wait else ["--no-wait"]
        return self.ray(
            "job", "submit", "--address", self.address, "--submission-id", name, *follow, "--working-dir", ".",
            "--runtime-env", RUNTIME_ENV.relative_to(ROOT), "--", "python", f"jobs/{verb}.py", *options,
        )  # fmt: skip

    def job(self, name: str) -> dict[str, Any]:
        """Return a job's entry in the dashboard: status, message, driver_exit_code, runtime_env."""
        return json.loads(self.get(f"/api/jobs/{name}"))

    def get(self, path: str, token: str | None = None) -> str:
        """Request a path of the dashboard with the cluster's token, or another one (empty string: none)."""
        given = self.token if token is None else token
        headers = {"Authorization": f"Bearer {given}"} if given else {}
        with urllib.request.urlopen(urllib.request.Request(self.address + path, headers=headers), timeout=30) as answer:
            return answer.read().decode()

    def processes(self) -> list[int]:
        """Ids of all processes of this head."""
        mark, found = f"RAY_AUTH_TOKEN_PATH={self.folder}/token".encode(), []
        for process in Path("/proc").iterdir():
            with suppress(OSError):
                if process.name.isdigit() and mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return found

    def listeners(self) -> set[str]:
        """Addresses on which the head's processes accept connections, hexadecimal, from /proc."""
        inodes = set()
        for process in self.processes():
            with suppress(OSError):
                inodes |= {os.readlink(file) for file in Path(f"/proc/{process}/fd").iterdir()}
        rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
        return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}

    def stop(self) -> None:
        for _ in range(50):  # a raylet's children may start more while they are being ended
            for process in (found := self.processes()):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            if not found:
                break
            time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_for(condition: Callable[[], Any], timeout: float = 120.0) -> Any:
    """Wait until ``condition()`` is true, and return its value."""
    until = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < until, "condition not met in time"
        time.sleep(0.05)
    return value
