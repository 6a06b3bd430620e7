"""By default a run grows with its cluster: Ray's own autoscaler, with raylets of a pretended GPU each as machines."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from head import Head

from diffva_ray.config.recipe import Recipe, to_yaml
from diffva_ray.generate.run import find_run
from diffva_ray.generate.verification import verify
from diffva_ray.storage.local import LocalStore

MAX_NODES = 3
EMPTY_MAPPINGS = ("auth", "docker", "file_mounts")
EMPTY_LISTS = (
    "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
    "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip


def configuration(gcs: str) -> dict:
    """Configuration of ``ray.cluster_utils.AutoscalingCluster``, which itself would end every Ray on the machine."""
    return {
        **{name: {} for name in EMPTY_MAPPINGS},
        **{name: [] for name in EMPTY_LISTS},
        "cluster_name": "growing", "max_workers": MAX_NODES, "upscaling_speed": 10.0, "idle_timeout_minutes": 5,
        "file_mounts_sync_continuously": False,
        "provider": {
            "type": "fake_multinode", "gcs_address": gcs, "use_node_id_as_ip": True,
            "disable_node_updaters": True, "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 1, "max_workers": MAX_NODES},
        },
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_uses_gpus_that_join_while_it_works(tiny: Recipe, images: Path, model: Path, tmp_path: Path) -> None:
    head = Head(autoscaling=configuration)
    try:
        recipe, run = tmp_path / "tiny.yaml", tmp_path / "run"
        small = {"shard_size": 1, "micro_batch": 1}
        recipe.write_text(to_yaml(tiny.model_copy(update={"generate": tiny.generate.model_copy(update=small)})))
        command = [sys.executable, Path(__file__).with_name("growing.py"), recipe, images, model, run]
        done = subprocess.run(
            list(map(str, command)), env={**head.environment, "RAY_ADDRESS": head.gcs}, capture_output=True, text=True,
            timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    finally:
        head.stop()
    assert "1 GPUs at the start" in done.stdout
    assert int(re.findall(r"(\d) GPUs in the end", done.stdout)[0]) > 1
    opened = find_run(LocalStore(str(run)))
    assert opened is not None
    assert verify(opened) == []
    # The new nodes also worked: with one actor, commits would be at least four seconds apart.
    commits = sorted(part.stat().st_mtime for part in run.glob("records/*.parquet"))
    assert min(later - now for now, later in itertools.pairwise(commits)) < 3
    assert json.loads((run / "run.json").read_text())["keys"]["device"] == "cuda"
