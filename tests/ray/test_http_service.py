"""The HTTP service on Ray Serve: pixels of generate, refusals in one line, a full queue, a killed replica."""

from __future__ import annotations

import asyncio
import shlex
import socket
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from diffva_ray.cli import main
from diffva_ray.data.dataset import UnusableData
from diffva_ray.distributed import session
from diffva_ray.evaluate.records import read_records
from diffva_ray.explain.requests import Responder
from diffva_ray.generate.run import PlanError, open_run
from diffva_ray.generate.verification import verify
from diffva_ray.model.packaged import model_address
from diffva_ray.studio.workspace import Question, Workspace

serve = pytest.importorskip("ray.serve", reason="SERVE TESTS SKIPPED: pip install 'diffva-ray[serve]'")
TOKEN = "a secret of this test"


@pytest.fixture(scope="module")
def service(model: Path) -> Iterator[str]:
    """Address of a service with one replica and a queue of four."""
    from diffva_ray.distributed.serve import TOKEN as VARIABLE
    from diffva_ray.distributed.serve import application

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        with pytest.raises(ValueError, match=VARIABLE):
            application({"model": str(model)})
        patch.setenv(VARIABLE, TOKEN)
        with session.connect(cpus=2):
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(application({"model": str(model), "queue": 4}))
            yield f"http://127.0.0.1:{port}"
            serve.shutdown()


