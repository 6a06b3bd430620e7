"""Several hosts on one machine: each has its own network, host name, home, /tmp and shared memory, made of
Linux namespaces, and reaches the others only by address. Needs root."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

BIN = Path(sys.executable).parent
NETWORK = "10.77.0"
PRIVATE = """
set -e
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /dev/shm
mkdir /tmp/home /tmp/cwd
hostname $1
echo ready
exec sleep infinity
"""


def why_not() -> str | None:
    """Return why hosts cannot be made here, None if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "HOSTS SKIPPED: namespaces need Linux and root"
    if any(path.is_relative_to("/tmp") for path in (Path(__file__), BIN)):
        return "HOSTS SKIPPED: the checkout is in /tmp, of which every host has its own"
    tried = subprocess.run(
        ["unshare", "-mnu", "sh", "-c", "mount -t tmpfs tmpfs /mnt && ip link add veth0 type veth peer name veth1"],
        capture_output=True, text=True,
    )  # fmt: skip
    return f"HOSTS SKIPPED: {tried.stderr.strip()}" if tried.returncode else None


class Process(NamedTuple):
    child: subprocess.Popen[str]
    log: IO[str]

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def until(self, text: str, seconds: float = 60) -> None:
        """Wait until the output contains ``text``."""
        deadline = time.monotonic() + seconds
        while text not in self.output():
            assert self.child.poll() is None, self.output()[-2000:]
            assert time.monotonic() < deadline, f"{text!r} was never printed\n{self.output()[-2000:]}"
            time.sleep(0.2)


class Host:
    """A sleeping process in its own namespaces, and the processes that are started in them."""

    def __init__(self, name: str, address: str = "") -> None:
        self.name, self.address = name, address
        self.holder = subprocess.Popen(
            ["unshare", "-mnu", "--propagation", "private", "sh", "-c", PRIVATE, "host", name],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "ready\n"
        self.started: list[Process] = []
        self.network = os.readlink(f"/proc/{self.holder.pid}/ns/net")
        self.ip("link", "set", "lo", "up")

    def inside(self, command: Sequence[str | Path]) -> list[str]:
        return ["nsenter", "-t", str(self.holder.pid), "-m", "-n", "-u", "--wdns=/tmp/cwd", *map(str, command)]

    def ip(self, *words: str) -> None:
        subprocess.run(self.inside(["ip", *words]), check=True, capture_output=True, text=True)

    def start(self, *command: str | Path, **environment: str) -> Process:
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        environment = {**os.environ, "HOME": "/tmp/home", "TMPDIR": "/tmp", **environment}
        child = subprocess.Popen(self.inside(command), env=environment, stdout=log, stderr=log, text=True)
        self.started.append(Process(child, log))
        return self.started[-1]

    def run(self, *command: str | Path, **environment: str) -> str:
        """Run a command and return its output; AssertionError if it fails."""
        process = self.start(*command, **environment)
        code = process.child.wait(400)
        assert code == 0, f"{self.name}: {' '.join(map(str, command))}\n{process.output()[-3000:]}"
        return process.output()

    def end(self) -> None:
        for child in (*(process.child for process in self.started), self.holder):
            child.kill()
            child.wait()
        for found in Path("/proc").glob("[0-9]*/ns/net"):  # their children are still in the namespace
            with suppress(OSError):
                if os.readlink(found) == self.network:
                    os.kill(int(found.parts[2]), signal.SIGKILL)


@contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """Make hosts at 10.77.0.1, .2, ... behind a switch; end them after the block."""
    switch = Host("switch")
    made: list[Host] = []
    try:
        switch.ip("link", "add", "bridge", "type", "bridge")
        switch.ip("link", "set", "bridge", "up")
        for n, name in enumerate(names, start=1):
            host = Host(name, f"{NETWORK}.{n}")
            made.append(host)
            port, at = f"port{n}", str(host.holder.pid)
            switch.ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", at)
            switch.ip("link", "set", port, "master", "bridge", "up")
            host.ip("addr", "add", f"{host.address}/24", "dev", "eth0")
            host.ip("link", "set", "eth0", "up")
        yield made
    finally:
        for host in (*made, switch):
            host.end()
