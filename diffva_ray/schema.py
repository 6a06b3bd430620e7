"""Identity and columns of records: ids, seeds, statuses, row types, Arrow schemas and array types."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Annotated, Any, Literal, TypedDict, cast, get_args, get_type_hints

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Image = NDArray[np.float32]  # grey in [0, 1], or an attribution map in [-1, 1]; [H, W] unless documented otherwise
Mask = NDArray[np.bool_]  # [H, W] unless documented otherwise
TableRow = dict[str, Any]  # a row of a table of results, by column
SCHEMA_VERSION = 2  # version 1 had other names of columns and folders
PathColumn = Literal["counterfactual_path", "attribution_path", "reconstruction_path"]  # images of a record
ENGINE = 5  # part of a run's fingerprint; increase it when the engine rounds differently for the same settings


class Status(str, Enum):
    """Outcome of a planned record. All but ``OK`` are quarantined, with the reason in column ``error``."""

    OK = "ok"
    MISSING = "missing"
    BAD_IMAGE = "bad_image"
    BLANK = "blank"
    TOO_SMALL = "too_small"
    PROMPT_TOO_LONG = "prompt_too_long"
    NON_FINITE = "non_finite"
    KILLED_WORKER = "killed_worker"
    ERROR = "error"


def digest(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of ``value``: keys sorted, no spaces, ASCII."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def record_id(image_key: str, label: str, prompt: str, method: str, settings: Mapping[str, Any]) -> str:
    """Compute the id of a planned record.

    Args:
        image_key: Path of the image relative to the data root, so that ids survive a move of the data set.
        label: Class that the image is planned under.
        prompt: Prompt of the counterfactual.
        method: Counterfactual method.
        settings: All other settings that identify the record, as JSON values.

    Returns:
        20 hex digits (80 bits: the probability of a collision among 50 million records is about 1e-9).

    Example:
        >>> len(record_id("COVID/images/1.png", "COVID", "normal chest scan", "sdedit", {"strength": 0.5}))
        20
    """
    return digest([image_key, label, prompt, method, dict(settings)])[:20]


def record_seed(run_seed: int, image_key: str, sample: int) -> int:
    """Compute the seed of a record's random generator.

    Prompt and settings are left out on purpose: all prompts and sweep points of one image share their noise and are
    paired comparisons.

    Args:
        run_seed: Seed of the run.
        image_key: Path of the image relative to the data root.
        sample: Index of the sample of this image, from 0.

    Returns:
        The seed, in [0, 2**63).

    Example:
        >>> record_seed(0, "COVID/images/1.png", 0) == record_seed(0, "COVID/images/1.png", 0)
        True
        >>> record_seed(0, "COVID/images/1.png", 0) == record_seed(0, "COVID/images/1.png", 1)
        False
    """
    return int(digest([run_seed, image_key, sample])[:16], 16) >> 1


class Columns(TypedDict):
    """Columns that a planned record and a record share: which counterfactual of which image. Each has its meaning, and
    its Arrow type where it differs from ARROW."""

    record_id: Annotated[str, "id of the planned record, 20 hex digits"]
    image_path: Annotated[str, "path of the image, relative to data_root in run.json"]
    lung_mask_path: Annotated[str, "path of the lung mask, relative to data_root; empty without one"]
    lesion_mask_path: Annotated[str, "path of the lesion mask, relative to data_root; empty without one"]
    ground_truth_path: Annotated[str, "path of the ground-truth counterfactual, likewise; phantoms have one"]
    label: Annotated[str, "class that the image was planned under"]
    patient: Annotated[str, "hash of the patient's id; empty where neither the data set nor the file knows the patient"]
    view: Annotated[str, "view, such as PA, AP or LATERAL; empty where it is unknown, like the next five"]
    laterality: Annotated[str, "side of the body, as in the file's header"]
    age: Annotated[str, "age in years"]
    sex: Annotated[str, "F or M"]
    spacing: Annotated[str, "pixel spacing in mm, row and column"]
    split: Annotated[str, "split of the data set, such as train or test"]
    prompt: Annotated[str, "prompt of the counterfactual"]
    method: Annotated[str, "counterfactual method"]
    scheduler: Annotated[str, "sampler"]
    strength: Annotated[float, "fraction of the noise schedule applied to the image, in (0, 1]"]
    guidance_scale: Annotated[float, "scale of classifier-free guidance; 1 or less is no guidance"]
    num_inference_steps: Annotated[int, "sampler steps at strength 1"]
    seed: Annotated[int, "seed of the record's noise", pa.int64()]
    sample: Annotated[int, "index among the samples of the image, from 0"]


class PlannedRecord(Columns):
    """A row of ``plan.parquet``: what to generate, and in which shard."""

    shard: Annotated[int, "number of the shard"]
    position: Annotated[int, "position in the shard"]
    image_size: Annotated[int, "bytes of the image file when the run was planned; -1: unknown", pa.int64()]


class Results(TypedDict, total=False):
    """Columns that a worker adds to a planned record. In quarantined records most of them are None."""

    image_sha256: Annotated[str, "SHA-256 of the image file"]
    width: Annotated[int, "width of the image file in pixels; generated images have the recipe's resolution"]
    height: Annotated[int, "height of the image file in pixels"]
    source_prompt: Annotated[str, "prompt that describes the input image; may be empty"]
    attribution_kind: Annotated[str, "kind of the attribution map: difference and smoothing"]
    model_digest: Annotated[str, "digest of the model's weights"]
    device: Annotated[
        str, "GPU with CUDA and cuDNN, or kind of the CPU; and float32 where a smaller dtype was not finite"
    ]
    counterfactual_path: Annotated[str, "path of the counterfactual, relative to the run"]
    attribution_path: Annotated[str, "path of the attribution map, relative to the run"]
    reconstruction_path: Annotated[str, "path of the reconstruction, relative to the run"]
    ssim: Annotated[float, "SSIM of image and counterfactual, in [-1, 1]"]
    ms_ssim: Annotated[float, "MS-SSIM of image and counterfactual, in [0, 1]"]
    ms_ssim_scales: Annotated[int, "number of scales of MS-SSIM; five from 176 pixels"]
    psnr: Annotated[float, "PSNR of image and counterfactual, in dB; infinite for equal images"]
    l1: Annotated[float, "mean |image - counterfactual|, in [0, 1]"]
    attribution_energy: Annotated[float, "mean absolute value of the attribution map, in [0, 1]"]
    attribution_energy_lung_fraction: Annotated[float | None, "fraction of it inside the lungs; null without a mask"]
    judge_image: Annotated[float | None, "the judge's probability of healthy for the image; null without a judge"]
    judge_counterfactual: Annotated[float | None, "the judge's probability of healthy for the counterfactual"]
    counterfactual_sha256: Annotated[str, "SHA-256 of the counterfactual's pixels"]
    attribution_sha256: Annotated[str, "SHA-256 of the attribution map's 16-bit levels"]
    reconstruction_sha256: Annotated[str, "SHA-256 of the reconstruction's pixels"]
    status: Annotated[str, "outcome of the record"]
    error: Annotated[str | None, "reason if status is not ok, else null"]


class Record(Columns, Results):
    """A row of ``records/*.parquet``: a planned record and its results. Further columns of the data set's table, as
    text, follow in the file."""


def complete(planned: PlannedRecord, results: Results) -> Record:
    """The record of a planned record, with all columns of RECORDS and the planned record's further ones; results that
    are missing are None."""
    further = {name: value for name, value in planned.items() if name not in PLAN.names}
    values = {**planned, **results}
    return cast(Record, {**{name: values.get(name) for name in RECORDS.names}, **further})


ARROW = {str: pa.string(), int: pa.int32(), float: pa.float64()}  # Arrow types of the columns


def _arrow_schema(row: type) -> pa.Schema:
    """The columns of a TypedDict as an Arrow schema."""
    fields = []
    for name, hint in get_type_hints(row, include_extras=True).items():
        (kind, *_), (_, *arrow) = (*get_args(hint.__origin__), hint.__origin__), hint.__metadata__  # str of str | None
        fields.append((name, *(arrow or [ARROW[kind]])))
    return pa.schema(fields)


PLAN, RECORDS = _arrow_schema(PlannedRecord), _arrow_schema(Record)


def with_columns(schema: pa.Schema, columns: Iterable[str]) -> pa.Schema:
    """PLAN or RECORDS with further columns of text."""
    return pa.schema([*schema, *((name, pa.string()) for name in columns)])


MEANINGS = {name: hint.__metadata__[0] for name, hint in get_type_hints(Record, include_extras=True).items()}
