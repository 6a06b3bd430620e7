"""Requests in micro-batches: each has the pixels that it has alone, and a bad one spoils no other."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from diffva_ray.cli import main
from diffva_ray.data.encoding import encode_mask
from diffva_ray.explain.requests import Responder


@pytest.fixture(scope="module")
def responder(model: Path) -> Responder:
    return Responder(str(model), device="cpu")


@pytest.fixture(scope="module")
def paths(images: Path) -> list[Path]:
    return sorted((images / "COVID" / "images").iterdir())


def request(path: Path, prompt: str = "", seed: int = 0, mask: bytes = b"", **settings: Any) -> dict[str, Any]:
    return {"name": path.name, "data": path.read_bytes(), "prompt": prompt, "seed": seed, "mask": mask,
            "settings": settings}  # fmt: skip


def test_answers_have_the_pixels_and_numbers_of_explain(
    responder: Responder, paths: list[Path], model: Path, tmp_path: Path
) -> None:
    (answer,) = responder([request(paths[0], "COVID 19", 5, strength=0.7)])
    arguments = [
        "explain",
        paths[0],
        "--model",
        model,
        "--prompt",
        "COVID 19",
        "--seed",
        5,
        "--strength",
        0.7,
        "--json",
    ]
    result = CliRunner().invoke(main, [str(value) for value in (*arguments, "--out", tmp_path / "sheet.png")])
    explained = json.loads(result.output)["answers"][0]
    for name in ("counterfactual_sha256", "attribution_sha256", "ssim", "judge_image", "judge_counterfactual"):
        assert answer[name] == explained[name]
    assert Image.open(io.BytesIO(base64.b64decode(answer["counterfactual"]))).mode == "L"
    assert Image.open(io.BytesIO(base64.b64decode(answer["attribution"]))).mode == "I;16"


def test_mixed_requests_are_answered_in_order_as_each_alone(responder: Responder, paths: list[Path]) -> None:
    mask = np.zeros((32, 32), bool)
    mask[8:20, 8:20] = True
    mixed = [
        request(paths[0]), {**request(paths[1]), "data": b"no image"}, request(paths[2], strength=0.7),
        request(paths[3], seed=9), request(paths[0], strength=3), request(paths[0], mask=encode_mask(mask)),
        request(paths[0], method="controlnet"), request(paths[0], "far too long " * 50), request(paths[4]),
        request(paths[5]), request(paths[1]),
    ]  # fmt: skip
    assert len([one for one in mixed if not one["settings"]]) > responder.batch
    together = responder(mixed)
    for one, answer in zip(mixed, together, strict=True):
        assert responder([one]) == [answer]
    reasons = [answer.get("error", "") for answer in together]
    assert [bool(reason) for reason in reasons] == [n in (1, 4, 6, 7) for n in range(11)]
    assert all(len(reason.splitlines()) <= 1 for reason in reasons)
    for n, word in ((1, "not an image"), (4, "strength"), (6, "controlnet"), (7, "tokens")):
        assert word in reasons[n]


def test_a_mask_keeps_the_pixels_outside(responder: Responder, paths: list[Path]) -> None:
    mask = np.zeros((32, 32), bool)
    mask[8:20, 8:20] = True
    (answer,) = responder([request(paths[0], mask=encode_mask(mask), strength=1.0)])
    made = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["counterfactual"]))))
    image = np.asarray(Image.open(paths[0]).convert("L"))
    far = np.ones((32, 32), bool)
    far[5:23, 5:23] = False
    np.testing.assert_array_equal(made[far], image[far])
    assert (made != image)[mask].any()
    assert answer["settings"]["method"] == "masked"
