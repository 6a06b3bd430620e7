"""cluster/grafana.json: has what Grafana needs to import it, and every metric in it is exported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import ray
from head import ROOT, Head, wait_for

BOARD = json.loads((ROOT / "cluster" / "grafana.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
METRIC = re.compile(r"\bray_\w+")
# Reported only by nodes with a GPU, so they cannot be scraped here; they have to be in Ray's own dashboards.
GPU_METRICS = {"ray_node_gpus_utilization", "ray_node_gram_used"}

# A worker on the cluster that increments our counters, which Ray's agent exports.
WORKER = """
import sys, time
import ray
from diffva_ray.distributed.prometheus import GenerationMetrics, TrainingMetrics

@ray.remote(num_cpus=0)
class Worker:
    def __init__(self):
        self.counts, self.training = GenerationMetrics("runs/board"), TrainingMetrics("models/board")
    def work(self):
        self.counts.begin()
        self.counts.commit({"records": 3, "ok": 2, "seconds": {"read": 0.5, "generate": 2.0}})
        self.training.checkpoint({"loss": 0.25})

ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
worker = Worker.remote()
ray.get(worker.work.remote())
sys.stdin.read()
"""


def metrics(text: str) -> set[str]:
    return set(METRIC.findall(text))


def scrape(head: Head) -> str:
    with urllib.request.urlopen(head.metrics, timeout=30) as answer:
        return answer.read().decode()


def test_grafana_can_import_it() -> None:
    (data_source,) = BOARD["__inputs"]
    assert (data_source["type"], data_source["pluginId"]) == ("datasource", "prometheus")
    source = {"type": "prometheus", "uid": f"${{{data_source['name']}}}"}
    assert BOARD["id"] is None
    assert BOARD["schemaVersion"] >= 36
    assert {entry["id"] for entry in BOARD["__requires"]} >= {panel["type"] for panel in PANELS} | {"prometheus"}
    assert {"run", "model"} <= set(VARIABLES)
    for panel in PANELS:
        assert panel["description"]
        assert panel["datasource"] == source
        assert all(target["datasource"] == source for target in panel["targets"])
    assert all(VARIABLES[name]["datasource"] == source for name in ("run", "model"))
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for panel in BOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24


def test_queries_know_their_variables_and_windows() -> None:
    for query in QUERIES:
        assert set(re.findall(r"\$(\w+)", query)) <= set(VARIABLES) | {"__range"}, query
        assert query.count("(") == query.count(")"), query
        for call in re.findall(r"rate\((ray_\w+)", query):
            assert call.endswith(("_total", "_bucket")), f"{call} is no counter"


def test_every_metric_exists(head: Head) -> None:
    queried = {
        name
        for text in (*QUERIES, *(str(variable["query"]) for variable in VARIABLES.values()))
        for name in metrics(text)
    }
    assert len(queried) >= 10
    gpu_metrics = GPU_METRICS & set().union(*(metrics(file.read_text()) for file in panels_of_ray()))
    assert gpu_metrics == GPU_METRICS
    environment = {**head.environment, "RAY_ADDRESS": head.gcs}
    worker = subprocess.Popen([sys.executable, "-c", WORKER], env=environment, cwd=ROOT, stdin=subprocess.PIPE)
    try:
        wait_for(lambda: worker.poll() is not None or queried - gpu_metrics <= metrics(scrape(head)), 60)
        text = scrape(head)
    finally:
        worker.communicate()
    assert queried - gpu_metrics <= metrics(text), f"not exported: {sorted(queried - gpu_metrics - metrics(text))}"
    assert worker.returncode == 0
    for name, tags, value in (
        ("ray_diffva_records_done_total", {"run": "runs/board"}, 3),
        ("ray_diffva_records_quarantined_total", {"run": "runs/board"}, 1),
        ("ray_diffva_stage_seconds_total", {"run": "runs/board", "stage": "generate"}, 2),
        ("ray_diffva_shard_seconds_sum", {"run": "runs/board"}, 2.5),
        ("ray_diffva_train_loss", {"model": "models/board"}, 0.25),
    ):
        assert value in found(text, name, tags), f"{name} {tags}"


def panels_of_ray() -> list[Path]:
    """Ray's own dashboards."""
    return sorted((Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards").glob("*_panels.py"))


def found(text: str, name: str, tags: dict[str, Any]) -> list[float]:
    """Values of a metric's series with these tags."""
    lines = [line for line in text.splitlines() if line.startswith(name + "{")]
    return [
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if all(f'{key}="{value}"' in line for key, value in tags.items())
    ]
