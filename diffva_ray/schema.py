"""Identity and columns of records: ids, seeds, statuses, Arrow schemas and array types."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Image = NDArray[np.float32]  # grey in [0, 1], or an attribution map in [-1, 1]; [H, W] unless documented otherwise
Mask = NDArray[np.bool_]  # [H, W] unless documented otherwise
Row = dict[str, Any]  # a record, or a row of a table, by column
SCHEMA_VERSION = 2  # version 1 had other names of columns and folders
ENGINE = 3  # part of a run's fingerprint; increase it when the engine rounds differently for the same settings


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


PLAN = pa.schema(
    [
        ("record_id", pa.string()),
        ("shard", pa.int32()),
        ("position", pa.int32()),
        ("image_path", pa.string()),
        ("image_size", pa.int64()),
        ("label", pa.string()),
        ("prompt", pa.string()),
        ("method", pa.string()),
        ("scheduler", pa.string()),
        ("strength", pa.float64()),
        ("guidance_scale", pa.float64()),
        ("num_inference_steps", pa.int32()),
        ("seed", pa.int64()),
        ("sample", pa.int32()),
        ("lung_mask_path", pa.string()),
        ("lesion_mask_path", pa.string()),
        ("ground_truth_path", pa.string()),
    ]
)

COLUMNS = (  # of records/*.parquet: name, type, meaning
    ("record_id", pa.string(), "id of the planned record, 20 hex digits"),
    ("image_path", pa.string(), "path of the image, relative to data_root in run.json"),
    ("lung_mask_path", pa.string(), "path of the lung mask, relative to data_root; empty without one"),
    ("lesion_mask_path", pa.string(), "path of the lesion mask, relative to data_root; empty without one"),
    ("ground_truth_path", pa.string(), "path of the ground-truth counterfactual, likewise; phantoms have one"),
    ("image_sha256", pa.string(), "SHA-256 of the image file"),
    ("label", pa.string(), "class that the image was planned under"),
    ("prompt", pa.string(), "prompt of the counterfactual"),
    ("source_prompt", pa.string(), "prompt that describes the input image; may be empty"),
    ("method", pa.string(), "counterfactual method"),
    ("attribution_kind", pa.string(), "kind of the attribution map: difference and smoothing"),
    ("scheduler", pa.string(), "sampler"),
    ("strength", pa.float64(), "fraction of the noise schedule applied to the image, in (0, 1]"),
    ("guidance_scale", pa.float64(), "scale of classifier-free guidance; 1 or less is no guidance"),
    ("num_inference_steps", pa.int32(), "sampler steps at strength 1"),
    ("seed", pa.int64(), "seed of the record's noise"),
    ("sample", pa.int32(), "index among the samples of the image, from 0"),
    ("model_digest", pa.string(), "digest of the model's weights"),
    ("counterfactual_path", pa.string(), "path of the counterfactual, relative to the run"),
    ("attribution_path", pa.string(), "path of the attribution map, relative to the run"),
    ("reconstruction_path", pa.string(), "path of the reconstruction, relative to the run"),
    ("width", pa.int32(), "width of the image file in pixels; generated images have the recipe's resolution"),
    ("height", pa.int32(), "height of the image file in pixels"),
    ("ssim", pa.float64(), "SSIM of image and counterfactual, in [-1, 1]"),
    ("ms_ssim", pa.float64(), "MS-SSIM of image and counterfactual, in [0, 1]"),
    ("ms_ssim_scales", pa.int32(), "number of scales of MS-SSIM; five from 176 pixels"),
    ("psnr", pa.float64(), "PSNR of image and counterfactual, in dB; infinite for equal images"),
    ("l1", pa.float64(), "mean |image - counterfactual|, in [0, 1]"),
    ("attribution_energy", pa.float64(), "mean absolute value of the attribution map, in [0, 1]"),
    ("attribution_energy_lung_fraction", pa.float64(), "fraction of it inside the lungs; null without a lung mask"),
    ("judge_image", pa.float64(), "the judge's probability of healthy for the image; null without a judge"),
    ("judge_counterfactual", pa.float64(), "the judge's probability of healthy for the counterfactual"),
    ("counterfactual_sha256", pa.string(), "SHA-256 of the counterfactual's pixels"),
    ("attribution_sha256", pa.string(), "SHA-256 of the attribution map's 16-bit levels"),
    ("reconstruction_sha256", pa.string(), "SHA-256 of the reconstruction's pixels"),
    ("status", pa.string(), "outcome of the record"),
    ("error", pa.string(), "reason if status is not ok, else null"),
)
RECORDS = pa.schema([(name, kind) for name, kind, _ in COLUMNS])
