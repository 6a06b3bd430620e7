"""Several nodes without a shared disk, for machines that cannot have hosts (test_hosts.py): images, model and run are
on S3 alone; every node has its own working folder, home and folder for temporary files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hosts as namespaces
import pytest
from ray.cluster_utils import Cluster

from diffva_ray.config.recipe import Recipe, to_yaml
from diffva_ray.generate.run import find_run
from diffva_ray.generate.verification import verify
from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.s3 import S3Store

sys.path.append(str(Path(__file__).parents[1] / "s3"))
from swift_server import KEY, SECRET, Swift, why_not

pytestmark = pytest.mark.skipif(namespaces.why_not() is None, reason="test_hosts.py runs here and proves more")
NODES = 2  # with a CPU each, beside a head without


@pytest.fixture
def hosts() -> Iterator[Path]:
    """Folder of the hosts. Not pytest's, whose path is too long: Ray's socket names may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="dn-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket of a Swift on loopback; endpoint and credentials are in the environment."""
    folder = tmp_path / "swift"
    folder.mkdir()
    if reason := why_not(folder):
        pytest.skip(reason)
    swift = Swift(folder)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", swift.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    S3Store("s3://images").fs.mkdir("images")
    yield "s3://images"
    swift.stop()


@contextmanager
def on_its_own_host(host: Path) -> Iterator[dict[str, str]]:
    """Processes started inside have this host's working folder, home and folder for temporary files."""
    places = {name: str(host / name.lower()) for name in ("HOME", "TMPDIR", "CWD")}
    for place in places.values():
        Path(place).mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", places["HOME"])
        patch.setenv("TMPDIR", places["TMPDIR"])
        patch.chdir(places["CWD"])
        yield {**os.environ}


@pytest.fixture
def cluster(bucket: str, hosts: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Started after the bucket: nodes have the credentials in their environment."""
    for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_BACKEND_LOG_LEVEL": "fatal", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    started = Cluster()
    for n in range(1 + NODES):
        with on_its_own_host(hosts / str(n)):
            started.add_node(num_cpus=min(n, 1), include_dashboard=False)
    yield started
    started.shutdown()


def command(cluster: Cluster, hosts: Path, driver: str, words: str) -> tuple[str, set[str]]:
    """Run a verb whose driver has its own host; return its output and the hosts that fetched a model."""
    fetched: set[str] = set()
    with on_its_own_host(hosts / driver) as environment, (hosts / driver / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "diffva_ray.cli", *words.split()],
            env={**environment, "RAY_ADDRESS": cluster.address}, stdout=log, stderr=log,
        )  # fmt: skip
        while process.poll() is None:
            fetched |= {path.relative_to(hosts).parts[0] for path in hosts.glob("*/tmpdir/diffva-*")}
            time.sleep(0.05)
    output = (hosts / driver / "log").read_text()
    assert process.returncode == 0, f"{words}\n{output[-3000:]}"
    return output, fetched


def test_only_s3_is_shared(cluster: Cluster, bucket: str, images: Path, tiny: Recipe, hosts: Path) -> None:
    for entry in LocalStore(str(images)).list():
        S3Store(f"{bucket}/images").put(entry.path, (images / entry.path).read_bytes())
    S3Store(bucket).put("tiny.yaml", to_yaml(tiny).encode())
    run, model, recipe = f"{bucket}/run", f"{bucket}/model", f"--recipe {bucket}/tiny.yaml"
    command(cluster, hosts, "driver0", f"train --data {bucket}/images --out {model} {recipe} --workers {NODES}")
    generate = f"generate --data {bucket}/images --model {model} {recipe} --out {run} --set generate.shard_size=2"
    _, fetched = command(cluster, hosts, "driver1", f"{generate} --actors {1 + NODES}")
    assert len(fetched) > 1, "only one node worked"
    command(cluster, hosts, "driver2", f"reduce {run}")
    command(cluster, hosts, "driver3", f"verify {run}")

    opened = find_run(open_store(run))
    assert opened is not None
    assert verify(opened) == []
    assert opened.store.exists("_SUCCESS")
    # Nothing was written where nodes of one disk would share it. Ray's sessions are the nodes themselves; a killed
    # worker leaves its copy of the model on its own host, and torch an empty cache.
    assert [str(path.relative_to(hosts)) for path in hosts.glob("*/cwd/*")] == []
    left = {path.name.partition("-")[0].partition("_")[0] for path in hosts.glob("*/tmpdir/*")}
    assert left <= {"diffva", "ray", "torchinductor"}
    assert [str(path.relative_to(hosts)) for path in hosts.glob("*/home/[!.]*")] == []  # caches of libraries are hidden
