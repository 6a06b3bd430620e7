"""Data, model and run on S3: the same line, no local path anywhere; and what an object store does on a bad day."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from botocore.retries.standard import ExponentialBackoff
from faulty import BREAK_OFF, CONFLICT, DENIED, EXPIRED, NOT_IMPLEMENTED, SLOW_DOWN, Proxy, first
from on_stores import diffva, invoke, one_line

from diffva_ray.storage import s3 as storage_s3
from diffva_ray.storage import store as storage
from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import StoreError

if TYPE_CHECKING:
    from conftest import Server

on_moto = pytest.mark.parametrize("server", ["moto"], indirect=True)
on_swift = pytest.mark.parametrize("server", ["swift"], indirect=True)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly a pause between attempts (botocore's limit on the rate of requests stays)."""
    monkeypatch.setattr(storage, "PAUSES", (0.0,))
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda self, context: 0.01)


# The whole line.


def test_the_whole_line(
    line: tuple[str, ...], bucket: str, images: Path, model: Path, tmp_path: Path, credentials: Server,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    out = f"{bucket}/run"
    with caplog.at_level(logging.DEBUG, logger="diffva"):
        said = diffva("--verbose", *line)
        before = open_store(out).list()
        said += diffva(*line)
        assert open_store(out).list() == before
        said += diffva("--verbose", "reduce", out, "--executor", "inline")
        said += diffva("--verbose", "report", out)
        assert "complete and sound" in (verified := diffva("--verbose", "verify", out))
        assert "8 of 8 records" in (status := diffva("--verbose", "status", out))
    run = open_store(out)
    files = {entry.path: run.read(entry.path) for entry in run.list()}
    assert files.keys() > {"_SUCCESS", "report/index.html", "tables/metrics.json"}

    local = tmp_path / "run"
    diffva("generate", "--data", str(images), "--model", str(model), "--out", str(local), "--executor", "inline",
           "--limit", "8")  # fmt: skip
    (tmp_path / "s3").mkdir()
    for path in [path for path in files if path.startswith("records/")]:
        (tmp_path / "s3" / Path(path).name).write_bytes(files[path])
    assert pd.read_parquet(tmp_path / "s3").equals(pd.read_parquet(local / "records"))

    for secret in (credentials.key, credentials.secret):
        assert secret not in said + verified + status + caplog.text
        assert not [path for path, data in files.items() if secret.encode() in data]


# Credentials.


def test_credentials_and_endpoint_from_a_profile(
    bucket: str, credentials: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    open_store(bucket).put("image", b"x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "config").write_text(f"[profile clinic]\nendpoint_url = {credentials.endpoint}\n")
    (tmp_path / ".aws" / "credentials").write_text(
        f"[clinic]\naws_access_key_id = {credentials.key}\naws_secret_access_key = {credentials.secret}\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_PROFILE", "clinic")
    assert open_store(bucket).read("image") == b"x"
    monkeypatch.setenv("AWS_PROFILE", "practice")
    with pytest.raises(StoreError, match="practice") as caught:
        open_store(bucket).read("image")
    assert caught.value.lasting


@on_swift
def test_an_endpoint_with_a_name_is_spoken_to_in_path_style(
    bucket: str, credentials: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", credentials.endpoint.replace("127.0.0.1", "localhost"))
    store = open_store(bucket)
    store.put("image", b"x")
    assert store.list() == [("image", 1)]


@on_swift
def test_a_wrong_secret_loses_nothing(
    line: tuple[str, ...], bucket: str, credentials: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffva(*line)
    run = open_store(f"{bucket}/run")
    finished = run.list()
    parts = [entry.path for entry in run.list("records")]
    kept = run.read(parts[0])
    for path in ("_SUCCESS", parts[-1]):  # as a run that was stopped before its last shard
        run.delete(path)
    before = run.list()

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    for command in (line, ("status", f"{bucket}/run"), ("verify", f"{bucket}/run"), ("report", f"{bucket}/run")):
        refused = invoke(*command)
        assert refused.exit_code == 5, refused.output
        assert one_line(refused).endswith("AWS_SECRET_ACCESS_KEY (SignatureDoesNotMatch)")
        assert "wrong-secret" not in refused.output
    with pytest.raises(StoreError, match="403"):
        open_store(f"{bucket}/run").exists("_SUCCESS")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", credentials.secret)
    assert run.list() == before
    diffva(*line)
    assert {entry.path for entry in run.list()} == {entry.path for entry in finished}
    assert run.read(parts[0]) == kept


@on_swift
def test_an_unknown_key_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test:nobody")
    with pytest.raises(StoreError, match=r"refused|denied") as caught:
        open_store(bucket).put("image", b"x")
    assert caught.value.lasting


@on_moto
def test_credentials_that_expire_on_the_way(
    line: tuple[str, ...], bucket: str, credentials: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    puts: list[str] = []

    def expire(method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        puts.extend([path] if method == "PUT" else [])
        return EXPIRED if len(puts) > 12 else None

    with Proxy(credentials.endpoint, expire) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        stopped = invoke(*line)
    assert stopped.exit_code == 5, stopped.output
    assert "credentials refused" in (said := one_line(stopped))
    assert "ExpiredToken" in said
    assert not open_store(f"{bucket}/run").exists("_SUCCESS")
    diffva(*line)
    assert "complete and sound" in diffva("verify", f"{bucket}/run")


def test_no_credentials_at_all(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    refused = invoke("status", f"{bucket}/run")
    assert refused.exit_code == 5
    assert "no credentials found; set AWS_PROFILE" in one_line(refused)


def test_credentials_in_the_address_are_refused_unseen(credentials: Server) -> None:
    refused = invoke("status", f"s3://{credentials.key}:{credentials.secret}@images/run")
    assert refused.exit_code == 2
    assert "must not hold credentials" in one_line(refused)
    assert credentials.secret not in refused.output


# What is wrong with an address.


def test_a_bucket_that_does_not_exist(bucket: str, images: Path, model: Path) -> None:
    nowhere = "s3://no-bucket-of-that-name"
    for command in (
        ("status", f"{nowhere}/run"),
        ("inspect", nowhere),
        ("generate", "--data", str(images), "--model", str(model), "--out", f"{nowhere}/run", "--executor", "inline"),
        ("generate", "--data", str(images), "--model", f"{nowhere}/model", "--out", f"{bucket}/run"),
    ):
        refused = invoke(*command)
        assert refused.exit_code == 5, refused.output
        assert "the bucket does not exist" in one_line(refused)
    store = open_store(f"{nowhere}/run")
    for act in (lambda: store.put("a", b""), lambda: store.put_if_absent("a", b""), lambda: store.list()):
        with pytest.raises(StoreError, match="bucket does not exist"):
            act()


@pytest.mark.parametrize("address", ["s3://", "s3:///run", "s3://no_such@name/run", "s3://Not A Bucket!/run"])
def test_an_address_that_is_none(address: str, credentials: Server) -> None:
    refused = invoke("status", address)
    assert refused.exit_code in (2, 5)
    assert one_line(refused)


@on_moto
def test_an_endpoint_that_is_no_address(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    refused = invoke("status", f"{bucket}/run")
    assert refused.exit_code == 5
    assert "localhost:9000" in one_line(refused)


@pytest.fixture
def nobody() -> Iterator[str]:
    """A port where nobody listens (bound, so that nobody else gets it)."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def silence() -> Iterator[str]:
    """A port that takes connections and never says a word."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@on_moto
def test_an_endpoint_where_nobody_answers(bucket: str, nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", nobody)
    started = time.monotonic()
    refused = invoke("status", f"{bucket}/run")
    assert time.monotonic() - started < 20
    assert refused.exit_code == 5
    assert f"no answer from {nobody}" in one_line(refused)


@on_moto
def test_an_endpoint_that_never_answers(bucket: str, silence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(storage_s3.CONFIG, "read_timeout", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", silence)
    started = time.monotonic()
    refused = invoke("status", f"{bucket}/run")
    assert time.monotonic() - started < 8  # two timeouts of a second here, of fifteen in earnest
    assert refused.exit_code == 5
    assert f"no answer from {silence} (ReadTimeoutError)" in one_line(refused)


# A bad day of the server.


def test_throttled_requests_succeed_in_the_end(
    bucket: str, credentials: Server, monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    for act in (
        lambda store: store.put("a", b"x"),
        lambda store: store.put_if_absent("b", b"x"),
        lambda store: store.read("a"),
        lambda store: store.exists("a"),
        lambda store: store.list(),
        lambda store: store.delete("a"),
    ):
        with Proxy(credentials.endpoint, first(1, SLOW_DOWN)) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            act(open_store(bucket))
            assert proxy.answered == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL", credentials.endpoint)
    assert open_store(bucket).list() == [("b", 1)]


@on_moto
def test_throttling_is_borne_for_longer_than_silence(
    bucket: str, credentials: Server, monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    with Proxy(credentials.endpoint, first(6, SLOW_DOWN)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        open_store(bucket).put("a", b"x")
        assert proxy.answered == 6 > storage_s3.UNANSWERED


@on_moto
def test_throttling_without_end_is_no_lasting_failure(
    bucket: str, credentials: Server, monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    monkeypatch.setitem(storage_s3.CONFIG, "retries", {"total_max_attempts": 4, "mode": "adaptive"})
    with Proxy(credentials.endpoint, first(1000, SLOW_DOWN)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(StoreError, match="SlowDown") as caught:
            open_store(bucket).read("a")
        assert not caught.value.lasting
        assert proxy.answered == 4  # s3fs adds none of its own


@on_moto
def test_a_throttled_run_goes_on(
    line: tuple[str, ...], bucket: str, credentials: Server, monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    asked: list[str] = []

    def now_and_then(method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        asked.append(path)
        return SLOW_DOWN if len(asked) % 40 == 10 else None

    with Proxy(credentials.endpoint, now_and_then) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        diffva(*line)
        assert proxy.answered > 1
    assert "complete and sound" in diffva("verify", f"{bucket}/run")


def test_a_broken_body_is_read_again(bucket: str, credentials: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(100_000)
    open_store(bucket).put("image", data)
    with Proxy(credentials.endpoint, first(2, BREAK_OFF, "GET")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert open_store(bucket).read("image") == data
        assert proxy.answered == 2
    with Proxy(credentials.endpoint, first(100, BREAK_OFF, "GET")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(StoreError) as caught:
            open_store(bucket).read("image")
        assert not caught.value.lasting
        assert proxy.answered == storage_s3.READS


def test_a_server_without_conditional_put(
    bucket: str, credentials: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        Proxy(credentials.endpoint, first(1000, NOT_IMPLEMENTED, "PUT", "if-none-match")) as proxy,
        caplog.at_level(logging.INFO, logger="diffva"),
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_store(bucket)
        assert store.put_if_absent("a", b"one")
        assert store.put_if_absent("b", b"two")
        assert not store.put_if_absent("a", b"three")
        assert store.read("a") == b"one"
        assert proxy.answered == 1  # asked once, never again
    assert caplog.text.count("no conditional PUT") == 1


def test_a_conflict_is_looked_at_again(bucket: str, credentials: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy(credentials.endpoint, first(2, CONFLICT, "PUT")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert open_store(bucket).put_if_absent("a", b"one")  # 409 is no proof that a file is there
        assert open_store(bucket).read("a") == b"one"
    with Proxy(credentials.endpoint, first(1000, CONFLICT, "PUT")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(StoreError, match="in use"):
            open_store(bucket).put_if_absent("b", b"one")


def test_no_permission(bucket: str, credentials: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(bucket).put("image", b"x")
    with Proxy(credentials.endpoint, lambda *_: DENIED) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_store(bucket)
        with pytest.raises(PermissionError, match="image"):  # one image that may not be read is one row
            store.read("image")
        for act in (store.list, lambda: store.put("a", b""), lambda: store.put_if_absent("a", b""),
                    lambda: store.delete("image"), lambda: store.exists("image")):  # fmt: skip
            with pytest.raises(StoreError, match="denied") as caught:
                act()
            assert caught.value.lasting
    monkeypatch.setenv("AWS_ENDPOINT_URL", credentials.endpoint)
    assert open_store(bucket).read("image") == b"x"


@on_moto
def test_a_server_that_dies_on_the_way(
    line: tuple[str, ...], bucket: str, credentials: Server, monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    puts: list[str] = []

    def die(method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        puts.extend([path] if method == "PUT" else [])
        return (500, "InternalError") if len(puts) > 12 else None

    with Proxy(credentials.endpoint, die) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        stopped = invoke(*line)
    assert stopped.exit_code == 5, stopped.output
    assert "the server answers" in one_line(stopped)
    diffva(*line)
    assert "complete and sound" in diffva("verify", f"{bucket}/run")


@on_moto
def test_requests_of_a_record(
    line: tuple[str, ...], bucket: str, credentials: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/throughput.md states them: two reads (image, lung mask) and three files; the rest is a shard's or a run's. A
    worker's first files cost more, until the server is known to refuse to replace one."""
    requests = list[Counter[str]]()
    for limit in (2, 8):
        with Proxy(credentials.endpoint, lambda *_: None) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            diffva(*line[:-1], str(limit), "--out", f"{bucket}/run-{limit}", "--shard-size", "8")
        requests.append(Counter(method for method, _ in proxy.passed))
    more = requests[1] - requests[0]
    assert more["GET"] == 6 * 2
    assert 6 * 3 <= more["PUT"] <= 6 * 3 + 4  # four threads may try the server at once
    assert more["HEAD"] <= 4


@on_moto
def test_an_export_to_the_server_is_that_of_a_folder(line: tuple[str, ...], bucket: str, tmp_path: Path) -> None:
    """Run, export and images on the server."""
    run = line[line.index("--out") + 1]
    diffva(*line)
    diffva("reduce", run, "--executor", "inline")
    for kind in ("huggingface", "coco"):
        more = ("--to", kind, "--executor", "inline", *(("--threshold", "0.02") if kind == "coco" else ()))
        diffva("export", run, "--out", f"{bucket}/exports/{kind}", *more)
        diffva("export", run, "--out", str(tmp_path / kind), *more)
        store, folder = open_store(f"{bucket}/exports/{kind}"), LocalStore(str(tmp_path / kind))
        paths = sorted(path for path, _ in folder.list())
        assert sorted(path for path, _ in store.list()) == paths
        assert [store.read(path) for path in paths] == [folder.read(path) for path in paths]
        assert "nothing written" in diffva("export", run, "--out", f"{bucket}/exports/{kind}", *more)
