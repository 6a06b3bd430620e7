"""Gradient baselines by captum: integrated gradients, Grad-CAM and occlusion of a classifier. All explain the log odds
of the image not being healthy, so positive means evidence of disease, as in attribution maps.

Each takes a ``classifier`` that returns logits [n, classes] of grey images [n, H, W] in [0, 1] and has the attributes
``classes`` and ``healthy``: the judge, or ``ImageClassifier``. All raise ValueError without the optional captum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from diffva_ray.counterfactual.latent_diffusion import LatentDiffusion
from diffva_ray.metrics.localization import smooth
from diffva_ray.provenance import missing

Images = NDArray[np.float32]
Baseline = Callable[..., Images]
IG_STEPS = 32  # points on the path of integrated gradients
BLUR = 0.1  # sigma of the blurred image, as a fraction of the width
WINDOW, STRIDE = 1 / 8, 1 / 16  # of occlusion, as fractions of the width
DARK = 0.1  # quantile of the image's grey values that occlusion fills with: air


class ImageClassifier(nn.Module):
    """The model's classifier of noisy latents, applied to images: to their posterior means, at timestep 0."""

    def __init__(self, model: LatentDiffusion) -> None:
        super().__init__()
        self.model = model
        self.network = model.bundle.extra("classifier").float().eval()
        self.classes, self.healthy = self.network.classes, self.network.healthy

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [n, classes] of grey images [n, H, W] in [0, 1]."""
        latents = self.model.encode(images)[0].float() * self.model.scale
        return self.network(latents, torch.zeros((), dtype=torch.long, device=images.device))


class _Abnormality(nn.Module):
    """log p(not healthy) - log p(healthy), [n]."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier
        self.index = tuple(classifier.classes).index(classifier.healthy)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.classifier(images)
        others = [n for n in range(logits.shape[1]) if n != self.index]
        return logits[:, others].logsumexp(dim=1) - logits[:, self.index]


def _captum() -> ModuleType:
    try:
        from captum import attr
    except ImportError:
        raise ValueError(missing("captum", "gradient baselines", "gradients")) from None
    return attr


def _on_tensors(baseline: Callable[..., torch.Tensor]) -> Baseline:
    """Wrap a baseline of tensors: arrays [n, H, W] in and out, on the classifier's device, with gradients enabled."""

    @wraps(baseline)
    def of_arrays(classifier: Any, images: Images, **options: Any) -> Images:
        device = next(classifier.parameters()).device
        with torch.inference_mode(False), torch.enable_grad():
            tensor = torch.from_numpy(np.ascontiguousarray(images)).to(device)
            maps = baseline(_Abnormality(classifier), tensor, **options)
        return maps.detach().float().cpu().numpy()

    return of_arrays


@_on_tensors
def integrated_gradients(score: nn.Module, images: torch.Tensor, steps: int = IG_STEPS) -> torch.Tensor:
    """Maps [n, H, W] (Sundararajan et al. 2017) against the blurred image (Sturmfels et al. 2020); a map sums to the
    image's score minus the blurred image's. A black baseline would be uninformative: the judge standardises every
    image, and between black and the image only the contrast changes."""
    baseline = np.stack([smooth(image, BLUR) for image in images.detach().cpu().numpy()])
    method = _captum().IntegratedGradients(score)
    return method.attribute(
        images, torch.from_numpy(baseline).to(images), n_steps=steps, internal_batch_size=max(len(images), 64)
    )


@_on_tensors
def grad_cam(score: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Maps [n, H, W] of the last convolution (Selvaraju et al. 2017), not negative, resized to the image."""
    layers = [module for module in score.modules() if isinstance(module, nn.Conv2d)]
    if not layers:
        raise ValueError("Grad-CAM needs a classifier with a convolution")
    maps = _captum().LayerGradCam(score, layers[-1]).attribute(images.requires_grad_(), relu_attributions=True)
    return functional.interpolate(maps, size=images.shape[1:], mode="bilinear")[:, 0]


@_on_tensors
def occlusion(score: nn.Module, images: torch.Tensor, window: float = WINDOW, stride: float = STRIDE) -> torch.Tensor:
    """Maps [n, H, W]: how much the score falls when a square (``window`` of the width) is filled, averaged over the
    squares that cover a pixel (Zeiler & Fergus 2014). The fill is the image's dark grey. With the usual mean grey, a
    square over healthy lung would be an opacity itself (AUROC on 24 phantoms 0.38 instead of 0.71)."""
    size = images.shape[-1]
    side, step = max(1, round(window * size)), max(1, round(stride * size))
    dark = images.flatten(1).quantile(DARK, dim=1)[:, None, None].expand_as(images)
    with torch.no_grad():
        return _captum().Occlusion(score).attribute(images, (side, side), strides=(step, step), baselines=dark)


BASELINES: dict[str, Baseline] = {
    "integrated_gradients": integrated_gradients,
    "grad_cam": grad_cam,
    "occlusion": occlusion,
}
