"""Sends the numbers, tables and figures of a reduced run to MLflow or Weights & Biases, where other experiments are."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from diffva_ray.data.dataset import UnusableData
from diffva_ray.evaluate.credibility import stated
from diffva_ray.evaluate.records import reduced_metrics
from diffva_ray.generate.run import Run
from diffva_ray.progress import one_line
from diffva_ray.provenance import missing
from diffva_ray.schema import digest
from diffva_ray.storage.store import StoreError

PROJECT = "diffva-ray"  # of Weights & Biases, and the experiment of MLflow, unless the environment names another one
NAMES = ("label", "set1", "set2", "conditions", "map", "region", "extractor")  # columns that tell rows apart
TAG = "diffva.run"  # tag of MLflow by which a run is found again


@dataclass(frozen=True)
class Content:
    """What a tracker gets of a run."""

    identity: str  # of the run: its settings and its plan
    name: str
    settings: Mapping[str, str]  # what fixes the pixels, with the model's digest
    about: Mapping[str, str]  # versions, notes and problems
    numbers: Mapping[str, float]  # by table/row/column
    tables: Mapping[str, list[dict[str, Any]]]  # rows by name
    files: Mapping[str, bytes]  # tables and figures by path in the run


def content_of(run: Run) -> Content:
    """Collect what a tracker gets of a reduced run."""
    metrics = reduced_metrics(run) or {}
    tables = {
        name: rows
        for name, rows in metrics.items()
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    }
    entries = [*run.store.list("tables"), *run.store.list("figures")]
    about = {
        "data": _last(run.about["data"]),
        "data_kind": run.about.get("data_kind"),
        "model": _last(run.about.get("model")),
        "diffva_ray": run.about.get("diffva_ray"),
        "code_revision": run.about.get("code_revision"),
        "started": run.about.get("started"),
        "problems": "; ".join(stated(run, metrics)),
        "notes": "; ".join(metrics.get("notes", [])),
    }
    return Content(
        identity=digest([run.fingerprint, run.about.get("plan_sha256")])[:16],
        name=f"{_last(run.store.uri)}-{run.fingerprint[:8]}",
        settings={"recipe": run.recipe.name, **{key: str(value) for key, value in run.keys.items()}},
        about={name: str(text) for name, text in about.items() if text},
        numbers=dict(_numbers(tables)),
        tables=tables,
        files={path: run.store.read(path) for path, _ in entries if path.endswith((".csv", ".json", ".png"))},
    )


def log_to(tracker: str, run: Run) -> str:
    """Send a reduced run to a tracker; a run that was sent before is updated.

    Args:
        tracker: A key of TRACKERS. Server and login are those of its own environment variables.
        run: The run.

    Returns:
        Where the tracker has it.

    Raises:
        UnusableData: The tracker is not installed or refuses the login, or the run has not been reduced.
        StoreError: The tracker's server cannot be reached.
    """
    check(tracker, run)
    return TRACKERS[tracker](content_of(run))


def check(tracker: str, run: Run) -> None:
    """Raise UnusableData if a tracker is not installed, or the run has not been reduced."""
    if find_spec(tracker) is None:
        raise UnusableData(missing(tracker, f"--log-to {tracker}", tracker))
    if reduced_metrics(run) is None:
        raise UnusableData(f"--log-to: {run.store.uri} has not been reduced; run diffva reduce first")


def _to_mlflow(content: Content) -> str:
    import mlflow

    try:
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT)
        known = mlflow.search_runs(filter_string=f"tags.`{TAG}` = '{content.identity}'", output_format="list")
        with mlflow.start_run(run_id=known[0].info.run_id if known else None, run_name=content.name) as started:
            mlflow.set_tags({TAG: content.identity, **content.about})
            mlflow.log_params({key: value[:500] for key, value in content.settings.items()})
            mlflow.log_metrics({_plain(name): value for name, value in content.numbers.items()})
            for path, data in content.files.items():
                _artifact(mlflow, path, data)
            return f"{mlflow.get_tracking_uri()} (run {started.info.run_id})"
    except mlflow.exceptions.MlflowException as error:
        raise StoreError(f"--log-to mlflow: {one_line(error, 200)}") from None


def _artifact(mlflow: Any, path: str, data: bytes) -> None:
    if path.endswith(".png"):
        from PIL import Image

        mlflow.log_image(Image.open(io.BytesIO(data)), path)
    else:
        mlflow.log_text(data.decode(), path)


def _to_wandb(content: Content) -> str:
    import wandb
    from PIL import Image

    try:
        started = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=content.identity,
            name=content.name,
            resume="allow",
            config={**content.settings, **content.about},
        )
        started.summary.update(dict(content.numbers))
        for name, rows in content.tables.items():
            columns: list[Any] = list(dict.fromkeys(column for row in rows for column in row))
            cells = [["" if row.get(column) is None else str(row[column]) for column in columns] for row in rows]
            started.log({f"tables/{name}": wandb.Table(columns=columns, data=cells)})
        for path, data in content.files.items():
            if path.endswith(".png"):
                started.log({path.removesuffix(".png"): wandb.Image(Image.open(io.BytesIO(data)))})
        where = str(started.url or started.dir)
        started.finish()
    except wandb.errors.UsageError as error:
        reason = f"{one_line(error, 160)}; run wandb login, or set WANDB_MODE=offline"
        raise UnusableData(f"--log-to wandb: {reason}") from None
    except wandb.errors.Error as error:
        raise StoreError(f"--log-to wandb: {one_line(error, 200)}") from None
    return where


TRACKERS: dict[str, Callable[[Content], str]] = {"mlflow": _to_mlflow, "wandb": _to_wandb}


def _numbers(tables: Mapping[str, list[dict[str, Any]]]) -> Iterator[tuple[str, float]]:
    """The numbers of tables as ``table/row/column``; the ends of an interval have columns of their own."""
    for table, rows in tables.items():
        for row in rows:
            name = " ".join(str(row[column]) for column in NAMES if row.get(column))
            for column, value in row.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    yield f"{table}/{name}/{column}", float(value)
                elif column.endswith("interval") and isinstance(value, list) and len(value) == 2:
                    yield f"{table}/{name}/{column}_low", float(value[0])
                    yield f"{table}/{name}/{column}_high", float(value[1])


def _plain(name: str) -> str:
    """A name of the characters that MLflow accepts."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def _last(address: Any) -> str:
    return str(address or "").rstrip("/").rpartition("/")[2]
