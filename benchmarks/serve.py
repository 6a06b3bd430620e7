"""Load the HTTP service with concurrent clients: wrong and lost answers, latency, rate against the engine's own.

    python benchmarks/serve.py --requests 2000 --clients 64 --out benchmarks/results/serve.json

Every answer is compared with the engine's own for the same image and seed. Without ``--no-kill`` a replica is killed
after half of the answers; clients repeat a request that was refused (429) or failed (5xx), as clients do.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import socket
import time
from pathlib import Path
from typing import Any

import aiohttp
import click
import numpy as np

IMAGES, SEEDS = 16, 4  # different requests


def images() -> list[tuple[str, bytes]]:
    """Phantoms of 128 pixels as PNG files."""
    from diffva_ray.data.encoding import encode_grey, quantise
    from diffva_ray.data.phantoms import phantom

    return [(f"{n}.png", encode_grey(quantise(phantom("COVID", patient=n, size=128).image))) for n in range(IMAGES)]


async def load(
    uri: str, token: str, work: list[tuple[str, bytes, int]], clients: int, half: Any
) -> list[dict[str, Any]]:
    """Send all requests from ``clients`` clients; ``half()`` is called after half of the answers."""
    waiting, answers = iter(enumerate(work)), list[dict[str, Any]]()

    async def client(session: aiohttp.ClientSession) -> None:
        for n, (name, data, seed) in waiting:
            began, refused, failed = time.perf_counter(), 0, 0
            while True:
                form = aiohttp.FormData({"seed": str(seed)})
                form.add_field("image", data, filename=name)
                try:
                    async with session.post(f"{uri}/v1/counterfactuals", data=form) as answer:
                        status, body = answer.status, await answer.read()
                except aiohttp.ClientError:
                    status, body = 599, b""
                if status == 200:
                    break
                refused, failed = refused + (status == 429), failed + (status >= 500)
                if 400 <= status < 500 and status != 429:
                    raise SystemExit(f"{status}: {body!r}")
                await asyncio.sleep(0.2)
            seconds = time.perf_counter() - began
            answers.append({"n": n, "seconds": seconds, "refused": refused, "failed": failed, **json.loads(body)})
            if half and len(answers) == len(work) // 2:
                await asyncio.to_thread(half)

    headers, timeout = {"Authorization": f"Bearer {token}"}, aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return answers


def kill_replica() -> None:
    """Kill a process that holds the model."""
    import ray

    named = [one for one in ray.util.list_named_actors(all_namespaces=True) if "#Engine#" in one["name"]]
    ray.kill(ray.get_actor(named[0]["name"], namespace=named[0]["namespace"]))


@click.command()
@click.option("--model", default="small")
@click.option("--requests", default=2000)
@click.option("--clients", default=64)
@click.option("--replicas", default=1)
@click.option("--gpus", default=0.0)
@click.option("--kill/--no-kill", default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "serve.json")
def main(model: str, requests: int, clients: int, replicas: int, gpus: float, kill: bool, out: Path) -> None:
    """Run the load and write the results."""
    from diffva_ray.distributed import session
    from diffva_ray.explain.requests import Responder

    # The engine alone: what each request must give, and how fast a full batch is.
    files, responder = images(), Responder(model, device="cuda" if gpus else "cpu")
    different = [
        {"name": name, "data": data, "prompt": "", "seed": seed, "mask": b"", "settings": {}}
        for name, data in files
        for seed in range(SEEDS)
    ]
    responder(different[: responder.batch])
    began, expected = time.perf_counter(), responder(different)
    own_rate = len(different) / (time.perf_counter() - began)
    del responder

    token = "a token of this benchmark"
    os.environ["DIFFVA_SERVE_TOKEN"] = token
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with session.connect():
        from ray import serve

        from diffva_ray.distributed.serve import application

        serve.start(http_options={"host": "127.0.0.1", "port": port})
        arguments = {"model": model, "queue": clients, "gpus": gpus, "min_replicas": replicas, "max_replicas": replicas}
        serve.run(application(arguments))
        work = [(different[n % len(different)]["name"], different[n % len(different)]["data"],
                 different[n % len(different)]["seed"]) for n in range(requests)]  # fmt: skip
        uri = f"http://127.0.0.1:{port}"
        asyncio.run(load(uri, token, work[:clients], clients, None))  # warm
        began = time.perf_counter()
        answers = asyncio.run(load(uri, token, work, clients, kill_replica if kill else None))
        seconds = time.perf_counter() - began
        serve.shutdown()

    digests = [one["counterfactual_sha256"] for one in expected]
    wrong = sum(one["counterfactual_sha256"] != digests[one["n"] % len(different)] for one in answers)
    latencies = [one["seconds"] for one in answers]
    result = {
        "model": model, "requests": requests, "clients": clients, "replicas": replicas, "replica_killed": kill,
        "answers": len(answers), "lost": requests - len({one["n"] for one in answers}), "wrong": wrong,
        "refused_429": sum(one["refused"] for one in answers), "repeated_5xx": sum(one["failed"] for one in answers),
        "seconds": round(seconds, 2), "per_second": round(requests / seconds, 2),
        "engine_alone_per_second": round(own_rate, 2), "share_of_engine": round(requests / seconds / own_rate, 3),
        "p50_seconds": round(float(np.quantile(latencies, 0.5)), 3),
        "p95_seconds": round(float(np.quantile(latencies, 0.95)), 3),
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count()},
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
