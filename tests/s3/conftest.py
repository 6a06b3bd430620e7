"""Object stores on loopback: moto's server, which knows all of S3, and OpenStack Swift, which checks signatures."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer
from swift_server import KEY, SECRET, Swift, free_ports, why_not

from diffva_ray.storage.s3 import S3Store


class Server(NamedTuple):
    kind: str
    endpoint: str
    key: str
    secret: str


@pytest.fixture(scope="session", params=["moto", "swift"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One running server; a test gets both, unless it is parametrised with one of them (``indirect``)."""
    if request.param == "swift":
        folder = tmp_path_factory.mktemp("swift")
        if reason := why_not(folder):
            pytest.skip(reason)
        swift = Swift(folder)
        yield Server("swift", swift.endpoint, KEY, SECRET)
        swift.stop()
        return
    [port] = free_ports(1)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "_key_response_put", one_at_a_time(S3Response._key_response_put))
        moto.start()
        yield Server("moto", f"http://127.0.0.1:{port}", "key-of-the-moto", "secret-of-the-moto")
        moto.stop()


def one_at_a_time(put: Any) -> Any:
    """moto looks, then writes; S3 does both in one step, and so does moto with a lock around them."""
    lock = threading.Lock()

    def locked(*arguments: Any) -> Any:
        with lock:
            return put(*arguments)

    return locked


@pytest.fixture
def credentials(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server's endpoint and credentials in the environment, and nothing else that botocore reads there."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return server


@pytest.fixture
def bucket(credentials: Server) -> str:
    """The address of an empty bucket."""
    name = f"images-{uuid4().hex[:12]}"
    S3Store(f"s3://{name}").fs.mkdir(name)
    return f"s3://{name}"
