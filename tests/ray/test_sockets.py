"""On one machine, nothing that a command starts listens on another interface than loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from diffva_ray.config.recipe import Recipe, to_yaml

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}  # as in /proc/net/tcp*
LISTENING = "0A"

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's /proc")


def processes(session: int) -> list[int]:
    """Ids of the processes whose environment has the mark of this test."""
    mark, found = f"DIFFVA_TEST_SOCKETS={session}".encode(), []
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdigit() and mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def listeners(session: int) -> set[tuple[str, str]]:
    """(address in hexadecimal, name of the process) of all listening sockets."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    addresses = {f"socket:[{row[9]}]": row[1].split(":")[0] for row in rows if row[3] == LISTENING}
    found = set()
    for process in processes(session):
        with suppress(OSError):
            name = Path(f"/proc/{process}/comm").read_text().strip()
            links = {os.readlink(file) for file in Path(f"/proc/{process}/fd").iterdir()}
            found |= {(addresses[link], name) for link in links & addresses.keys()}
    return found


def test_commands_on_one_machine_listen_on_loopback_only(
    tiny: Recipe, images: Path, model: Path, tmp_path: Path
) -> None:
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(to_yaml(tiny))
    commands = {
        "ray::RayTrainWo": ["train", "--data", images, "--out", tmp_path / "model", "--recipe", recipe, "--workers", 2],
        "ray::MapWorker(": ["generate", "--data", images, "--model", model, "--out", run, "--recipe", recipe],
        "raylet": ["reduce", run],
        "": ["report", run, "--serve"],
    }
    for session, (worker, words) in enumerate(commands.items(), start=os.getpid()):
        environment = {**os.environ, "DIFFVA_TEST_SOCKETS": str(session)}
        command = [sys.executable, "-m", "diffva_ray.cli", *map(str, words)]
        driver = subprocess.Popen(command, env=environment, start_new_session=True)
        seen = set[tuple[str, str]]()
        deadline = time.monotonic() + 500
        while driver.poll() is None:
            assert time.monotonic() < deadline
            seen |= listeners(session)
            if seen and "--serve" in words:
                driver.send_signal(signal.SIGINT)  # it would serve for ever
                driver.wait(60)
            time.sleep(0.1)
        assert driver.returncode == 0
        assert any(name.startswith(worker) for _, name in seen), f"no {worker} among {seen}"
        assert {entry for entry in seen if entry[0] not in LOOPBACK} == set(), words[0]


def test_a_private_cluster_of_a_process_that_imported_ray_before_listens_on_loopback_only() -> None:
    program = (
        "import ray, sys\n"
        "from diffva_ray.distributed import session\n"
        "with session.connect(cpus=1) as private:\n"
        "    assert private\n"
        "    print('connected', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    mark = os.getpid()
    environment = {**os.environ, "DIFFVA_TEST_SOCKETS": str(mark)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "connected\n"
        seen = listeners(mark)
        driver.communicate("\n", timeout=60)
    assert any(name == "raylet" for _, name in seen)
    assert {entry for entry in seen if entry[0] not in LOOPBACK} == set()
