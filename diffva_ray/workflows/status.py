"""``diffva status``: progress of a run or a training, read from its folder alone, so that it works on any machine and
after the driver has died."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from diffva_ray.data.dataset import UnusableData
from diffva_ray.generate.committed import overlays, parts
from diffva_ray.generate.run import SUCCESS, Run, find_run, part
from diffva_ray.model.card import PROGRESS, TRAINING, read_card
from diffva_ray.progress import duration
from diffva_ray.schema import Status
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store


def read_status(uri: str) -> dict[str, Any]:
    """Return the counts of a run, or the position of a training. Raises UnusableData if ``uri`` is neither."""
    # A run.
    store = open_store(uri)
    run = find_run(store)
    if run is not None:
        return _run_status(run)

    # A model, complete or in training.
    card = read_card(store)
    progress = _read_json(store, PROGRESS)
    if card is None and progress is None and not store.exists(TRAINING):
        raise UnusableData(f"{uri}: neither a run (run.json) nor a model (diffva.json)")
    status: dict[str, Any] = {"kind": "model", "uri": store.uri, "trained": card is not None}
    if card is not None:
        status |= {"digest": card["digest"], "recipe": card["recipe"]["name"]}
    if progress is not None:
        status |= {key: progress[key] for key in ("stage", "step", "stage_steps", "done", "total", "loss", "seconds")}
        left = (progress["total"] - progress["done"]) * progress["seconds"] / max(progress["done"], 1)
        status["seconds_left"] = 0.0 if card else round(left, 1)
    return status


def _run_status(run: Run) -> dict[str, Any]:
    """Counts, worker time and bottleneck of a run."""
    # Records by status.
    sizes = run.shard_sizes()
    done = sorted(shard for shard in run.done() if shard < run.shards)
    counted: Counter[str] = Counter()
    for _, table in parts(run, ["status"]):
        counted.update(table["status"].to_pylist())
    counts = dict(sorted(counted.items()))

    # Worker time by stage, and the pace that follows.
    seconds: dict[str, float] = {}
    for shard in done:
        for stage, value in (_read_json(run.store, f"timings/{part(shard)}.json") or {}).items():
            seconds[stage] = seconds.get(stage, 0.0) + value
    records = sum(sizes[shard] for shard in done)
    work = sum(seconds.values())
    bottleneck = max(seconds, key=lambda stage: seconds[stage]) if work else None
    rate = records / work if work else None
    records_left = run.about["records"] - records
    return {
        "kind": "run",
        "uri": run.store.uri,
        "planned": run.about["records"],
        "done": records,
        "ok": counts.get(Status.OK.value, 0),
        "quarantined": records - counts.get(Status.OK.value, 0),
        "by_status": counts,
        "shards": run.shards,
        "shards_done": len(done),
        "finished": run.store.exists(SUCCESS),
        "retries": len(overlays(run)),
        "seconds_by_stage": {stage: round(value, 2) for stage, value in seconds.items()},
        "bottleneck": bottleneck,
        "bottleneck_share": round(seconds[bottleneck] / work, 3) if bottleneck else None,
        "records_per_worker_second": round(rate, 3) if rate else None,
        "worker_seconds_left": round(records_left / rate, 1) if rate else None,
    }


def _read_json(store: Store, path: str) -> Any:
    """Content of a JSON file, None if it is missing or incomplete."""
    try:
        return json.loads(store.read(path))
    except (FileNotFoundError, ValueError):
        return None


def describe(status: dict[str, Any]) -> str:
    """Format a status in a few lines of text."""
    # A model.
    if status["kind"] == "model":
        if status["trained"]:
            return f"{status['uri']}: trained (recipe {status['recipe']}, digest {status['digest'][:12]})"
        if "done" not in status:
            return f"{status['uri']}: training has started and has not reported yet"
        loss = "" if status["loss"] is None else f"loss {status['loss']:.4f}, "
        return (
            f"{status['uri']}: {status['done']} of {status['total']} steps, stage {status['stage']}, "
            f"{loss}about {duration(status['seconds_left'])} left at this rate"
        )

    # A run.
    lines = [
        f"{status['uri']}: {status['done']} of {status['planned']} records done, "
        f"{status['shards_done']} of {status['shards']} shards" + (", finished" if status["finished"] else "")
    ]
    if status["quarantined"]:
        bad = ", ".join(f"{n} {name}" for name, n in status["by_status"].items() if name != Status.OK.value)
        lines.append(f"quarantined: {bad}")
    if status["seconds_by_stage"]:
        spent = ", ".join(f"{stage} {value:.1f}s" for stage, value in status["seconds_by_stage"].items())
        lines.append(f"worker time: {spent}; {status['records_per_worker_second']} records per worker second")
        stage, share = status["bottleneck"], status["bottleneck_share"]
        lines.append(f"bottleneck: {stage}, {share:.0%} of the worker time")
    if status["worker_seconds_left"]:
        lines.append(f"left: {duration(status['worker_seconds_left'])} of one worker's time")
    return "\n".join(lines)
