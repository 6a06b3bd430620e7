"""The command line: exit codes of the contract, and one line that names the cause of every user error."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from diffva_ray.cli import main
from diffva_ray.data.phantoms import phantom_set
from diffva_ray.generate.run import find_run
from diffva_ray.storage.local import LocalStore


def diffva(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def generate(data: Path, model: Path, out: Path, *more: object) -> Result:
    return diffva("generate", "--data", data, "--model", model, "--out", out, "--executor", "inline", *more)


@pytest.fixture(scope="module")
def run(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert generate(images, model, out).exit_code == 0
    assert diffva("reduce", out, "--executor", "inline").exit_code == 0
    return out


@pytest.mark.parametrize("verb", sorted(main.commands))
def test_every_verb_helps_with_an_example(verb: str) -> None:
    result = diffva(verb, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.output
    assert f"diffva {verb}" in result.output


IMPERATIVES = "Check Compare Compute Explain Generate Interpolate Reproduce Retry Run Score Show Train Write".split()


def test_short_help_is_an_imperative_that_fits_its_line() -> None:
    page = diffva("--help").output
    for command in main.commands.values():
        text = command.short_help
        assert text, command.name
        assert len(text) <= 45, text
        assert text.split()[0] in IMPERATIVES, text
        assert text in page


def test_option_help_is_a_sentence_that_starts_with_a_capital() -> None:
    for command in main.commands.values():
        for option in (parameter for parameter in command.params if isinstance(parameter, click.Option)):
            text = option.help or ""
            assert text[:1].isupper(), (command.name, option.opts)
            assert text.endswith("."), (command.name, option.opts)
            assert not text.startswith(("Of ", "As ", "Default")), (command.name, option.opts)


def test_verbose_prints_the_traceback_of_a_one_line_error(tmp_path: Path) -> None:
    quiet, verbose = diffva("status", tmp_path), diffva("-v", "status", tmp_path)
    assert quiet.exit_code == verbose.exit_code == 2
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in verbose.stderr
    assert "read_status" in verbose.stderr
    assert verbose.stderr.splitlines()[-1] == quiet.stderr.splitlines()[-1]


def test_a_run_with_images_beyond_repair_can_be_finished_on_purpose(images: Path, model: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(images, data)
    broken = next((data / "COVID/images").glob("*.png"))
    broken.write_bytes(b"x" * broken.stat().st_size)
    assert generate(data, model, out, "--classes", "COVID").exit_code == 4
    refused = diffva("reduce", out, "--executor", "inline")
    assert refused.exit_code == 4
    assert f"the tables are in {out}/tables" in refused.stderr
    fraction = refused.stderr.split("--max-quarantined-fraction ")[1].split()[0]
    finished = diffva("reduce", out, "--executor", "inline", "--max-quarantined-fraction", fraction)
    assert finished.exit_code == 0, finished.stderr
    assert (out / "_SUCCESS").exists()
    assert diffva("verify", out).exit_code == 0
    assert diffva("reduce", out, "--executor", "inline").exit_code == 0, "the run has stored it"
    assert (
        generate(data, model, out, "--classes", "COVID", "--set", "evaluate.max_quarantined_fraction=0").exit_code == 4
    )


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a.png"), 2, "[Errno 13] Permission denied: 'a.png'"),
        (PermissionError(errno.EPERM, "refused"), 1, "unexpected error: PermissionError: [Errno 1] refused;"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), 1, "unexpected error: ConnectionResetError: [Errno 104]"),
        (OSError(errno.ENOSPC, "full", "/tmp/a"), 1, "unexpected error: OSError: [Errno 28] full: '/tmp/a';"),
    ],
)
def test_an_os_error_is_usage_only_if_it_names_a_file_that_cannot_be_opened(
    error: OSError, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(uri: str) -> None:
        raise error

    monkeypatch.setattr("diffva_ray.workflows.status.read_status", fail)
    result = diffva("status", "run")
    assert result.exit_code == code
    assert result.stderr.startswith(f"diffva status: {message}")
    assert len(result.stderr.splitlines()) == 1


OPTIONS = {
    "compare": "RUN_A RUN_B --anonymise-names --data --out",
    "demo": "--out --quick --seed",
    "explain": "IMAGE --and --condition --dry-run --guidance-scale --json --method --model --not --out --prompt "
    "--recipe --scheduler --seed --set --steps --strength",
    "export": "RUN --accept --anonymise-names --banner --best-of --boxes --data --executor --license --out "
    "--push-to --shuffle --splits --threshold --to --with-patients --without-images",
    "generate": "--accelerator-type --actors --allow-environment-change --and --classes --columns --data --dry-run "
    "--executor --gpus-per-actor --guidance-scale --healthy-class --images-per-second --limit --method --micro-batch "
    "--model --not --out --probe --prompt --recipe --root --samples --scheduler --seed --set --shard-size --steps "
    "--strength --sweep",
    "inspect": "DATA OTHER --columns --healthy-class --json --recipe --root --set",
    "interpolate": "IMAGE --dry-run --frames --guidance-scale --json --method --model --out --prompt --recipe "
    "--scheduler --seed --set --steps --strength --to",
    "paper": "--accelerator-type --actors --allow-environment-change --base --boxes --brixia --carcinoma --chexpert "
    "--dry-run --executor --gpus-per-actor --inception-weights --limit --model --out --quick --radiography --recipe "
    "--resize --set --sources",
    "phantoms": "OUT --changes --classes --dry-run --factors --onto --patients --recipe --seed --set --size "
    "--transplants --vary",
    "readers": "STUDY ANSWERS",
    "reduce": "RUN --boxes --brixia --data --executor --extractor --inception-weights --judge --lpips-weights "
    "--max-quarantined-fraction --normals --reference --resize --sources --threshold-from",
    "report": "RUN --anonymise-names --boxes --data --images --log-to --port --serve",
    "retry": "RUN --accelerator-type --actors --allow-environment-change --data --executor --gpus-per-actor --model",
    "score": "MAPS --allow-training-images --boxes --columns --data --encoding --json --model --out --positive --root "
    "--signed --size --smoothing --threshold-from",
    "status": "RUN_OR_MODEL --json",
    "studio": "--model --out --port --run --service --study",
    "study": "RUN --images --out --seed",
    "train": "--columns --data --dry-run --executor --gpus-per-worker --healthy-class --out --recipe --root --set "
    "--workers",
    "verify": "RUN --repair",
}


def test_options_are_frozen() -> None:
    """Scripts rely on option names: removing or renaming an option breaks jobs."""
    changed = {}
    for verb in main.commands.keys() | OPTIONS.keys():
        parameters = main.commands[verb].params if verb in main.commands else []
        arguments = {parameter.name.upper() for parameter in parameters if isinstance(parameter, click.Argument)}
        words = {word for parameter in parameters for word in (*parameter.opts, *parameter.secondary_opts)}
        options = arguments | {word for word in words if word.startswith("--")}
        if differing := options ^ set(OPTIONS.get(verb, "").split()):
            changed[verb] = differing
    assert not changed


def test_dry_run_writes_nothing_and_prints_json(images: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = generate(images, model, out, "--limit", 4, "--strength", 0.6, "--dry-run")
    plan = json.loads(result.output)
    assert (plan["records"], plan["shards"], plan["recipe"]["generate"]["strength"]) == (4, 1, 0.6)
    assert json.loads(diffva("train", "--data", images, "--out", out, "--dry-run").output)["images"] == 24
    assert not out.exists()


@pytest.mark.parametrize(("workers", "code"), [("2", 0), ("1:4", 0), ("4:1", 2), ("0", 2), ("two", 2)])
def test_workers_are_a_number_or_a_range(workers: str, code: int, images: Path, tmp_path: Path) -> None:
    result = diffva("train", "--data", images, "--out", tmp_path / "m", "--workers", workers, "--dry-run")
    assert result.exit_code == code
    assert code == 0 or "--workers" in result.stderr


def test_another_configuration_is_exit_3_and_names_the_key(run: Path, images: Path, model: Path) -> None:
    result = generate(images, model, run, "--guidance-scale", 9)
    assert result.exit_code == 3
    assert "guidance_scale" in result.stderr


def test_too_many_bad_images_are_exit_4_with_all_work_kept(images: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    next((tmp_path / "images" / "COVID" / "images").iterdir()).write_bytes(b"torn")
    out = tmp_path / "run"
    assert generate(tmp_path / "images", model, out).exit_code == 4
    result = diffva("reduce", out, "--executor", "inline")
    assert result.exit_code == 4
    assert "1 of 18 records" in result.stderr
    assert not (out / "_SUCCESS").exists()
    assert len(pd.read_parquet(out / "quarantine.parquet")) == 1
    assert json.loads((out / "tables" / "metrics.json").read_text())["records"]["ok"] == 17
    assert diffva("verify", out).exit_code == 0


def test_reducing_an_unfinished_run_is_exit_5(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "records" / "part-00001.parquet").unlink()
    (copy / "_SUCCESS").unlink()
    result = diffva("reduce", copy, "--executor", "inline")
    assert result.exit_code == 5
    assert "part-00001" in result.stderr
    assert diffva("verify", copy).exit_code == 5
    assert not (copy / "_SUCCESS").exists()


def test_tables_follow_the_contract(run: Path) -> None:
    metrics = json.loads((run / "tables" / "metrics.json").read_text())
    assert metrics["records"] == {"planned": 18, "ok": 18, "quarantined": 0}
    assert {"label", "n", "ssim", "ms_ssim", "preset"} <= metrics["ssim"][0].keys()
    expected = {"label", "n", "auroc", "auprc", "dice_best", "iou_best", "pointing_game", "map", "region"}
    assert expected <= metrics["localization"][0].keys()
    assert {row["map"] for row in metrics["localization"]} >= {"positive", "absolute", "brightness"}
    assert {"label", "n", "flip_rate"} <= metrics["validity"][0].keys()
    assert {"label", "n", "psnr", "ssim", "psnr_input", "lesion_error_ratio"} <= metrics["ground_truth"][0].keys()
    fid = {"set1", "set2", "n1", "n2", "value", "extractor", "resize", "interval", "n_matched", "kid"}
    assert fid <= metrics["fid"][0].keys()
    assert metrics["fid"][0]["extractor"].startswith("stand-in")
    assert any("not FID" in note for note in metrics["notes"])
    for name in ("ssim", "localization", "validity", "ground_truth", "fid"):
        for ending in ("csv", "md", "tex", "json"):
            assert (run / "tables" / f"{name}.{ending}").stat().st_size > 50
    manifest = json.loads((run / "manifest.json").read_text())["files"]
    assert {"plan.parquet", "run.json", "tables/metrics.json", "records/part-00000.parquet"} <= manifest.keys()
    assert not any(path.startswith("attributions/") for path in manifest)  # a record vouches for its images


def test_reducing_again_writes_nothing_and_other_options_do(run: Path) -> None:
    before = (run / "tables" / "metrics.json").stat().st_mtime_ns
    result = diffva("reduce", run, "--executor", "inline")
    assert "nothing written" in result.output
    assert (run / "tables" / "metrics.json").stat().st_mtime_ns == before


def test_thresholds_are_taken_from_another_run(run: Path, images: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert generate(images, model, out, "--limit", 6).exit_code == 0
    assert diffva("reduce", out, "--executor", "inline", "--threshold-from", run).exit_code == 0
    rows = json.loads((out / "tables" / "metrics.json").read_text())["localization"]
    thresholds = json.loads((run / "tables" / "thresholds.json").read_text())
    assert {"positive", "shuffled", "learned_prior", "positive x prior", "pca_residual"} <= {row["map"] for row in rows}
    for row in rows:
        if row["map"] in ("positive", "absolute"):  # baselines have thresholds for their own settings
            assert row["threshold"] == thresholds[row["map"]]
        assert row["threshold_from"] == "run"
        assert 0 <= row["dice_fixed"] <= row["dice_best"] + 1e-6
    assert diffva("reduce", out, "--executor", "inline", "--threshold-from", tmp_path).exit_code == 2


def test_boxes_and_references_from_elsewhere(run: Path, images: Path, model: Path, tmp_path: Path) -> None:
    image = pd.read_parquet(run / "records" / "part-00000.parquet")["image_path"][0]
    (tmp_path / "boxes.csv").write_text(f"file,x,y,w,h\n{image},4,4,10,10\n")
    (tmp_path / "empty.csv").write_text("file,x,y,w,h\nother.png,4,4,10,10\n")
    out = tmp_path / "run"
    assert generate(images, model, out).exit_code == 0
    reference = ("--reference", f"Normal={images}", "--reference", f"COVID={run}")
    assert diffva("reduce", out, "--executor", "inline", "--boxes", tmp_path / "boxes.csv", *reference).exit_code == 0
    rows = json.loads((out / "tables" / "metrics.json").read_text())["fid"]
    assert {"Normal (reference)", "COVID (reference)"} <= {row["set1"] for row in rows}
    for wrong, named in (
        (("--boxes", tmp_path / "empty.csv"), "none of its files"),
        (("--boxes", tmp_path / "no.csv"), r"no.csv"),
        (("--reference", "Normal"), "LABEL=DATA"),
        (("--reference", f"Measles={images}"), "Measles"),
        (("--inception-weights", tmp_path / "no.pth"), "no.pth"),
    ):
        result = diffva("reduce", out, "--executor", "inline", *wrong)
        assert (result.exit_code, named in result.stderr) == (2, True), result.stderr


def test_fid_with_inceptions_weights(run: Path, inception_weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    command = ("reduce", copy, "--executor", "inline", "--inception-weights", inception_weights)
    assert diffva(*command, "--resize", "legacy").exit_code == 0
    metrics = json.loads((copy / "tables" / "metrics.json").read_text())
    assert {(row["extractor"], row["resize"]) for row in metrics["fid"]} == {("inception-pool3", "legacy")}
    assert not any("stand-in" in note for note in metrics["notes"])
    kept = sorted((copy / "features").rglob("*.npz"))
    stamps = [path.stat().st_mtime_ns for path in kept]
    (copy / "_SUCCESS").unlink()
    assert diffva(*command, "--resize", "legacy").exit_code == 0
    assert [path.stat().st_mtime_ns for path in kept] == stamps  # embedded once


def test_status_reads_storage_only(run: Path, model: Path, tmp_path: Path) -> None:
    status = json.loads(diffva("status", run, "--json").output)
    assert (status["planned"], status["done"], status["ok"], status["finished"]) == (18, 18, 18, True)
    text = diffva("status", run).output
    assert "18 of 18 records" in text
    stages = status["seconds_by_stage"]
    assert set(stages) == {"read", "decode_images", "encode", "denoise", "decode", "metrics", "write"}
    assert status["bottleneck"] == max(stages, key=stages.get)
    assert f"bottleneck: {status['bottleneck']}" in text
    assert json.loads(diffva("status", model, "--json").output)["trained"]
    assert diffva("status", tmp_path).exit_code == 2


def test_inspect_counts(images: Path) -> None:
    result = diffva("inspect", images)
    assert "COVID: 6" in result.output
    assert json.loads(diffva("inspect", images, "--json").output)["with_ground_truth"] == 18


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "diffva_ray.cli", *map(str, arguments)]


def wait_for_parts(out: Path, process: subprocess.Popen, parts: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(out.glob("records/part-*.parquet"))) < parts and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("stop_signal", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_generation_continues(stop_signal: int, run: Path, images: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("generate", "--data", images, "--model", model, "--out", out, "--executor", "inline")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(*arguments), env=environment, stderr=subprocess.PIPE)
    wait_for_parts(out, process, 1)
    process.send_signal(stop_signal)
    while stop_signal == signal.SIGTERM and process.poll() is None:  # a scheduler repeats it; 130 all the same
        time.sleep(0.001)
        process.send_signal(stop_signal)
    _, errors = process.communicate(timeout=60)
    if stop_signal != signal.SIGKILL and process.returncode:
        assert process.returncode == 130
        assert b"repeat the command to continue" in errors
    assert generate(images, model, out).exit_code == 0
    assert diffva("verify", out).exit_code == 0
    # A process killed between the link and the removal of its temporary file leaves a second name: ``part-*`` only.
    ours, theirs = (
        pd.concat([pd.read_parquet(part) for part in sorted(folder.glob("records/part-*"))]) for folder in (out, run)
    )
    assert ours.reset_index(drop=True).equals(theirs.reset_index(drop=True))
    opened = find_run(LocalStore(str(out)))
    assert opened is not None
    assert opened.pending() == []


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EDQUOT, "quota")]
)
def test_a_full_disk_is_one_line_and_the_run_continues(
    number: int, message: str, run: Path, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, files_left = tmp_path / "run", [30]

    def filling(publish: Callable[[str, Path], None]) -> Callable[[str, Path], None]:
        def limited(source: str, target: Path) -> None:
            files_left[0] -= 1
            if files_left[0] < 0:
                raise OSError(number, os.strerror(number), str(target))
            publish(source, target)

        return limited

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", filling(os.replace))
        patch.setattr(os, "link", filling(os.link))
        result = generate(images, model, out)
    assert result.exit_code == 5
    assert message in result.output.splitlines()[-1]
    assert str(out) in result.output.splitlines()[-1]
    assert not list(out.rglob(".tmp-*"))
    assert generate(images, model, out).exit_code == 0
    ours, theirs = (pd.read_parquet(folder / "records") for folder in (out, run))
    assert ours.equals(theirs)


def test_a_folder_without_a_usable_image_stops_early(images: Path, model: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "images", tmp_path / "run"
    shutil.copytree(images, data)
    for file in data.glob("*/images/*"):
        file.write_bytes(b"not mounted")
    result = generate(data, model, out, "--shard-size", 2)
    assert result.exit_code == 4
    assert "none of the first 6 records is usable" in result.output
    opened = find_run(LocalStore(str(out)))
    assert opened is not None
    assert len(opened.pending()) == 6


def metrics_of(out: Path) -> dict:
    return json.loads((out / "tables" / "metrics.json").read_text())


def reduce(out: Path, *more: object) -> Result:
    return diffva("reduce", out, "--executor", "inline", *more)


def test_tables_of_records_that_have_changed_are_made_again(
    run: Path, images: Path, model: Path, tmp_path: Path
) -> None:
    """Committing a shard again removes ``_SUCCESS``; reduce skips its work only if the parts are the same."""
    data, out = tmp_path / "images", tmp_path / "run"
    shutil.copytree(images, data)
    shutil.copytree(run, out)
    about = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**about, "data": str(data), "data_root": str(data)}))
    assert reduce(out).exit_code == 0
    assert "nothing written" in reduce(out).output

    part = next(iter(sorted(out.glob("records/part-*"))))
    broken = pd.read_parquet(part)["image_path"].iloc[0]
    (data / broken).write_bytes((data / broken).read_bytes()[:-20])
    kept = (out / "_SUCCESS").read_bytes()
    part.unlink()
    assert generate(data, model, out).exit_code == 4
    assert not (out / "_SUCCESS").exists()
    (out / "_SUCCESS").write_bytes(kept)  # as if withdrawing it had been lost
    again = reduce(out)
    assert again.exit_code == 4
    assert "nothing written" not in again.output
    assert metrics_of(out)["records"]["quarantined"] == 1
    assert not (out / "_SUCCESS").exists()


@pytest.mark.parametrize("file", ["_SUCCESS", "tables/metrics.json"])
@pytest.mark.parametrize("damage", [b"", b"[]", None], ids=["empty", "of another shape", "missing"])
def test_damaged_tables_are_made_again(run: Path, tmp_path: Path, file: str, damage: bytes | None) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    expected = metrics_of(out)
    (out / file).unlink()
    if damage is not None:
        (out / file).write_bytes(damage)
    assert reduce(out).exit_code == 0
    assert metrics_of(out) == expected


def test_images_that_have_moved_are_not_left_out_of_the_tables(run: Path, images: Path, tmp_path: Path) -> None:
    out, data, moved = tmp_path / "run", tmp_path / "images", tmp_path / "elsewhere"
    shutil.copytree(images, data)
    shutil.copytree(run, out)
    about = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**about, "data": str(data), "data_root": str(data)}))
    (out / "_SUCCESS").unlink()
    data.rename(moved)
    lost = reduce(out)
    assert lost.exit_code == 5
    assert "--data" in lost.output
    assert str(data) in lost.output
    assert not (out / "_SUCCESS").exists()
    found = reduce(out, "--data", moved)
    assert found.exit_code == 0, found.output
    assert metrics_of(out)["localization"] == metrics_of(run)["localization"]
    assert metrics_of(out)["counterfactual"] == metrics_of(run)["counterfactual"]
    assert diffva("verify", out).exit_code == 0
    (out / "_SUCCESS").unlink()
    assert reduce(out).exit_code == 0, "run.json stores the new address"

    for _ in phantom_set(LocalStore(str(tmp_path / "other")), 24, 32, seed=99):
        pass
    wrong = reduce(out, "--data", tmp_path / "other")
    assert wrong.exit_code == 2
    assert "planned from" in wrong.output


def test_tables_that_no_longer_apply_are_removed(images: Path, model: Path, tmp_path: Path) -> None:
    """A reduce without the boxes of the previous one leaves no localization tables and no thresholds behind."""
    data, out = tmp_path / "images", tmp_path / "run"
    for file in images.glob("*/images/*.png"):
        (data / file.parts[-3]).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, data / file.parts[-3])
    names = sorted(path.relative_to(data).as_posix() for path in data.glob("COVID/*.png"))
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("file,x,y,w,h\n" + "".join(f"{name},4,4,10,10\n" for name in names))
    assert generate(data, model, out).exit_code == 0
    assert reduce(out, "--boxes", boxes).exit_code == 0
    assert (out / "tables" / "localization.csv").exists()
    assert (out / "tables" / "thresholds.json").exists()
    assert reduce(out).exit_code == 0
    assert "localization" not in metrics_of(out)
    assert not list((out / "tables").glob("localization.*"))
    assert not (out / "tables" / "thresholds.json").exists()
    assert diffva("verify", out).exit_code == 0


def test_a_run_with_relative_paths_is_reduced_from_any_folder(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images.parent)
    out = tmp_path / "run"
    assert generate(Path(images.name), model, out, "--limit", 4).exit_code == 0
    monkeypatch.chdir(tmp_path)
    assert diffva("reduce", "run", "--executor", "inline").exit_code == 0
    metrics = json.loads((out / "tables" / "metrics.json").read_text())
    assert not any("not opened" in note for note in metrics["notes"])
    assert metrics["localization"]
