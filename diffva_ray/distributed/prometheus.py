"""Prometheus metrics of the workers: every node of a cluster exports them with Ray's own metrics, prefixed ``ray_``.

Tags have few values (run, model, stage of the work), never one for each record or shard.
"""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

# Histogram buckets in seconds; a shard should take three to ten minutes.
SHARD_SECONDS = [5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0]


class GenerationMetrics:
    """Metrics of one generation worker."""

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
        """Count the start of a shard."""
        self.attempts.inc()

    def commit(self, report: dict[str, Any]) -> None:
        """Count a finished shard from its report of ``generate.shard.run_shard``; it has no records if another worker
        had already committed the shard."""
        if not report["records"]:
            return
        self.shards.inc()
        self.records.inc(report["records"])
        if report["records"] > report["ok"]:  # a counter cannot be increased by zero
            self.quarantined.inc(report["records"] - report["ok"])
        for stage, seconds in report["seconds"].items():
            if seconds > 0:
                self.stages.inc(seconds, {"stage": stage})
        self.seconds.observe(sum(report["seconds"].values()))


class TrainingMetrics:
    """Metrics of the first training worker."""

    def __init__(self, model: str) -> None:
        self.checkpoints = counter("diffva_train_checkpoints", "Checkpoints written", {"model": model})
        self.loss = Gauge("diffva_train_loss", "Loss at the last checkpoint", ("model",))
        self.loss.set_default_tags({"model": model})

    def checkpoint(self, metrics: dict[str, float]) -> None:
        """Count a checkpoint, and set the loss if one has been logged."""
        self.checkpoints.inc()
        if "loss" in metrics:
            self.loss.set(metrics["loss"])


def counter(name: str, description: str, tags: dict[str, str], *keys: str) -> Counter:
    """Make a counter with default ``tags``, and further tag ``keys`` whose values each increment gives."""
    made = Counter(name, description, (*tags, *keys))
    made.set_default_tags(tags)
    return made
