"""``report --log-to``: what MLflow's file store and Weights & Biases' offline files hold afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from diffva_ray.cli import main
from diffva_ray.data.encoding import encode_grey
from diffva_ray.evaluate import trackers
from diffva_ray.generate.run import Run

MakeRun = Callable[..., Run]


METRICS = {
    "records": {"planned": 12, "ok": 12, "quarantined": 0},
    "ssim": [
        {"label": "COVID", "n": 6, "ssim": 0.8125, "ssim_interval": [0.75, 0.875]},
        {"label": "all", "n": 12, "ssim": 0.5, "ssim_interval": None},
    ],
    "notes": ["a note"],
}


@pytest.fixture
def reduced(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> Run:
    run = make_run()
    run.store.put("tables/metrics.json", json.dumps(METRICS).encode())
    run.store.put("tables/ssim.csv", b"label,ssim\nCOVID,0.8125\n")
    run.store.put("figures/grid.png", encode_grey(np.zeros((2, 2), np.uint8)))
    monkeypatch.setattr("diffva_ray.evaluate.report.page.write_report", lambda *_: "index.html")
    return run


def logged(run: Run, *names: str) -> Result:
    options = [word for name in names for word in ("--log-to", name)]
    return CliRunner().invoke(main, ["report", run.store.uri, *options])


def test_mlflow_has_the_numbers_tables_and_figures_once(
    reduced: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    address = (tmp_path / "mlruns").as_uri()
    for name, value in (("MLFLOW_TRACKING_URI", address), ("MLFLOW_ALLOW_FILE_STORE", "true")):
        monkeypatch.setenv(name, value)
    for _ in range(2):
        result = logged(reduced, "mlflow")
        assert (result.exit_code, address in result.output) == (0, True), result.output
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("diffva-ray")
    assert experiment is not None
    (kept,) = client.search_runs([experiment.experiment_id])  # the second time it was updated
    assert kept.data.params["model_digest"] == reduced.keys["model_digest"]
    assert kept.data.params["prompt"] == reduced.keys["prompt"]
    assert kept.data.tags["notes"] == "a note"
    assert kept.data.metrics == {
        "ssim/COVID/n": 6, "ssim/COVID/ssim": 0.8125, "ssim/COVID/ssim_interval_low": 0.75,
        "ssim/COVID/ssim_interval_high": 0.875, "ssim/all/n": 12, "ssim/all/ssim": 0.5,
    }  # fmt: skip
    folder = Path(client.download_artifacts(kept.info.run_id, "", str(tmp_path)))
    for path in ("tables/ssim.csv", "tables/metrics.json"):
        assert (folder / path).read_bytes() == reduced.store.read(path)
    assert (folder / "figures" / "grid.png").exists()


def test_wandb_has_the_numbers_and_tables_offline(
    reduced: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    result = logged(reduced, "wandb")
    assert result.exit_code == 0, result.output
    (files,) = tmp_path.glob("wandb/offline-run-*/files")
    (table,) = files.glob("media/table/tables/ssim_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["label", "n", "ssim", "ssim_interval"]
    assert content["data"] == [["COVID", "6", "0.8125", "[0.75, 0.875]"], ["all", "12", "0.5", ""]]
    assert list(files.glob("media/images/figures/grid_*.png"))


def test_rows_of_a_table_do_not_share_a_name() -> None:
    rows = [{"label": "A", "map": name, "auroc": 0.5, "fixed": True} for name in ("positive", "shuffled")]
    assert dict(trackers._numbers({"localization": rows})) == {
        "localization/A positive/auroc": 0.5,
        "localization/A shuffled/auroc": 0.5,
    }


def test_a_missing_tracker_and_a_run_without_tables_are_one_line(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    result = logged(run, "wandb")
    assert (result.exit_code, "pip install 'diffva-ray[wandb]'" in result.stderr) == (2, True)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    result = logged(run, "mlflow")
    assert (result.exit_code, "has not been reduced; run diffva reduce first" in result.stderr) == (2, True)
