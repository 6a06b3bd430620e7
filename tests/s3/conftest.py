"""Object stores on loopback: moto's server, which knows all of S3, OpenStack Swift, which checks signatures, and the
stores of other clouds."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from cloud_servers import ACCOUNT, TOKEN, Azurite, azurite_program, google
from cloud_servers import KEY as AZURITE_KEY
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer
from on_stores import upload
from swift_server import KEY, SECRET, Swift, free_ports, why_not

from diffva_ray.storage.s3 import S3Store

READ_BY_CLIENTS = ("AWS_", "GOOGLE_", "AZURE_")  # beginnings of the names of variables


class Server(NamedTuple):
    kind: str
    endpoint: str
    key: str
    secret: str
    behind: Any = None  # what has its buckets: Google's moto, or the process of Azurite

    @property
    def environment(self) -> dict[str, str]:
        """The variables that lead a client here."""
        if self.kind == "google":
            return {"GOOGLE_BASE_URL": self.endpoint, "GOOGLE_BEARER_TOKEN": self.secret}
        if self.kind == "azurite":
            return {
                "AZURE_STORAGE_ENDPOINT": self.endpoint,
                "AZURE_STORAGE_ACCOUNT_NAME": self.key,
                "AZURE_STORAGE_ACCOUNT_KEY": self.secret,
            }
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @contextmanager
    def as_s3(self) -> Iterator[None]:
        """The environment in which an S3 client reaches the buckets of this server, or of the moto behind it."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (self.behind or self).environment.items():
                patch.setenv(name, value)
            yield


@pytest.fixture(scope="session", params=["moto", "swift"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One running server; a test gets both of S3, unless it is parametrised with others (``indirect``)."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "swift":
        if reason := why_not(folder):
            pytest.skip(reason)
        swift = Swift(folder)
        yield Server("swift", swift.endpoint, KEY, SECRET)
        swift.stop()
    elif request.param == "azurite":
        if (program := azurite_program()) is None:
            pytest.skip("azurite-blob is not installed (npm install -g azurite); az:// is not tested")
        azurite = Azurite(program, folder)
        yield Server("azurite", azurite.endpoint, ACCOUNT, AZURITE_KEY, azurite)
        azurite.stop()
    else:
        with moto() as plain:
            if request.param == "moto":
                yield plain
            else:
                with google(plain.endpoint) as proxy:
                    yield Server("google", proxy.endpoint, "", TOKEN, plain)


@contextmanager
def moto() -> Iterator[Server]:
    """A running moto."""
    [port] = free_ports(1)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "_key_response_put", one_at_a_time(S3Response._key_response_put))
        server.start()
        yield Server("moto", f"http://127.0.0.1:{port}", "key-of-the-moto", "secret-of-the-moto")
        server.stop()


def one_at_a_time(put: Any) -> Any:
    """moto looks, then writes; S3 does both in one step, and so does moto with a lock around them."""
    lock = threading.Lock()

    def locked(*arguments: Any) -> Any:
        with lock:
            return put(*arguments)

    return locked


@pytest.fixture
def credentials(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server's endpoint and credentials in the environment, and nothing else that clients read there."""
    for name in [name for name in os.environ if name.startswith(READ_BY_CLIENTS)]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def bucket(credentials: Server) -> str:
    """The address of an empty bucket."""
    name = f"images{uuid4().hex[:12]}"  # moto cannot read the hyphens as obstore writes them
    if credentials.kind == "azurite":
        credentials.behind.create(name)
        return f"az://{name}"
    with credentials.as_s3():
        S3Store(f"s3://{name}").fs.mkdir(name)
    return f"{'gs' if credentials.kind == 'google' else 's3'}://{name}"


@pytest.fixture
def line(bucket: str, images: Path, model: Path) -> tuple[str, ...]:
    """The command that makes a run of eight records, its data and model on the server."""
    upload(images, f"{bucket}/data")
    upload(model, f"{bucket}/model")
    return ("generate", "--data", f"{bucket}/data", "--model", f"{bucket}/model", "--out", f"{bucket}/run",
            "--executor", "inline", "--limit", "8")  # fmt: skip
