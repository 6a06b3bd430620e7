"""Every formula against numbers worked out by hand."""

import math

import pytest
import torch

from diffva_ray.train.loss import autoencoder_loss, denoising_loss, learning_rate, min_snr_weights


def test_prior_preservation_is_two_means() -> None:
    output = torch.tensor([[1.0, 1.0], [3.0, 1.0], [0.0, 2.0], [2.0, 2.0]])
    target = torch.zeros(4, 2)
    # errors: 1, 5 | 2, 4
    assert denoising_loss(output, target).item() == pytest.approx(3.0)
    assert denoising_loss(output, target, instances=2, prior_loss_weight=0.5).item() == pytest.approx(3.0 + 0.5 * 3.0)


@pytest.mark.parametrize("batch", [1, 2])
def test_min_snr_weights_stay_with_their_samples_under_prior_preservation(batch: int) -> None:
    """The defect of diffusers' script (huggingface/diffusers#5791): B losses met 2B weights."""
    output = torch.arange(1.0, 2 * batch + 1)[:, None]
    weights = torch.arange(1.0, 2 * batch + 1) / 10
    loss = denoising_loss(output, torch.zeros_like(output), weights, instances=batch, prior_loss_weight=2.0)
    weighted = [(n + 1) ** 2 * (n + 1) / 10 for n in range(2 * batch)]
    assert loss.item() == pytest.approx(sum(weighted[:batch]) / batch + 2 * sum(weighted[batch:]) / batch)


def test_min_snr_weights_by_hand() -> None:
    alphas = torch.tensor([0.9, 0.5, 0.1])  # SNR 9, 1, 1/9
    steps = torch.tensor([0, 1, 2])
    assert min_snr_weights(alphas, steps, 5.0, "epsilon").tolist() == pytest.approx([5 / 9, 1.0, 1.0])
    assert min_snr_weights(alphas, steps, 5.0, "v_prediction").tolist() == pytest.approx([0.5, 0.5, 0.1])


def test_autoencoder_loss_by_hand() -> None:
    images = torch.zeros(1, 1, 2, 2)
    reconstruction = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])
    mean, logvar = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), math.log(0.5))
    # L1 0.5; gradient down 0, across 1; KL 0.5 (1 + 0.5 - 1 + ln 2)
    expected = 0.5 + 0.25 * 1.0 + 0.1 * 0.5 * (0.5 + math.log(2))
    assert autoencoder_loss(reconstruction, images, mean, logvar, 0.1, 0.25).item() == pytest.approx(expected)


def test_learning_rate_warms_up_and_ends_at_its_fraction() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, 100, 2.0, 10, "cosine", 0.05)

    assert rate(0) == pytest.approx(0.2)
    assert rate(9) == rate(10) == pytest.approx(2.0)
    assert rate(55) == pytest.approx(2.0 * (0.05 + 0.95 * 0.5))
    assert rate(100) == pytest.approx(0.1)
    assert learning_rate(99, 100, 2.0, 10, "constant", 0.05) == 2.0
