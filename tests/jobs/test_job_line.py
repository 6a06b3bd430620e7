"""``ray job submit`` from images to page, against a head with token authentication; exit codes, stop and resubmit."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.error
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from head import ROOT, RUNTIME_ENV, SECRET, Head, wait_for

from diffva_ray.generate.run import find_run
from diffva_ray.generate.verification import verify
from diffva_ray.storage.local import LocalStore

MAX_UPLOAD_BYTES = 20_000_000  # the packaged model has 15 MB


def records(run: Path) -> pd.DataFrame:
    parts = [pd.read_parquet(part) for part in sorted(run.glob("records/part-*.parquet"))]
    return pd.concat(parts, ignore_index=True)


def sound(run: Path) -> bool:
    opened = find_run(LocalStore(str(run)))
    return opened is not None and verify(opened) == []


def generate(images: Path, model: Path, run: Path, *more: str) -> list[str]:
    return ["--data", str(images), "--model", str(model), "--out", str(run), "--actors", "1", *more]


@pytest.mark.timeout(900)
def test_the_commands_of_the_page_work(head: Head, tmp_path: Path) -> None:
    """Run the commands of docs/cluster.md, on a cluster that is already running and with another HOME."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    lines = page.split("## Try it on one machine")[1].split("```")[1].replace("\\\n", " ").strip().splitlines()
    ours = ("export RAY_", "(umask 077; ray get-auth-token", "ray start", "ray stop")  # about the cluster itself
    typed = [line for line in lines if not line.startswith(ours)]
    assert [line.split()[0] for line in typed if line] == ["TRY=$HOME/diffva-try", "diffva", *["ray"] * 4]
    variables = {**head.environment, "HOME": str(tmp_path), "RAY_API_SERVER_ADDRESS": head.address}
    script = "\n".join(["set -e", *typed])
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    run = tmp_path / "diffva-try" / "run"
    assert sound(run)
    assert (run / "_SUCCESS").exists()
    assert (run / "report" / "index.html").stat().st_size > 10_000


