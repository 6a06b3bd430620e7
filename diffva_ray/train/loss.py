"""Training objectives, as plain functions of tensors."""

from __future__ import annotations

import torch
from torch.nn import functional


def autoencoder_loss(
    reconstruction: torch.Tensor,
    images: torch.Tensor,
    mean: torch.Tensor,
    logvar: torch.Tensor,
    kl_weight: float,
    gradient_weight: float,
) -> torch.Tensor:
    """L1 + gradient L1 + KL loss of images [n, c, H, W] in [-1, 1]. The gradient term keeps ribs and vessels sharp
    without downloaded perceptual weights. The KL divergence to N(0, 1) is averaged over latent elements."""
    error = reconstruction - images
    gradient = (error[..., 1:, :] - error[..., :-1, :]).abs().mean() + (
        error[..., :, 1:] - error[..., :, :-1]
    ).abs().mean()
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + gradient_weight * gradient + kl_weight * divergence


def min_snr_weights(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, gamma: float, prediction_type: str
) -> torch.Tensor:
    """Return min-SNR-gamma weights [n] (Hang et al. 2023, section 3.4): min(SNR, gamma) / SNR for noise prediction, and
    min(SNR, gamma) / (SNR + 1) for velocity prediction."""
    alpha = alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    return snr.clamp(max=gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)


def denoising_loss(
    output: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor | None = None,
    instances: int | None = None,
    prior_loss_weight: float = 1.0,
    emphasis: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error of [n, ...], weighted by ``weights`` [n] and by ``emphasis`` [n, 1, h, w] if given.

    With ``instances``, the rest of the batch is DreamBooth's class set: loss = mean(instances) + prior_loss_weight *
    mean(class set) (Ruiz et al. 2023). The weights are split like the errors (diffusers' script does not:
    huggingface/diffusers#5791)."""
    errors = functional.mse_loss(output.float(), target.float(), reduction="none")
    errors = (errors if emphasis is None else errors * emphasis).flatten(1).mean(1)
    if weights is not None:
        errors = errors * weights
    if instances is None or instances == len(errors):
        return errors.mean()
    return errors[:instances].mean() + prior_loss_weight * errors[instances:].mean()


def learning_rate(step: int, steps: int, base: float, warmup: int, schedule: str, final_fraction: float) -> float:
    """Learning rate of one step (counted from 0): linear warm-up, then constant, or a cosine from ``base`` down to
    ``final_fraction`` of it."""
    if step < warmup:
        return base * (step + 1) / warmup
    if schedule == "constant":
        return base
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
    return base * (final_fraction + (1 - final_fraction) * cosine)