async def post(client: aiohttp.ClientSession, uri: str, data: bytes, name: str = "a.png", **fields: Any) -> Any:
    form = aiohttp.FormData({key: str(value) for key, value in fields.items()})
    form.add_field("image", data, filename=name)
    async with client.post(f"{uri}/v1/counterfactuals", data=form) as answer:
        return answer.status, await answer.json()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Result of `work` from a thread of its own: the browser tests leave an event loop running in the main one."""
    with ThreadPoolExecutor(1) as other:
        return other.submit(asyncio.run, work).result()


def ask(uri: str, requests: list[dict[str, Any]], token: str = TOKEN) -> list[Any]:
    async def all_at_once() -> list[Any]:
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}, timeout=timeout) as client:
            return await asyncio.gather(*(post(client, uri, **request) for request in requests))

    return run(all_at_once())


@pytest.fixture(scope="module")
def paths(images: Path) -> list[Path]:
    return sorted((images / "COVID" / "images").iterdir())


def request(path: Path, seed: int = 0) -> dict[str, Any]:
    return {"data": path.read_bytes(), "name": path.name, "seed": seed}


@pytest.fixture(scope="module")
def expected(model: Path, paths: list[Path]) -> dict[tuple[str, int], str]:
    """Digest of the counterfactual by file name and seed, without Ray."""
    responder, found = Responder(str(model), device="cpu"), {}
    for path in paths:
        for seed in range(3):
            (answer,) = responder([{**request(path, seed), "prompt": "", "mask": b"", "settings": {}}])
            found[path.name, seed] = answer["counterfactual_sha256"]
    return found


def test_a_full_queue_is_429_and_every_answer_is_right(
    service: str, paths: list[Path], expected: dict[tuple[str, int], str]
) -> None:
    sent = [request(paths[n % len(paths)], n % 3) for n in range(150)]
    answers = ask(service, sent)
    statuses = {status for status, _ in answers}
    assert statuses <= {200, 429}
    assert 429 in statuses, "150 at once found room for all"
    done = [(one, answer) for one, (status, answer) in zip(sent, answers, strict=True) if status == 200]
    assert len(done) >= 4
    for one, answer in done:
        assert answer["counterfactual_sha256"] == expected[one["name"], one["seed"]]
    busy = next(answer for status, answer in answers if status == 429)
    assert busy == {"detail": "the queue is full; try again later"}


@pytest.mark.parametrize("painted", [False, True])
def test_the_studio_asks_the_service_and_keeps_an_ordinary_run(
    service: str, paths: list[Path], model: Path, painted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFVA_SERVE_TOKEN", TOKEN)
    monkeypatch.setattr("diffva_ray.studio.workspace.open_model", lambda *_: pytest.fail("a model was loaded"))
    workspace = Workspace(str(tmp_path / "studio"), str(model), service=service)
    region = np.zeros((40, 50), bool)
    region[5:30, 10:40] = True
    settings = ("generate.strength=0.7", "seed=3")
    question = Question(paths[0].name, paths[0].read_bytes(), "", settings, region if painted else None)
    reply = workspace.ask(question)
    assert list(verify(reply.run)) == []
    assert workspace.ask(question).record["record_id"] == reply.record["record_id"]
    assert [name for _, name in workspace.history()] == [Path(reply.run.store.uri).name]

    # The command makes the same record, in which metrics and map were computed here.
    arguments = shlex.split(reply.command)[1:]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "again")
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    again, own = (read_records(open_run(uri)).iloc[0] for uri in (str(tmp_path / "again"), reply.run.store.uri))
    same = [name for name in own.index if not name.endswith("_path")]
    pd.testing.assert_series_equal(again[same], own[same])

    # What the service refuses is one line, and leaves no answer.
    for name, data, prompt in (("b.png", b"no image", ""), ("b.png", question.data, "far too long " * 50)):
        with pytest.raises((UnusableData, PlanError)) as error:
            workspace.ask(Question(name, data, prompt))
        assert len(str(error.value).splitlines()) == 1
    assert len(workspace.history()) == 1


def test_the_studio_names_what_is_wrong_with_a_service(
    service: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token, uri, other, reason in (
        ("wrong", service, str(model), "DIFFVA_SERVE_TOKEN"),
        (TOKEN, service, model_address("small"), "model_digest"),
        (TOKEN, "http://127.0.0.1:9", str(model), "refused"),
        (TOKEN, "no address", str(model), "--service no address"),
    ):
        monkeypatch.setenv("DIFFVA_SERVE_TOKEN", token)
        with pytest.raises(UnusableData, match=reason) as error:
            Workspace(str(tmp_path / "studio"), other, service=uri)
        assert len(str(error.value).splitlines()) == 1


def test_refusals_are_one_line(service: str, paths: list[Path]) -> None:
    data = paths[0].read_bytes()
    (status, answer), *_ = ask(service, [request(paths[0])], token="wrong")
    assert (status, answer) == (401, {"detail": "give the token as Authorization: Bearer TOKEN"})
    for word, value in (("strength", 7), ("seed", "x"), ("method", "controlnet")):
        ((status, answer),) = ask(service, [{"data": data, word: value}])
        assert status == 422
        assert (value if word == "method" else word) in answer["detail"]
        assert len(answer["detail"].splitlines()) == 1
    ((status, answer),) = ask(service, [{"data": b"no image"}])
    assert (status, answer["detail"][:12]) == (422, "not an image")
    ((status, answer),) = ask(service, [{"data": bytes(64_000_001)}])
    assert status == 413

    async def others() -> list[int]:
        async with aiohttp.ClientSession() as client:
            found = []
            for method, path in (("GET", "/healthz"), ("GET", "/openapi.json"), ("GET", "/v1/model")):
                async with client.request(method, f"{service}{path}") as answer:
                    found.append(answer.status)
            return found

    assert run(others()) == [200, 200, 401]


def test_a_killed_replica_is_replaced(service: str, paths: list[Path], expected: dict[tuple[str, int], str]) -> None:
    import ray

    named = [one for one in ray.util.list_named_actors(all_namespaces=True) if "#Engine#" in one["name"]]
    (replica,) = named
    ray.kill(ray.get_actor(replica["name"], namespace=replica["namespace"]), no_restart=True)
    for _attempt in range(120):
        ((status, answer),) = ask(service, [request(paths[0])])
        if status == 200:
            break
    assert answer["counterfactual_sha256"] == expected[paths[0].name, 0]
