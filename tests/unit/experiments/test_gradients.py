"""Gradient baselines on a classifier with a known answer, on the judge and on the latent classifier."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gradients import (
    BASELINES,
    BLUR,
    ImageClassifier,
    grad_cam,
    integrated_gradients,
    occlusion,
)
from torch import nn

from diffva_ray.counterfactual.latent_diffusion import LatentDiffusion
from diffva_ray.data.phantoms import phantom
from diffva_ray.metrics.localization import smooth
from diffva_ray.metrics.validity import Judge
from diffva_ray.model.bundle import load
from diffva_ray.model.classifier import LatentClassifier

pytest.importorskip("captum")

IMAGES = np.stack([phantom(label, n, seed=1, size=32).image for n, label in enumerate(["COVID", "Normal"])])

BLURRED = np.stack([smooth(image, BLUR) for image in IMAGES])


class Corner(nn.Module):
    """Takes the brightness of the corner [:8, :8], and nothing else, as evidence of disease."""

    classes, healthy = ("Ill", "Normal"), "Normal"

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.convolution.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        evidence = self.convolution(images[:, None])[:, 0, :8, :8].sum(dim=(1, 2))
        return torch.stack([evidence, torch.zeros_like(evidence)], dim=1)


CORNER = np.zeros((32, 32), bool)
CORNER[:8, :8] = True


def test_integrated_gradients_of_a_linear_score_are_its_terms() -> None:
    result = integrated_gradients(Corner(), IMAGES)
    assert result == pytest.approx((IMAGES - BLURRED) * CORNER, abs=1e-5)


def test_integrated_gradients_are_complete() -> None:
    """They sum to the score of the image minus that of the blurred image."""
    torch.manual_seed(0)
    judge = Judge(["COVID", "Lung_Opacity", "Normal"], "Normal").eval()
    images = torch.from_numpy(np.stack([IMAGES, BLURRED]))
    with torch.no_grad():
        logits = torch.stack([judge(each) for each in images])
    score = logits[..., :2].logsumexp(dim=-1) - logits[..., 2]
    maps = integrated_gradients(judge, IMAGES, steps=128)
    gap = maps.sum(axis=(1, 2)) - (score[0] - score[1]).numpy()
    assert (np.abs(gap) < 0.02 * np.abs(maps).sum(axis=(1, 2))).all()


def test_occlusion_finds_the_pixels_that_the_score_depends_on() -> None:
    image = np.full((1, 32, 32), 0.2, np.float32)
    image[0, :8, :8] = 1.0
    result = occlusion(Corner(), image)[0]
    assert result[CORNER].min() > 0
    assert result[12:, 12:].max() == pytest.approx(0, abs=1e-4)


def test_grad_cam_follows_the_last_convolution() -> None:
    """The convolution returns the brightness, and the score grows with it."""
    image = np.zeros((1, 32, 32), np.float32)
    image[0, 20:24, 20:24] = 1.0
    result = grad_cam(Corner(), image)[0]
    assert result[20:24, 20:24].min() > 0
    assert result[:16, :16].max() == 0


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_they_work_on_the_judge_and_on_the_latent_classifier(name: str, model: Path) -> None:
    bundle = load(str(model))
    torch.manual_seed(0)
    bundle.extras["classifier"] = LatentClassifier(["COVID", "Normal"], "Normal", 4, (8, 16), 4)
    for classifier in (Judge(["COVID", "Normal"], "Normal").eval(), ImageClassifier(LatentDiffusion(bundle))):
        with torch.inference_mode():
            maps = BASELINES[name](classifier, IMAGES)
            alone = BASELINES[name](classifier, IMAGES[1:])
        assert maps.shape == IMAGES.shape
        assert np.isfinite(maps).all()
        assert np.ptp(maps[0]) > 0
        assert maps[1] == pytest.approx(alone[0], abs=1e-4 * float(np.abs(alone).max()))


def test_without_captum_the_error_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(ValueError, match=r"diffva-ray\[gradients\]"):
        occlusion(Corner(), IMAGES)
