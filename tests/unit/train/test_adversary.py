"""The autoencoder's adversary: formulas by hand, and which network gets gradients."""

from __future__ import annotations

import pytest
import torch

from diffva_ray.train.adversary import PatchDiscriminator, adaptive_weight, feature_matching, frozen, hinge_loss


def test_hinge_loss_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 1.5) / 2))


def test_feature_matching_is_the_mean_over_layers_of_l1_and_moves_only_the_fake() -> None:
    real = [torch.zeros(1, 2, requires_grad=True), torch.ones(3)]
    fake = [torch.tensor([[1.0, 3.0]], requires_grad=True), torch.full((3,), 0.5)]
    loss = feature_matching(real, fake)
    loss.backward()
    assert loss.item() == pytest.approx((2.0 + 0.5) / 2)
    assert real[0].grad is None
    assert fake[0].grad is not None


def test_adaptive_weight_balances_gradients_at_the_last_layer() -> None:
    layer = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction, adversarial = (layer**2).sum(), (2 * layer).sum()  # gradients (6, 8) and (2, 2)
    assert adaptive_weight(reconstruction, adversarial, layer).item() == pytest.approx(10 / 8**0.5, rel=1e-5)


def test_a_frozen_adversary_passes_gradients_on_and_keeps_none() -> None:
    adversary, image = PatchDiscriminator(), torch.rand(1, 3, 32, 32, requires_grad=True)
    with frozen(adversary):
        adversary(image)[0].mean().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in adversary.parameters())


def test_the_logits_of_an_image_do_not_depend_on_the_batch() -> None:
    adversary, images = PatchDiscriminator().eval(), torch.rand(3, 3, 32, 32)
    assert adversary(images)[0][1].detach() == pytest.approx(adversary(images[1:2])[0][0].detach(), abs=1e-5)
