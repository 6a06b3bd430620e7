"""Identity and columns: what a record is called, what seeds it, and what is written about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Image = NDArray[np.float32]  # grey in [0, 1], or a signed map in [-1, 1]; [H, W] unless it is said otherwise
Mask = NDArray[np.bool_]  # [H, W] likewise
Row = dict[str, Any]  # a record, or a row of a table, by column
SCHEMA_VERSION = 2  # 2: image, counterfactual, attribution; runs of version 1 have other columns and folders
ENGINE = 3  # raised whenever the engine rounds differently for the same settings: part of a run's fingerprint


class Status(str, Enum):
    """How a planned record ended. Everything but ``OK`` is quarantined, with a reason in ``error``."""

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
    """Name of one planned record: 20 hex digits (80 bits: two of 50 million collide with odds near 1e-9).

    ``image_key`` is the image's path relative to the data root, so moving a bucket keeps every id.

        >>> len(record_id("COVID/images/1.png", "COVID", "normal chest scan", "sdedit", {"strength": 0.5}))
        20
    """
    return digest([image_key, label, prompt, method, dict(settings)])[:20]


def record_seed(run_seed: int, image_key: str, sample: int) -> int:
    """Seed of the record's own generator, in [0, 2**63).

    Prompt and settings stay out of it on purpose: all prompts and sweep points of one image share their noise, so they
    are paired comparisons.

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
    ("record_id", pa.string(), "the planned record's name, 20 hex digits"),
    ("image_path", pa.string(), "the image, relative to data_root in run.json"),
    ("lung_mask_path", pa.string(), "its lung mask, likewise; empty without one"),
    ("lesion_mask_path", pa.string(), "its lesion mask, likewise"),
    ("ground_truth_path", pa.string(), "its ground-truth counterfactual, likewise: phantoms and implants have one"),
    ("image_sha256", pa.string(), "of the image's bytes"),
    ("label", pa.string(), "the class it was planned under"),
    ("prompt", pa.string(), "what the counterfactual is to show"),
    ("source_prompt", pa.string(), "what the image was taken to show; empty: nothing in particular"),
    ("method", pa.string(), "the counterfactual method"),
    ("attribution_kind", pa.string(), "the stored map: its difference and its smoothing"),
    ("scheduler", pa.string(), "the sampler"),
    ("strength", pa.float64(), "how far the image was taken apart, in (0, 1]"),
    ("guidance_scale", pa.float64(), "classifier-free guidance; 1 or less is none"),
    ("num_inference_steps", pa.int32(), "scheduler steps at strength 1"),
    ("seed", pa.int64(), "of the record's own noise"),
    ("sample", pa.int32(), "which of an image's samples, from 0"),
    ("model_digest", pa.string(), "of the weights that made it"),
    ("counterfactual_path", pa.string(), "the counterfactual, relative to the run"),
    ("attribution_path", pa.string(), "the map, relative to the run"),
    ("reconstruction_path", pa.string(), "the image given back unchanged, relative to the run"),
    ("width", pa.int32(), "of the image's file, in pixels; made images have the recipe's resolution"),
    ("height", pa.int32(), "of the image's file, in pixels"),
    ("ssim", pa.float64(), "SSIM of image and counterfactual, in [-1, 1]"),
    ("ms_ssim", pa.float64(), "MS-SSIM of image and counterfactual, in [0, 1]"),
    ("ms_ssim_scales", pa.int32(), "its number of scales; five from 176 pixels"),
    ("psnr", pa.float64(), "of image and counterfactual, in dB; infinite for equal images"),
    ("l1", pa.float64(), "mean |image - counterfactual|, in [0, 1]"),
    ("attribution_energy", pa.float64(), "mean |M|, in [0, 1]"),
    ("attribution_energy_lung_fraction", pa.float64(), "share of it inside the lungs; null without a mask"),
    ("judge_image", pa.float64(), "the judge's probability of healthy for the image; null without a judge"),
    ("judge_counterfactual", pa.float64(), "the same for the counterfactual"),
    ("counterfactual_sha256", pa.string(), "of the counterfactual's pixels"),
    ("attribution_sha256", pa.string(), "of the map's levels"),
    ("reconstruction_sha256", pa.string(), "of the reconstruction's pixels"),
    ("status", pa.string(), "how the record ended"),
    ("error", pa.string(), "why it is not ok; null where it is"),
)
RECORDS = pa.schema([(name, kind) for name, kind, _ in COLUMNS])
