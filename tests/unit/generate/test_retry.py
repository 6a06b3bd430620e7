"""Retries of quarantined records: their rows replace the first ones, and committed parts do not change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from diffva_ray.cli import main
from diffva_ray.evaluate.executor import LocalExecutor
from diffva_ray.evaluate.records import read_records
from diffva_ray.evaluate.reduction import _scores
from diffva_ray.evaluate.run_index import index_run
from diffva_ray.generate.committed import committed, overlays, start_retry
from diffva_ray.generate.run import PlanError, Run, find_run
from diffva_ray.generate.verification import requeue, verify
from diffva_ray.storage.local import LocalStore
from diffva_ray.workflows.status import read_status

BOUNDS = ("--set", "evaluate.max_quarantined_fraction=0.2")


def diffva(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def opened(out: Path) -> Run:
    run = find_run(LocalStore(str(out)))
    assert run is not None
    return run


@pytest.fixture
def damaged(images: Path, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A copy of the images, two of which are broken."""
    data = tmp_path / "images"
    shutil.copytree(images, data)
    broken = sorted((data / "COVID" / "images").iterdir())[:2]
    for file in broken:
        file.write_bytes(file.read_bytes()[:90])
    return data, broken


def run_on(data: Path, model: Path, out: Path) -> Result:
    return diffva("generate", "--data", data, "--model", model, "--out", out, "--executor", "inline", *BOUNDS)


def retry(out: Path) -> Result:
    return diffva("retry", out, "--executor", "inline")


def test_repaired_images_give_the_records_of_intact_ones(
    damaged: tuple[Path, list[Path]], images: Path, model: Path, tmp_path: Path
) -> None:
    data, broken = damaged
    out, intact = tmp_path / "run", tmp_path / "intact"
    assert run_on(images, model, intact).exit_code == 0
    assert run_on(data, model, out).exit_code == 0
    assert diffva("reduce", out, "--executor", "inline").exit_code == 0
    committed = {path: path.read_bytes() for path in (out / "records").iterdir()}
    assert (read_records(opened(out))["status"] != "ok").sum() == 2

    shutil.copy(images / broken[0].relative_to(data), broken[0])
    result = retry(out)
    assert result.exit_code == 0, result.output
    assert "1 of 2 records ok now" in result.output
    assert not (out / "_SUCCESS").exists()  # the tables are of the records as they were
    shutil.copy(images / broken[1].relative_to(data), broken[1])
    assert "1 of 1 records ok now" in retry(out).output
    assert "nothing to retry" in retry(out).output
    assert len(overlays(opened(out))) == 2

    assert {path: path.read_bytes() for path in (out / "records").iterdir()} == committed
    assert verify(opened(out)) == []
    ours, theirs = read_records(opened(out)), read_records(opened(intact))
    moved = ["counterfactual_path", "attribution_path", "reconstruction_path"]
    assert ours.drop(columns=moved).equals(theirs.drop(columns=moved))
    assert ours["counterfactual_path"].str.startswith("overlays/").sum() == 2
    for path in ours[moved].to_numpy().ravel():
        assert (out / path).exists()

    assert diffva("reduce", out, "--executor", "inline").exit_code == 0
    assert diffva("reduce", intact, "--executor", "inline").exit_code == 0
    for table in ("ssim", "localization", "validity", "counterfactual", "fid"):
        name = f"tables/{table}.csv"
        assert (out / name).exists() == (intact / name).exists()
        if (out / name).exists() and table != "fid":  # which contains the name of the data folder
            assert (out / name).read_text() == (intact / name).read_text(), name
    assert "complete and sound" in diffva("verify", out).output
    assert diffva("report", out).exit_code == 0
    status = read_status(str(out))
    assert (status["ok"], status["quarantined"], status["retries"]) == (18, 0, 2)


def test_an_interrupted_retry_continues_and_a_damaged_one_is_repaired(
    damaged: tuple[Path, list[Path]], images: Path, model: Path, tmp_path: Path
) -> None:
    data, broken = damaged
    out = tmp_path / "run"
    assert run_on(data, model, out).exit_code == 0
    for file in broken:
        shutil.copy(images / file.relative_to(data), file)
    planned = start_retry(opened(out))  # the process dies here
    assert planned is not None
    assert diffva("reduce", out, "--executor", "inline").exit_code == 5
    assert "2 of 2 records ok now" in retry(out).output
    assert len(overlays(opened(out))) == 1

    before = read_records(opened(out))
    (out / "overlays/r1" / overlays(opened(out))[0].store.list("attributions")[0].path).unlink()
    problems = verify(opened(out))
    assert [problem.overlay for problem in problems] == [1]
    assert requeue(opened(out), problems) == 1
    assert "2 of 2 records ok now" in retry(out).output
    assert read_records(opened(out)).equals(before)
    assert verify(opened(out)) == []


def test_an_unfinished_run_must_be_finished_first(images: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run_on(images, model, out).exit_code == 0
    opened(out).store.delete("records/part-00001.parquet")
    with pytest.raises(PlanError, match="finish diffva generate first"):
        start_retry(opened(out))
    assert retry(out).exit_code == 2


def test_records_generated_again_in_the_run_itself_are_scored_once(
    damaged: tuple[Path, list[Path]], images: Path, model: Path, tmp_path: Path
) -> None:
    """A retried record may be ok in the run's own part, too, if that was generated again from the repaired image."""
    data, broken = damaged
    out = tmp_path / "run"
    assert run_on(data, model, out).exit_code == 0
    for file in broken:
        shutil.copy(images / file.relative_to(data), file)
    assert "2 of 2 records ok now" in retry(out).output
    later = {row["record_id"]: row for row in committed(opened(out)).to_pylist()}
    for part in (out / "records").iterdir():
        rows = [later[row["record_id"]] for row in pq.read_table(part).to_pylist()]
        schema = pq.read_schema(part)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), part)
    found = index_run(opened(out))
    assert len(found.frame) == sum(len(rows) for rows in found.shards_of.values()) == 18
    places, counterfactuals = _scores(opened(out), found, {}, None, LocalExecutor())
    assert counterfactuals["record_id"].is_unique
    assert len(counterfactuals) == 18
    assert not places.images.duplicated(["record_id", "map"]).any()


def test_a_run_from_before_a_setting_existed_can_be_retried(
    damaged: tuple[Path, list[Path]], images: Path, model: Path, tmp_path: Path
) -> None:
    data, broken = damaged
    out = tmp_path / "run"
    assert run_on(data, model, out).exit_code == 0
    about = json.loads((out / "run.json").read_text())
    for key in ("compile", "timestep_spacing"):
        del about["keys"][key]
    (out / "run.json").write_text(json.dumps(about))
    shutil.copy(images / broken[0].relative_to(data), broken[0])
    assert "1 of 2 records ok now" in retry(out).output


def test_a_run_with_other_timestep_spacing_is_not_mixed(
    damaged: tuple[Path, list[Path]], model: Path, tmp_path: Path
) -> None:
    data, out = damaged[0], tmp_path / "run"
    words = ["generate", "--data", data, "--model", model, "--out", out, "--executor", "inline", *BOUNDS]
    words += ["--method", "sdedit", "--scheduler", "unipc"]
    assert diffva(*words).exit_code == 0
    about = json.loads((out / "run.json").read_text())
    assert about["keys"].pop("timestep_spacing") == "trailing"
    (out / "run.json").write_text(json.dumps(about))
    for refused in (diffva(*words, "--allow-environment-change"), retry(out)):
        assert refused.exit_code == 3
        assert "timestep_spacing" in refused.output