def test_every_file_of_the_package_is_uploaded_and_used(head: Head, wheel: Path, tmp_path: Path) -> None:
    """Excludes are gitignore patterns: an unanchored ``data`` takes diffva_ray/data along (ray-project/ray#25874)."""
    where, program = tmp_path / "where.txt", tmp_path / "where.py"
    program.write_text(
        "import importlib, pathlib, pkgutil, sys, diffva_ray\n"
        "names = [m.name for m in pkgutil.walk_packages(diffva_ray.__path__, 'diffva_ray.') if m.ispkg]\n"
        "files = [importlib.import_module(name).__file__ for name in ['diffva_ray', *names]]\n"
        "pathlib.Path(sys.argv[1]).write_text('\\n'.join(files))\n"
    )
    done = head.ray(
        "job", "submit", "--address", head.address, "--submission-id", "where", "--working-dir", ".",
        "--runtime-env", RUNTIME_ENV.relative_to(ROOT), "--", "python", program, where,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    files = [Path(line) for line in where.read_text().splitlines()]
    upload = files[0].parents[1]
    assert upload.name.startswith("_ray_pkg_")
    assert len(files) > 5
    assert all(file.is_relative_to(upload) for file in files), "two versions of the code in one job"
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert not {name for name in packaged if not (upload / name).is_file()}


def test_a_job_ends_with_the_exit_code_of_its_verb(head: Head, images: Path, model: Path, tmp_path: Path) -> None:
    done = head.submit("first", "generate", *generate(images, model, tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "18 of 18 records ok" in done.stdout  # the log is followed
    assert head.job("first")["status"] == "SUCCEEDED"
    assert sound(tmp_path / "run")

    refused = head.submit(
        "other-settings", "generate", *generate(images, model, tmp_path / "run", "--strength", "0.25")
    )
    assert refused.returncode == 1  # ray's own
    assert "strength: " in refused.stdout
    job = head.job("other-settings")
    assert job["status"] == "FAILED"
    assert job["driver_exit_code"] == 3
    assert "exit code 3" in job["message"]

    again = head.submit("first", "generate", *generate(images, model, tmp_path / "run"))
    assert again.returncode != 0, "a submission id can be used once"

    uploads = list(head.folder.glob("r/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"))
    assert uploads
    for upload in uploads:  # unpacked, so larger than the upload
        assert {path.name for path in upload.iterdir()} >= {"diffva_ray", "jobs"}
        assert not {path.name for path in upload.iterdir()} & {".git", ".venv", "tests", "docs", "runs"}
        assert sum(path.stat().st_size for path in upload.rglob("*") if path.is_file()) < MAX_UPLOAD_BYTES


def test_nobody_gets_in_without_the_token_and_nothing_leaves_loopback(head: Head) -> None:
    assert json.loads(head.get("/api/version"))["ray_version"]
    for token in ("", "0" * 64):
        with pytest.raises(urllib.error.HTTPError) as refused:
            head.get("/api/jobs/", token)
        assert refused.value.code in (401, 403)
    stranger = head.ray("job", "list", "--address", head.address, RAY_AUTH_TOKEN_PATH="", RAY_AUTH_TOKEN="0" * 64)
    assert stranger.returncode != 0
    assert head.listeners() <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_no_secret_is_shown(head: Head, tmp_path: Path) -> None:
    """Credentials live in the nodes' environment; a job's description, its log and the session's logs have none."""
    status = head.submit("looks", "status", str(tmp_path))
    assert status.returncode == 1
    assert head.job("looks")["driver_exit_code"] == 2, "nothing there: unusable input"
    texts = [head.get("/api/jobs/"), status.stdout, status.stderr]
    texts += [file.read_text(errors="replace") for file in head.folder.glob("r/session_2*/logs/**/*") if file.is_file()]
    assert any("looks" in text for text in texts)
    for text in texts:
        assert SECRET not in text
        assert head.token not in text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_line_by_jobs_with_drivers_stopped_and_killed(
    head: Head, images: Path, tiny_options: list[str], tmp_path: Path
) -> None:
    """train (stopped in the middle, resubmitted), generate (killed in the middle, resubmitted), reduce, report."""
    model, run = tmp_path / "model", tmp_path / "run"
    train = ["--data", str(images), "--out", str(model), *tiny_options, "--set", "train.stages.0.steps=400"]
    assert head.submit("long-train-1", "train", *train, wait=False).returncode == 0
    wait_for(lambda: list(model.glob(".train/ray/checkpoint_*")))
    assert head.ray("job", "stop", "--address", head.address, "long-train-1").returncode == 0
    assert head.job("long-train-1")["status"] == "STOPPED"
    assert not (model / "diffva.json").exists(), "stopped too late to show anything"
    resumed = head.submit("long-train-2", "train", *train)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert (model / "diffva.json").exists()
    assert "nothing to do" in head.submit("long-train-3", "train", *train).stdout

    options = generate(images, model, run, "--set", "generate.shard_size=2")
    assert head.submit("long-generate-1", "generate", *options, wait=False).returncode == 0
    wait_for(lambda: len(list(run.glob("records/*.parquet"))) >= 2)
    os.kill(driver(head, "jobs/generate.py"), 9)
    wait_for(lambda: head.job("long-generate-1")["status"] == "FAILED")
    left = len(list(run.glob("records/*.parquet")))
    assert left < 9, "killed too late to show anything"
    assert head.submit("reduce-early", "reduce", str(run)).returncode == 1
    assert head.job("reduce-early")["driver_exit_code"] == 5
    finished = head.submit("long-generate-2", "generate", *options)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert sound(run)
    assert len(records(run)) == 18
    assert records(run)["record_id"].is_unique

    for verb in ("verify", "reduce", "report", "status"):
        done = head.submit(verb, verb, str(run))
        assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "_SUCCESS").exists()
    assert (run / "report" / "index.html").stat().st_size > 10_000
    assert "nothing to do" in head.submit("long-generate-3", "generate", *options).stdout
    assert not (ROOT / "runs" / run.name).exists()


def driver(head: Head, script: str) -> int:
    """Return the process of a job's entry script."""
    for process in head.processes():
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
        if words[0].endswith("python") and script in words[1:3]:
            return process
    raise AssertionError(f"no driver runs {script}")
