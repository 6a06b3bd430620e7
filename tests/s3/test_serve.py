"""The report of a run on S3: written there, shown on loopback through the store, ended by Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.client import HTTPConnection
from pathlib import Path

import pytest

from diffva_ray.evaluate.report.page import write_report
from diffva_ray.evaluate.report.serve import ReportServer
from diffva_ray.generate.run import open_run
from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.opening import open_store

pytestmark = pytest.mark.parametrize("server", ["moto"], indirect=True)
make_run = runpy.run_path(str(Path(__file__).parents[1] / "browser" / "synthetic.py"))["make_run"]
PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = (
    "/../run.json", "/%2e%2e/run.json", "/data/../../run.json", "/data/%2e%2e%2f%2e%2e%2frun.json", "//run.json",
    "/run.json", "/..%5crun.json", "/images/..%00/x.png", "/index.html%00.png", "/images/", "/.", "/images",
    "/%252e%252e/run.json", "/records/part-00000.parquet", "/etc/passwd", "/x.png?/../run.json",
)  # fmt: skip


@pytest.fixture
def run_uri(bucket: str, tmp_path: Path) -> str:
    """A run on S3 whose images are there too, with its report."""
    make_run(tmp_path, 6, False)
    for folder in ("data", "run"):
        source, target = LocalStore(str(tmp_path / folder)), open_store(f"{bucket}/{folder}")
        for entry in source.list():
            data = source.read(entry.path)
            if entry.path == "run.json":
                data = data.replace(str(tmp_path / "data").encode(), f"{bucket}/data".encode())
            target.put(entry.path, data)
    write_report(open_run(f"{bucket}/run"))
    open_store(bucket).put("secret/index.html", b"another run's")
    return f"{bucket}/run"


@pytest.fixture
def port(run_uri: str) -> Iterator[int]:
    with ReportServer(open_store(run_uri)) as server:
        assert server.server_address[0] == "127.0.0.1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def ask(port: int, path: str, method: str = "GET", host: str = "") -> tuple[int, bytes]:
    """Status and body; the path goes out as it is."""
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.putrequest(method, path, skip_host=True)
        connection.putheader("Host", host or f"127.0.0.1:{port}")
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_page_records_and_pictures_come_through_the_store(port: int, run_uri: str) -> None:
    status, page = ask(port, "/index.html")
    assert status == 200
    assert page == open_store(run_uri).read("report/index.html")
    status, records = ask(port, "/data/details-0000.js")
    assert status == 200
    pictures = re.findall(r'src="(images/[^"]+)"', page.decode())
    assert len(set(pictures)) >= 4
    for picture in set(pictures):
        status, data = ask(port, f"/{picture}")
        assert (status, data[:8]) == (200, PNG)
    assert re.search(rb"image-0000\d\.png", records)
    assert ask(port, "/index.html", "HEAD") == (200, b"")


def test_nothing_else_of_the_bucket_is_served(port: int) -> None:
    for path in HOSTILE:
        status, body = ask(port, path)
        assert status in (400, 404), path
        assert b"fingerprint" not in body, path
        assert b"another run" not in body, path
    status, body = ask(port, "/")
    assert (status, body[:15]) == (200, b"<!doctype html>")


def test_only_this_machine_is_answered_and_nothing_is_written(port: int, run_uri: str) -> None:
    before = open_store(run_uri).list()
    assert ask(port, "/index.html", host=f"images.example:{port}")[0] == 403
    for method in ("PUT", "POST", "DELETE"):
        assert ask(port, "/index.html", method)[0] == 501
    assert open_store(run_uri).list() == before


def test_the_command_serves_until_interrupted(run_uri: str) -> None:
    command = [sys.executable, "-m", "diffva_ray.cli", "report", run_uri, "--serve"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    interruptible = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # whatever the tests inherited
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=interruptible
    ) as child:
        try:
            assert child.stdout is not None
            said = "".join(child.stdout.readline() for _ in range(2))
            found = re.search(r"open http://127\.0\.0\.1:(\d+)/index\.html", said)
            assert found, said
            assert ask(int(found[1]), "/index.html")[0] == 200
            child.send_signal(signal.SIGINT)
            assert child.wait(60) == 0
        finally:
            child.kill()
    with pytest.raises(ConnectionError):
        ask(int(found[1]), "/index.html")
