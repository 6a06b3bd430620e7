"""What workers count, for Prometheus: every node of a cluster exports it beside Ray's own metrics, under ``ray_``.

Tags are few and take few values (a run, a stage of the work): a record or a shard is never one.
"""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

SHARD_SECONDS = [
    5.0,
    15.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
    1200.0,
    1800.0,
]  # seconds; a shard should take three to ten minutes


class GenerationMetrics:
    """Counts of one worker of a run."""

    def __init__(self, run: str) -> None:
        tags = {"run": run}
        self.attempts = counter("diffva_shard_attempts", "Shards begun; more than committed: workers die", tags)
        self.shards = counter("diffva_shards_committed", "Shards committed", tags)
        self.records = counter("diffva_records_done", "Records committed, quarantined ones too", tags)
        self.quarantined = counter("diffva_records_quarantined", "Records committed with a status other than ok", tags)
        self.stages = counter("diffva_stage_seconds", "Seconds of work, by stage of a shard", tags, "stage")
        self.seconds = Histogram("diffva_shard_seconds", "Seconds a shard took", SHARD_SECONDS, ("run",))
        self.seconds.set_default_tags(tags)

    def begin(self) -> None:
        """A shard is taken up."""
        self.attempts.inc()

    def commit(self, report: dict[str, Any]) -> None:
        """A shard is done: the report of ``generate.shard.run_shard``, empty when another worker had committed it."""
        if not report["records"]:
            return
        self.shards.inc()
        self.records.inc(report["records"])
        if report["records"] > report["ok"]:  # a counter takes no zero
            self.quarantined.inc(report["records"] - report["ok"])
        for stage, seconds in report["seconds"].items():
            if seconds > 0:
                self.stages.inc(seconds, {"stage": stage})
        self.seconds.observe(sum(report["seconds"].values()))


class TrainingMetrics:
    """Counts of the first worker of a training."""

    def __init__(self, model: str) -> None:
        self.checkpoints = counter("diffva_train_checkpoints", "Checkpoints written", {"model": model})
        self.loss = Gauge("diffva_train_loss", "Loss at the last checkpoint", ("model",))
        self.loss.set_default_tags({"model": model})

    def checkpoint(self, metrics: dict[str, float]) -> None:
        """A checkpoint is written, with the loss where one is known yet."""
        self.checkpoints.inc()
        if "loss" in metrics:
            self.loss.set(metrics["loss"])


def counter(name: str, description: str, tags: dict[str, str], *more: str) -> Counter:
    """A counter with ``tags`` set; ``more`` are keys that each increment gives."""
    found = Counter(name, description, (*tags, *more))
    found.set_default_tags(tags)
    return found
