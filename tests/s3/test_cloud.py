"""Data, model and run on ``gs://`` and ``az://``, and what these stores do on a bad day."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from faulty import BREAK_OFF, DENIED, SLOW_DOWN, Proxy, Rule, first
from on_stores import diffva, invoke, one_line

from diffva_ray.storage import cloud
from diffva_ray.storage import store as storage
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import StoreError

if TYPE_CHECKING:
    from conftest import Server

on_clouds = pytest.mark.parametrize("server", ["google", "azurite"], indirect=True)
on_google = pytest.mark.parametrize("server", ["google"], indirect=True)
on_azurite = pytest.mark.parametrize("server", ["azurite"], indirect=True)
ENDPOINT = {"google": "GOOGLE_BASE_URL", "azurite": "AZURE_STORAGE_ENDPOINT"}
ACCOUNT = {"google": "", "azurite": "/devstoreaccount1"}  # at the end of the endpoint


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few attempts, with hardly a pause between them."""
    moment = timedelta(milliseconds=10)
    backoff = {"init_backoff": moment, "max_backoff": 2 * moment, "base": 2}
    monkeypatch.setattr(cloud, "RETRIES", {"max_retries": 3, "retry_timeout": timedelta(seconds=9), "backoff": backoff})
    monkeypatch.setattr(storage, "PAUSES", (0.0,))


class Faulty(Proxy):
    """A proxy before a server of a cloud, to which the environment leads while it runs."""

    def __init__(self, server: Server, rule: Rule) -> None:
        super().__init__(server.endpoint, rule)
        self.patch = pytest.MonkeyPatch()
        self.patch.setenv(ENDPOINT[server.kind], self.endpoint + ACCOUNT[server.kind])

    def __exit__(self, *error: object) -> None:
        self.patch.undo()
        super().__exit__(*error)


