"""Identity and columns: what a record is called, what seeds it, and what is written about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

import pyarrow as pa

Row = dict[str, Any]  # a record, or a row of a table, by column
SCHEMA_VERSION = 1
ENGINE = 3  # raised whenever the engine rounds differently for the same settings: part of a run's fingerprint


class Status(str, Enum):
    """How a planned record ended. Everything but ``OK`` is quarantined, with a reason in ``error``."""

    OK = "ok"
    MISSING = "missing"
    BAD_IMAGE = "bad_image"
    TOO_SMALL = "too_small"
    PROMPT_TOO_LONG = "prompt_too_long"
    NON_FINITE = "non_finite"
    KILLED_WORKER = "killed_worker"
    ERROR = "error"


def digest(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of ``value``: keys sorted, no spaces, ASCII."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def record_id(source_key: str, label: str, prompt: str, method: str, settings: Mapping[str, Any]) -> str:
    """Name of one planned record: 20 hex digits (80 bits: two of 50 million collide with odds near 1e-9).

    ``source_key`` is the film's path relative to the data root, so moving a bucket keeps every id.
    """
    return digest([source_key, label, prompt, method, dict(settings)])[:20]


def record_seed(run_seed: int, source_key: str, draw: int) -> int:
    """Seed of the record's own generator, in [0, 2**63).

    Prompt and settings stay out of it on purpose: all prompts and sweep points of one film share their noise, so they
    are paired comparisons.
    """
    return int(digest([run_seed, source_key, draw])[:16], 16) >> 1


PLAN = pa.schema(
    [
        ("record_id", pa.string()),
        ("shard", pa.int32()),
        ("position", pa.int32()),
        ("source_path", pa.string()),
        ("source_size", pa.int64()),
        ("label", pa.string()),
        ("prompt", pa.string()),
        ("method", pa.string()),
        ("scheduler", pa.string()),
        ("strength", pa.float64()),
        ("guidance_scale", pa.float64()),
        ("num_inference_steps", pa.int32()),
        ("seed", pa.int64()),
        ("draw", pa.int32()),
        ("lung_mask_path", pa.string()),
        ("lesion_mask_path", pa.string()),
        ("twin_path", pa.string()),
    ]
)

RECORDS = pa.schema(
    [
        ("record_id", pa.string()),
        ("source_path", pa.string()),  # this and the next three: relative to data_root in run.json
        ("lung_mask_path", pa.string()),
        ("lesion_mask_path", pa.string()),
        ("twin_path", pa.string()),
        ("source_sha256", pa.string()),
        ("label", pa.string()),
        ("prompt", pa.string()),
        ("source_prompt", pa.string()),  # what the film was taken to show; empty: nothing in particular
        ("method", pa.string()),
        ("map", pa.string()),
        ("scheduler", pa.string()),
        ("strength", pa.float64()),
        ("guidance_scale", pa.float64()),
        ("num_inference_steps", pa.int32()),
        ("seed", pa.int64()),
        ("draw", pa.int32()),
        ("model_digest", pa.string()),
        ("counterfactual_path", pa.string()),  # this and the next two: relative to the run
        ("attribution_path", pa.string()),
        ("reconstruction_path", pa.string()),
        ("width", pa.int32()),  # of the source file; the generated images have the recipe's resolution
        ("height", pa.int32()),
        ("ssim", pa.float64()),
        ("ms_ssim", pa.float64()),
        ("ms_ssim_scales", pa.int32()),
        ("psnr", pa.float64()),
        ("l1", pa.float64()),
        ("map_energy", pa.float64()),
        ("map_energy_lung_fraction", pa.float64()),
        ("judge_source", pa.float64()),  # the judge's probability of the healthy class, before and after
        ("judge_counterfactual", pa.float64()),
        ("pixel_sha256", pa.string()),
        ("map_sha256", pa.string()),
        ("reconstruction_sha256", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)
