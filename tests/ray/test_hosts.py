"""A cluster of several hosts that share nothing but the network: a head, two nodes, and an object store."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import BIN, hosts, why_not

from diffva_ray.config.recipe import Recipe, to_yaml

ROOT = Path(__file__).parents[2]
KEY, SECRET = "key-of-the-hosts", "secret-of-the-hosts"
UPLOAD = """
import sys
from pathlib import Path
from diffva_ray.storage.s3 import S3Store
folder, recipe = map(Path, sys.argv[1:])
S3Store("s3://images").fs.mkdir("images")
S3Store("s3://images").put("tiny.yaml", recipe.read_bytes())
for file in folder.rglob("*"):
    if file.is_file():
        S3Store("s3://images/images").put(str(file.relative_to(folder)), file.read_bytes())
"""


def test_hosts_that_share_nothing_train_generate_and_reduce(
    tiny: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_"))]:  # a private Ray's, for instance
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0",
        "RAY_BACKEND_LOG_LEVEL": "fatal", "GLOO_SOCKET_IFNAME": "eth0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(to_yaml(tiny))
    with hosts("head", "node1", "node2", "store") as (head, *nodes, store):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{store.address}:9000")
        store.start(BIN / "moto_server", "-H", store.address, "-p", "9000").until("Running on")
        # from the disk of this machine, which no host sees, over the network of a host
        upload = ["nsenter", "-t", str(store.holder.pid), "-n", sys.executable, "-c", UPLOAD, str(images), str(recipe)]
        subprocess.run(upload, check=True, timeout=100)
        gcs = f"{head.address}:6379"
        ray = [BIN / "ray", "start", "--disable-usage-stats", "--block", "--object-store-memory", "100000000"]
        head.start(
            *ray, "--head", "--port", "6379", "--node-ip-address", head.address, "--num-cpus", "0",
            "--include-dashboard", "false",
        ).until("Ray runtime started")  # fmt: skip
        for node in nodes:
            address = ["--address", gcs, "--node-ip-address", node.address]
            node.start(*ray, *address, "--num-cpus", "1").until("Ray runtime started")

        def diffva(words: str) -> str:
            return head.run(sys.executable, "-m", "diffva_ray.cli", *words.split(), RAY_ADDRESS=gcs)

        settings = "--recipe s3://images/tiny.yaml"
        diffva(f"train --data s3://images/images --out s3://images/model {settings} --workers 2")
        where = "--data s3://images/images --model s3://images/model --out s3://images/run"
        diffva(f"generate {where} {settings} --actors 2 --set generate.shard_size=2")
        diffva("reduce s3://images/run")
        assert "complete and sound" in diffva("verify s3://images/run")
        for host in (head, *nodes):
            assert host.run("ls", "/tmp/cwd") == ""