@on_clouds
def test_a_run_on_a_cloud_whose_server_dies_on_the_way(
    line: tuple[str, ...], bucket: str, images: Path, model: Path, tmp_path: Path, credentials: Server, hasty: None
) -> None:
    """Nothing is lost or written twice, and the records are those of a run on a disk."""
    out, puts = f"{bucket}/run", list[str]()

    def die(method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        puts.extend([path] if method == "PUT" else [])
        return (500, "InternalError") if len(puts) > 12 else None

    with Faulty(credentials, die):
        stopped = invoke(*line)
    assert stopped.exit_code == 5, stopped.output
    assert "the server answers 500" in one_line(stopped)
    run = open_store(out)
    assert not run.exists("_SUCCESS")
    kept = {path: run.read(path) for path, _ in run.list("records")}
    said = diffva("--verbose", *line)
    complete = run.list()
    assert "nothing to do" in diffva(*line)
    assert run.list() == complete
    assert {path: run.read(path) for path in kept} == kept
    said += diffva("--verbose", "reduce", out, "--executor", "inline")
    assert "complete and sound" in diffva("verify", out)
    assert "8 of 8 records" in diffva("status", out)

    local = ("--out", str(tmp_path / "run"), "--executor", "inline", "--limit", "8")
    diffva("generate", "--data", str(images), "--model", str(model), *local)
    (tmp_path / "cloud").mkdir()
    for path, _ in run.list("records"):
        (tmp_path / "cloud" / Path(path).name).write_bytes(run.read(path))
    assert pd.read_parquet(tmp_path / "cloud").equals(pd.read_parquet(tmp_path / "run" / "records"))
    assert credentials.secret not in said
    assert not [path for path, _ in run.list() if credentials.secret.encode() in run.read(path)]


# A bad day of the server.


@on_google
def test_throttled_requests_of_a_cloud_succeed_in_the_end(bucket: str, credentials: Server, hasty: None) -> None:
    for act in (
        lambda store: store.put("a", b"x"),
        lambda store: store.put_if_absent("b", b"x"),
        lambda store: store.read("a"),
        lambda store: store.exists("a"),
        lambda store: store.list(),
        lambda store: store.delete("a"),
    ):
        with Faulty(credentials, first(1, SLOW_DOWN)) as proxy:
            act(open_store(bucket))
            assert proxy.answered == 1
    assert open_store(bucket).list() == [("b", 1)]


@on_google
def test_throttling_of_a_cloud_without_end_is_no_lasting_failure(bucket: str, credentials: Server, hasty: None) -> None:
    with Faulty(credentials, first(1000, SLOW_DOWN)) as proxy:
        with pytest.raises(StoreError, match="the server answers SlowDown") as caught:
            open_store(bucket).read("a")
        assert not caught.value.lasting
        assert proxy.answered == 4


@on_google
def test_a_body_that_breaks_off_is_read_again(bucket: str, credentials: Server, hasty: None) -> None:
    data = os.urandom(100_000)
    open_store(bucket).put("image", data)
    with Faulty(credentials, first(1, BREAK_OFF, "GET")) as proxy:
        assert open_store(bucket).read("image") == data
        assert proxy.answered == 1
    with Faulty(credentials, first(100, BREAK_OFF, "GET")), pytest.raises(StoreError) as caught:
        open_store(bucket).read("image")
    assert not caught.value.lasting


@on_google
def test_no_permission_on_a_cloud(bucket: str, credentials: Server) -> None:
    open_store(bucket).put("image", b"x")
    with Faulty(credentials, lambda *_: DENIED):
        store = open_store(bucket)
        with pytest.raises(PermissionError, match="image"):  # one image that may not be read is one row
            store.read("image")
        for act in (store.list, lambda: store.put("a", b""), lambda: store.put_if_absent("a", b""),
                    lambda: store.delete("image"), lambda: store.exists("image")):  # fmt: skip
            with pytest.raises(StoreError, match="denied") as caught:
                act()
            assert caught.value.lasting
    assert open_store(bucket).read("image") == b"x"


@on_google
def test_a_server_that_ignores_the_condition_is_noticed_and_said(
    bucket: str, credentials: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def without(headers: dict[str, str]) -> dict[str, str]:
        return {name: value for name, value in headers.items() if name.lower() != "x-goog-if-generation-match"}

    with Faulty(credentials, lambda *_: None) as proxy, caplog.at_level(logging.INFO, logger="diffva"):
        proxy.translate = without
        store = open_store(bucket)
        assert store.put_if_absent("a", b"one")
        assert store.put_if_absent("b", b"two")
        assert not store.put_if_absent("a", b"three")
        assert store.read("a") == b"one"
    assert caplog.text.count("no conditional PUT") == 1


@on_azurite
def test_another_conflict_is_looked_at_again(bucket: str, credentials: Server) -> None:
    """Azure answers 409 for leases and copies, too: no proof that the file is there."""
    with Faulty(credentials, first(2, (409, "LeaseIdMissing"), "PUT")) as proxy:
        assert open_store(bucket).put_if_absent("a", b"one")
        assert proxy.answered == 2
    assert open_store(bucket).read("a") == b"one"


# Addresses and credentials.


@on_clouds
def test_a_bucket_that_is_not_there(bucket: str) -> None:
    for command in (("status", f"{bucket}x/run"), ("verify", f"{bucket}x/run")):
        refused = invoke(*command)
        assert refused.exit_code in (2, 5)
        assert one_line(refused)
    with pytest.raises(StoreError, match="the bucket does not exist") as caught:
        open_store(f"{bucket}x/run").put("a", b"")
    assert caught.value.lasting


@on_azurite
def test_a_wrong_key_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
    for act in (lambda store: store.put("a", b""), lambda store: store.list()):
        with pytest.raises(StoreError, match="AZURE_STORAGE_ACCOUNT_KEY") as caught:
            act(open_store(bucket))
        assert caught.value.lasting
        assert "d3Jvbmc" not in str(caught.value)


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nobody listens (its port is bound, so that nobody else gets it)."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@on_google
def test_no_credentials_for_a_cloud(
    bucket: str, nobody: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hasty: None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GCE_METADATA_HOST", nobody)
    monkeypatch.setenv("GCE_METADATA_ROOT", nobody)
    monkeypatch.setenv("GCE_METADATA_IP", nobody)
    monkeypatch.delenv("GOOGLE_BEARER_TOKEN")
    for address, hint in ((bucket, "GOOGLE_APPLICATION_CREDENTIALS"), ("az://images", "AZURE_STORAGE_ACCOUNT_NAME")):
        refused = invoke("status", f"{address}/run")
        assert refused.exit_code == 5
        assert "no credentials found" in (said := one_line(refused))
        assert hint in said
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    refused = invoke("status", f"{bucket}/run")
    assert (refused.exit_code, "none.json" in one_line(refused)) == (5, True)


@on_google
def test_an_endpoint_of_a_cloud_where_nobody_answers(
    bucket: str, nobody: str, monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    monkeypatch.setenv("GOOGLE_BASE_URL", f"http://{nobody}")
    refused = invoke("status", f"{bucket}/run")
    assert refused.exit_code == 5
    assert f"no answer from http://{nobody}" in one_line(refused)


@pytest.mark.parametrize("address", ["gs://", "gs:///run", "gs://key:secret@images/run", "az://", "az://k@c/run"])
def test_an_address_that_is_none_is_refused_unseen(address: str) -> None:
    refused = invoke("status", address)
    assert refused.exit_code == 2, refused.output
    assert one_line(refused)
    assert "secret" not in refused.output.replace("hold credentials", "")
