"""``--push-to`` against a local server that speaks the part of the hub's protocol which uploads small files."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from export_files import tree

Export = Callable[..., Result]


class Hub(ThreadingHTTPServer):
    """The hub: its data sets by name, and the status with which it refuses everything, if any."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.refuse = 0


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.refuse:
            return self.answer({"error": "refused"}, self.server.refuse)
        name = "/".join(self.path.split("/")[3:5])
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self.server.private[name] = asked.get("private") is True or asked.get("visibility") == "private"
            return self.answer({"url": f"{self.base}/datasets/{name}", "name": name})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self.answer({"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{self.base}/datasets/{name}/commit/1", "commitOid": "1" * 40})
        return self.answer({})  # the check of the card's header

    def do_GET(self) -> None:
        self.answer({"id": "org/name", "sha": "0" * 40, "siblings": [], "private": True})

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


def test_the_whole_export_is_uploaded_as_a_private_data_set(
    finished: Path, export: Export, tmp_path: Path, hub: Hub
) -> None:
    result = export(finished, "huggingface", "--push-to", "org/name")
    assert result.exit_code == 0, result.output
    assert hub.repositories["org/name"] == tree(tmp_path / "out")
    assert hub.private["org/name"] is True
    assert "datasets/org/name" in result.output


def test_a_refused_upload_keeps_the_export(finished: Path, export: Export, tmp_path: Path, hub: Hub) -> None:
    hub.refuse = 401
    result = export(finished, "huggingface", "--push-to", "org/name")
    assert (result.exit_code, "HF_TOKEN" in result.stderr) == (2, True)
    assert (tmp_path / "out" / "_SUCCESS").exists()
    hub.refuse = 0
    assert export(finished, "huggingface", "--push-to", "org/name").exit_code == 0
    assert hub.repositories["org/name"] == tree(tmp_path / "out")


@pytest.mark.parametrize("name", ["no name", "a/b/c"])
def test_a_name_that_is_none_is_refused(name: str, finished: Path, export: Export, hub: Hub) -> None:
    result = export(finished, "huggingface", "--push-to", name)
    assert (result.exit_code, name in result.stderr) == (2, True)


def test_no_answer_is_one_line(finished: Path, export: Export, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    result = export(finished, "huggingface", "--push-to", "org/name")
    assert (result.exit_code, "cannot be reached" in result.stderr) == (5, True), result.output
