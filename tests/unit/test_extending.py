"""Execute the tutorials of docs/extending: add their files and lines to a copy of the package, run their commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "extending"
BLOCK = re.compile(r'^```(python|diff|console)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
RUN = """
import json, sys
from click.testing import CliRunner
from diffva_ray.cli import main
print()
for words in json.load(sys.stdin):
    result = CliRunner().invoke(main, words)
    print(json.dumps([result.exit_code, result.output]))
"""


def applied(page: str, folder: Path) -> int:
    """Copy the package to ``folder`` and apply the page; return the number of lines added to existing files."""
    shutil.copytree(ROOT / "diffva_ray", folder / "diffva_ray", ignore=shutil.ignore_patterns("__pycache__"))
    lines = 0
    for kind, place, text in BLOCK.findall(page):
        file = folder / place
        if kind == "python":
            assert not file.exists(), f"{place} exists already"
            file.write_text(text)
        elif kind == "diff":
            edits = [(line[0], line[1:] or line) for line in text.splitlines(True)]  # an empty line has no sign
            before = "".join(line for sign, line in edits if sign != "+")
            after = "".join(line for sign, line in edits if sign != "-")
            source = file.read_text()
            assert source.count(before) == 1, f"{place} lacks the lines of the tutorial:\n{before}"
            file.write_text(source.replace(before, after))
            lines += text.count("\n+") + text.startswith("+")
    return lines


def commands(page: str) -> list[tuple[list[str], int, list[str]]]:
    """Return words, exit code and expected lines of every command of the page."""
    steps = []
    for kind, _, text in BLOCK.findall(page):
        for part in re.split(r"^\$ ", text, flags=re.M)[1:] if kind == "console" else ():
            line, *expected = part.splitlines()
            line, _, code = line.partition("  # exits with ")
            steps.append((shlex.split(line), int(code or 0), [text for text in expected if text]))
    return steps


def followed(page: str, folder: Path, names: dict[str, str], **environment: str) -> None:
    """Run the page's commands in ``folder`` with its copy of the package."""
    steps = [([names.get(word, word) for word in words], code, expected) for words, code, expected in commands(page)]
    arguments = [words[1:] for words, _, _ in steps if words[0] == "diffva"]
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=folder, input=json.dumps(arguments), capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = iter(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    for words, code, expected in steps:
        exit_code, output = next(answers) if words[0] == "diffva" else (0, (folder / words[1]).read_text())
        assert exit_code == code, (words, output, done.stderr)
        for line in expected:
            assert line in output, (words, output)


def read(page: str) -> str:
    return (PAGES / page).read_text()


def test_a_kind_of_data_set(images: Path, model: Path, tmp_path: Path) -> None:
    assert applied(read("data_set.md"), tmp_path) == 2  # its import and its place
    folder = tmp_path / "shenzhen"
    for name, label, reading in (("0001_0", "Normal", "male 45yrs\nnormal"), ("0330_1", "COVID", "female 27yrs")):
        (folder / "CXR_png").mkdir(parents=True, exist_ok=True)
        (folder / "ClinicalReadings").mkdir(exist_ok=True)
        shutil.copy(sorted((images / label / "images").iterdir())[0], folder / "CXR_png" / f"CHNCXR_{name}.png")
        (folder / "ClinicalReadings" / f"CHNCXR_{name}.txt").write_text(reading)
    shutil.copy(folder / "CXR_png" / "CHNCXR_0001_0.png", folder / "cover.png")
    (tmp_path / "empty").mkdir()
    followed(read("data_set.md"), tmp_path, {"MODEL": str(model)})
    (record,) = records_of(tmp_path / "runs" / "tb")
    assert (record["label"], record["status"]) == ("Tuberculosis", "ok")
    assert record["image_path"] == "CXR_png/CHNCXR_0330_1.png"


def test_a_method(images: Path, model: Path, tmp_path: Path) -> None:
    assert applied(read("method.md"), tmp_path) == 3  # its import and a line in two tables
    followed(read("method.md"), tmp_path, {"IMAGES": str(images), "MODEL": str(model)})
    assert {(row["method"], row["status"]) for row in records_of(tmp_path / "runs" / "ilvr")} == {("ilvr", "ok")}


def test_a_metric(images: Path, model: Path, tmp_path: Path) -> None:
    assert applied(read("metric.md"), tmp_path) == 2  # the metric and its import
    followed(read("metric.md"), tmp_path, {"IMAGES": str(images), "MODEL": str(model)})
    rows = json.loads((tmp_path / "runs" / "first" / "tables" / "metrics.json").read_text())["counterfactual"]
    assert all(1 < row["nmi"] <= 2 for row in rows)


@pytest.fixture
def webdav(tmp_path: Path) -> Iterator[str]:
    """Start a WebDAV server for the folder ``served``; yield its address."""
    wsgidav = pytest.importorskip("wsgidav.wsgidav_app")
    wsgi = pytest.importorskip("cheroot.wsgi")
    (tmp_path / "served").mkdir()
    served = {"provider_mapping": {"/": str(tmp_path / "served")}, "simple_dc": {"user_mapping": {"*": True}}}
    application = wsgidav.WsgiDAVApp({**served, "http_authenticator": {"trusted_auth_header": None}, "verbose": 0})
    server = wsgi.Server(("127.0.0.1", 0), application)
    server.prepare()
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield f"127.0.0.1:{server.bind_addr[1]}"
    server.stop()
    thread.join()


def test_a_kind_of_store(images: Path, model: Path, tmp_path: Path, webdav: str) -> None:
    assert applied(read("store.md"), tmp_path) == 8  # the function that imports it, and its lines
    for folder, name in ((images, "data"), (model, "model")):
        shutil.copytree(folder, tmp_path / "served" / name, ignore=shutil.ignore_patterns(".train"))
    followed(
        read("store.md"),
        tmp_path,
        {f"dav://host/{name}": f"dav://{webdav}/{name}" for name in ("data", "model", "run")},
    )
    assert (tmp_path / "served" / "run" / "_SUCCESS").exists()
    assert not list((tmp_path / "served").rglob(".tmp-*"))


def records_of(run: Path) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(run / "records").to_pylist()
