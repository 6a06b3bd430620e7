"""An address where no Ray answers fails at once with one line; Ray itself would retry for 15 minutes."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffva_ray.cli import main
from diffva_ray.distributed.session import UnusableCluster, check_address


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "RAY_API_SERVER_ADDRESS"),
        ("https://head:8265", "of a Ray dashboard"),
        (" ", "neither HOST:PORT"),
        ("nonsense", "neither HOST:PORT"),
        ("127.0.0.1:", "neither HOST:PORT"),
        (":6379", "neither HOST:PORT"),
        ("127.0.0.1:99999", "neither HOST:PORT"),
        ("ray://127.0.0.1", "neither HOST:PORT"),
    ],
)
def test_an_invalid_address_is_an_error(address: str, message: str) -> None:
    with pytest.raises(UnusableCluster, match=message) as caught:
        check_address(address)
    assert "unset it to run on this machine" in str(caught.value)


@pytest.mark.parametrize("address", ["", "auto", "local"])
def test_addresses_that_ray_resolves_are_not_checked(address: str) -> None:
    check_address(address)


def test_an_address_that_answers_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_address(f"127.0.0.1:{server.getsockname()[1]}")
        check_address(f"ray://127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize("form", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
@pytest.mark.parametrize("verb", ["generate", "train"])
def test_a_head_that_is_gone_is_one_line_within_seconds(
    form: str, verb: str, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = form.format(port=port)
    monkeypatch.setenv("RAY_ADDRESS", address)
    words = {"generate": ["--model", model, "--out", tmp_path / "run"], "train": ["--out", tmp_path / "model"]}[verb]
    began = time.monotonic()
    done = CliRunner().invoke(main, [verb, "--data", str(images), *map(str, words)])
    assert time.monotonic() - began < 60  # the contract says ten seconds; a busy machine imports for longer
    assert done.exit_code == 2, done.output
    assert done.output.splitlines()[-1].startswith(f"diffva {verb}: RAY_ADDRESS={address}: nothing answers there")
