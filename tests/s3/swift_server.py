"""OpenStack Swift with its S3 API on loopback: a real object store that checks signatures. Four processes, one disk."""

from __future__ import annotations

import ctypes
import getpass
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

KEY, SECRET = "test:tester", "secret-of-the-swift"
PARTS = ("proxy", "account", "container", "object")
MIDDLEWARE = (
    "catch_errors", "gatekeeper", "healthcheck", "listing_formats", "bulk", "s3api", "tempauth", "copy", "slo",
    "versioned_writes", "symlink",
)  # fmt: skip
OPTIONS = {
    "s3api": "location = us-east-1",
    "tempauth": f"user_test_tester = {SECRET} .admin",
}
LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None
RINGS = """
import sys
from swift.common.ring import RingBuilder
for name, port in zip(("account", "container", "object"), sys.argv[2:]):
    ring = RingBuilder(6, 1, 1)  # 64 partitions, one replica
    ring.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "disk", "weight": 1.0})
    ring.rebalance()
    ring.get_ring().save(f"{sys.argv[1]}/{name}.ring.gz")
"""


class Swift:
    """Started on construction, files below ``folder``; ``stop`` ends it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "devices" / "disk").mkdir(parents=True)
        ports = dict(zip(PARTS, free_ports(len(PARTS))))
        self.endpoint = f"http://127.0.0.1:{ports['proxy']}"
        (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = of-the-test\n")
        for part, port in ports.items():
            (folder / f"{part}.conf").write_text(self._configuration(part, port))
        storage = [str(ports[part]) for part in PARTS[1:]]
        subprocess.run([sys.executable, "-c", RINGS, str(folder), *storage], check=True, cwd=folder)
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            for part in PARTS:
                self.processes.append(self._start(part))
            self._wait(list(ports.values()))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, part: str) -> subprocess.Popen[bytes]:
        program = Path(sys.executable).with_name(f"swift-{part}-server")
        with open(self.folder / f"{part}.log", "wb") as log:
            return subprocess.Popen(  # a session of its own: at its end a server of Swift signals its process group
                [sys.executable, str(program), str(self.folder / f"{part}.conf")],
                stdout=log, stderr=log, cwd=self.folder, start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip

    def _wait(self, ports: list[int], patience: float = 60.0) -> None:
        until = time.monotonic() + patience
        while not all(listens(port) for port in ports):
            if time.monotonic() > until or any(process.poll() is not None for process in self.processes):
                logs = "\n".join((self.folder / f"{part}.log").read_text()[-500:] for part in PARTS)
                raise RuntimeError(f"Swift did not start:\n{logs}")
            time.sleep(0.05)

    def _configuration(self, part: str, port: int) -> str:
        pipeline, sections = [f"{part}-server"], [f"[app:{part}-server]\nuse = egg:swift#{part}"]
        if part == "proxy":
            pipeline = [*MIDDLEWARE, *pipeline]
            sections[0] += "\naccount_autocreate = true"
            sections += [f"[filter:{name}]\nuse = egg:swift#{name}\n{OPTIONS.get(name, '')}" for name in MIDDLEWARE]
        if part == "object":
            sections[0] += "\nfallocate_reserve = 0"
        return "\n\n".join([
            f"[DEFAULT]\nbind_ip = 127.0.0.1\nbind_port = {port}\nworkers = 0\nuser = {getpass.getuser()}\n"
            f"swift_dir = {self.folder}\ndevices = {self.folder}/devices\nmount_check = false\n"
            "disable_fallocate = true\nlog_level = WARNING\nlog_udp_host = 127.0.0.1\nlog_udp_port = 9",
            f"[pipeline:main]\npipeline = {' '.join(pipeline)}",
            *sections,
            "",
        ])  # fmt: skip


def end_with_parent() -> None:
    """On Linux, ask for a SIGTERM when this process dies: a killed pytest tears nothing down."""
    if LIBRARY is not None:
        LIBRARY.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def why_not(folder: Path) -> str | None:
    """What keeps Swift from running on this machine, if anything: it keeps metadata in extended attributes."""
    if not Path(sys.executable).with_name("swift-proxy-server").exists():
        return "swift is not installed (pip install -e '.[test]')"
    probe = folder / "xattr-probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.swift.metadata", b"x")
    except (AttributeError, OSError) as error:
        return f"Swift needs user xattrs, and {folder} has none ({error})"
    return None


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
        return True
    return False
