"""Data, model and run on S3 (moto's server on loopback): the same line, no local path anywhere."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from moto.server import ThreadedMotoServer

from diffva_ray.cli import main
from diffva_ray.storage import LocalStore, open_store
from diffva_ray.storage_s3 import S3Store


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    server.start()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    store = S3Store("s3://films")
    store.fs.mkdir("films")
    yield "s3://films"
    patch.undo()
    server.stop()


def upload(folder: Path, uri: str) -> None:
    store = open_store(uri)
    for entry in LocalStore(str(folder)).list():
        if not entry.path.startswith(".train"):
            store.put(entry.path, (folder / entry.path).read_bytes())


def diffva(*arguments: str) -> str:
    result = CliRunner().invoke(main, [*arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_store_keeps_its_promises(bucket: str) -> None:
    store = open_store(f"{bucket}/promises")
    assert store.list() == []
    store.put("a/b", b"one")
    store.put("a/b", b"two")
    assert not store.put_if_absent("a/b", b"three")
    assert store.put_if_absent("a/c", b"four")
    assert store.read("a/b") == b"two"
    assert store.list("a") == [("a/b", 3), ("a/c", 4)]
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b")
    with pytest.raises(FileNotFoundError):
        store.read("a/b")
    with pytest.raises(ValueError, match="leaves its folder"):
        store.read("../other")


def test_listing_goes_past_a_thousand_keys(bucket: str) -> None:
    store = open_store(f"{bucket}/many")
    for n in range(1005):
        store.put(f"records/part-{n:05d}.parquet", b"")
    assert len(store.list("records")) == 1005


def test_the_whole_line(bucket: str, films: Path, model: Path, tmp_path: Path) -> None:
    data, on_s3, out = f"{bucket}/data", f"{bucket}/model", f"{bucket}/runs/first"
    upload(films, data)
    upload(model, on_s3)
    arguments = ("generate", "--data", data, "--model", on_s3, "--out", out, "--executor", "inline", "--limit", "8")
    diffva(*arguments)
    before = open_store(out).list()
    diffva(*arguments)
    assert open_store(out).list() == before
    diffva("reduce", out, "--executor", "inline")
    diffva("report", out)
    assert "complete and sound" in diffva("verify", out)
    assert "8 of 8 records" in diffva("status", out)
    for name in ("_SUCCESS", "report/index.html", "tables/metrics.json"):
        assert open_store(out).exists(name), name

    local = tmp_path / "run"
    diffva("generate", "--data", str(films), "--model", str(model), "--out", str(local), "--executor", "inline",
           "--limit", "8")  # fmt: skip
    (tmp_path / "s3").mkdir()
    for entry in open_store(out).list("records"):
        (tmp_path / "s3" / entry.path.split("/")[1]).write_bytes(open_store(out).read(entry.path))
    assert pd.read_parquet(tmp_path / "s3").equals(pd.read_parquet(local / "records"))
    for entry in open_store(out).list():
        assert b"secret-of-the-test" not in open_store(out).read(entry.path), entry.path
