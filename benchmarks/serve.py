"""Load the HTTP service with concurrent clients: wrong and lost answers, latency, rate against the engine's own.

    python benchmarks/serve.py --requests 2000 --clients 64 --out benchmarks/results/serve.json

Every answer is compared with the engine's own for the same image and seed. Unless ``--no-kill`` is given, a replica is
killed after half of the answers; clients repeat a request that was refused (429) or failed (5xx), as clients do. The
engine's own rate is that of one process with one thread (or GPU), as a replica has, before and after the load: requests
are decoded, generated, measured and encoded one micro-batch after the other.
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
import psutil

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
            answers.append(
                {
                    "n": n,
                    "at": time.perf_counter(),
                    "seconds": seconds,
                    "refused": refused,
                    "failed": failed,
                    **json.loads(body),
                }
            )
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


def cpu_seconds() -> dict[str, float]:
    """CPU time of this process (the clients) and of Ray's processes by their kind."""
    kinds = {"ServeReplica:default:Engine": "engine", "ServeReplica:default:Api": "api", "ProxyActor": "proxy"}
    found = dict.fromkeys([*kinds.values(), "other_ray"], 0.0)
    for process in psutil.Process().children(recursive=True):
        try:
            name, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:  # it has ended
            continue
        found[next((kind for part, kind in kinds.items() if part in name), "other_ray")] += times.user + times.system
    return {"clients": time.process_time(), **found}


def own_rate(responder: Any, requests: list[dict[str, Any]]) -> tuple[float, float, list[dict[str, Any]]]:
    """Images per second and CPU seconds per image of the engine alone, and its answers."""
    responder(requests[: responder.batch])  # warm
    began, cpu, answers = time.perf_counter(), time.process_time(), responder(requests)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return len(requests) / seconds, cpu / len(requests), answers


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

    # The engine alone: what each request must give, and how fast full batches are.
    files, responder = images(), Responder(model, device="cuda" if gpus else "cpu")
    different = [
        {"name": name, "data": data, "prompt": "", "seed": seed, "mask": b"", "settings": {}}
        for name, data in files
        for seed in range(SEEDS)
    ]
    before, cpu_alone, expected = own_rate(responder, different)
    killed = list[float]()  # CPU seconds of the replica that is killed, which end with it

    def half() -> None:
        killed.append(cpu_seconds()["engine"])
        kill_replica()

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
        cpu, began = cpu_seconds(), time.perf_counter()
        answers = asyncio.run(load(uri, token, work, clients, half if kill else None))
        seconds = time.perf_counter() - began
        spent = {kind: value - cpu[kind] for kind, value in cpu_seconds().items()}
        spent["engine"] += sum(killed)
        serve.shutdown()
    after, _, _ = own_rate(responder, different)

    digests = [one["counterfactual_sha256"] for one in expected]
    wrong = sum(one["counterfactual_sha256"] != digests[one["n"] % len(different)] for one in answers)
    latencies, alone = [one["seconds"] for one in answers], replicas * (before + after) / 2
    pause = float(np.diff([began, *sorted(one["at"] for one in answers)]).max())
    result = {
        "model": model, "requests": requests, "clients": clients, "replicas": replicas, "replica_killed": kill,
        "answers": len(answers), "lost": requests - len({one["n"] for one in answers}), "wrong": wrong,
        "refused_429": sum(one["refused"] for one in answers), "repeated_5xx": sum(one["failed"] for one in answers),
        "seconds": round(seconds, 2), "per_second": round(requests / seconds, 2),
        "engine_alone_per_second": [round(replicas * rate, 2) for rate in (before, after)],
        "share_of_engine": round(requests / seconds / alone, 3),
        "longest_pause_seconds": round(pause, 2),
        "share_of_engine_without_pause": round(requests / (seconds - pause) / alone, 3),
        "p50_seconds": round(float(np.quantile(latencies, 0.5)), 3),
        "p95_seconds": round(float(np.quantile(latencies, 0.95)), 3),
        "cpu_ms_per_request": {kind: round(1000 * value / requests, 1) for kind, value in spent.items()},
        "engine_alone_cpu_ms_per_request": round(1000 * cpu_alone, 1),
        "cores_used": {kind: round(value / seconds, 2) for kind, value in spent.items()},
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "load_average": os.getloadavg()},
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
