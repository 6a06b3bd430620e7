"""Schedulers are unbiased on a Gaussian whose noise prediction is known; PNDM only with its repeated timestep."""

from __future__ import annotations

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from diffva_ray.model.bundle import SD_SCHEDULER
from diffva_ray.model.schedulers import schedule

MEAN, SPREAD = 0.3, 0.7


def sampled_bias(name: str, steps: int, strength: float, prediction: str = "epsilon") -> float:
    """Error of the mean after noising N(MEAN, SPREAD^2) to the first timestep and denoising with its exact noise
    prediction. The prediction is linear, so one point gives the mean."""
    scheduler, timesteps = schedule(name, {**SD_SCHEDULER, "prediction_type": prediction}, steps, strength)
    alphas = scheduler.alphas_cumprod.double()
    image = torch.full((1, 1, 1, 1), MEAN, dtype=torch.float64)
    latents = scheduler.add_noise(image, torch.zeros_like(image), timesteps[:1]).double()
    for timestep in timesteps:
        alpha = alphas[int(timestep)]
        variance = alpha * SPREAD**2 + (1 - alpha)
        scaled = scheduler.scale_model_input(latents, timestep)
        noise = (1 - alpha).sqrt() * (scaled - alpha.sqrt() * MEAN) / variance
        velocity = (noise - (1 - alpha).sqrt() * scaled) / alpha.sqrt()
        latents = scheduler.step(velocity if prediction == "v_prediction" else noise, timestep, latents).prev_sample
    last = alphas[0].sqrt() if name in ("pndm", "pndm-diffusers", "ddim") else 1.0  # the others end without noise
    return float(latents - last * MEAN)


@pytest.mark.parametrize(("steps", "strength"), [(50, 0.55), (50, 0.85), (75, 0.55)])
def test_aligned_pndm_is_unbiased_and_the_sliced_one_is_not(steps: int, strength: float) -> None:
    assert abs(sampled_bias("pndm", steps, strength)) < 1e-4
    assert abs(sampled_bias("pndm-diffusers", steps, strength)) > 2e-3


@pytest.mark.parametrize(("steps", "strength"), [(20, 0.6), (75, 0.55), (75, 0.85)])
def test_aligned_pndm_is_as_unbiased_for_a_network_that_predicts_velocity(steps: int, strength: float) -> None:
    """Mixed velocities of several timesteps have a bias of 0.007 and more."""
    noise, velocity = (sampled_bias("pndm", steps, strength, kind) for kind in ("epsilon", "v_prediction"))
    assert abs(velocity) < 5e-4
    assert velocity == pytest.approx(noise, abs=1e-6)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc", "euler"])
@pytest.mark.parametrize(("steps", "strength"), [(50, 0.55), (75, 0.85)])
def test_the_other_samplers_are_unbiased(name: str, steps: int, strength: float) -> None:
    assert abs(sampled_bias(name, steps, strength)) < (2e-4 if name == "euler" else 1e-4)  # first order, wide steps


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("steps", "skipped"), [(1, 0), (2, 0), (6, 3), (20, 9)])
def test_unipc_equals_diffusers_to_the_last_bit(prediction: str, steps: int, skipped: int) -> None:
    config = {**SD_SCHEDULER, "prediction_type": prediction}
    ours, timesteps = schedule("unipc", config, steps, (steps - skipped) / steps)
    theirs = UniPCMultistepScheduler.from_config({**config, "timestep_spacing": "trailing"})
    theirs.set_timesteps(steps)
    theirs.set_begin_index(skipped)
    assert torch.equal(timesteps, theirs.timesteps[skipped:])
    generator = torch.Generator().manual_seed(0)
    one = two = torch.randn(2, 4, 8, 8, generator=generator)
    for timestep in timesteps:
        output = torch.randn(one.shape, generator=generator)
        one = ours.step(output, timestep, one).prev_sample
        two = theirs.step(output, timestep, two).prev_sample
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["vp-sde", "ve-sde"])
def test_the_reverse_sde_has_the_distributions_mean_and_spread(name: str) -> None:
    """Euler-Maruyama is of first order: more steps reduce the error, down to the precision of 20 000 samples."""
    results = [sampled_distribution(name, steps) for steps in (50, 1000)]
    (few_mean, few_spread), (mean, spread) = ((abs(m - MEAN), abs(s - SPREAD)) for m, s in results)
    assert mean < 0.02
    assert spread < 0.02
    assert max(mean, spread) < max(few_mean, few_spread)


def sampled_distribution(name: str, steps: int) -> tuple[float, float]:
    """Mean and standard deviation of 20 000 samples of N(MEAN, SPREAD^2) after noising and denoising."""
    scheduler, timesteps = schedule(name, SD_SCHEDULER, steps, 0.85)
    generator = torch.Generator().manual_seed(0)
    images = MEAN + SPREAD * torch.randn(20_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    fresh = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    latents = scheduler.add_noise(images, fresh, timesteps[:1].repeat(len(images)))
    for timestep in timesteps:
        alpha = scheduler.alphas_cumprod.double()[int(timestep)]
        noise = (1 - alpha).sqrt() * (latents - alpha.sqrt() * MEAN) / (alpha * SPREAD**2 + 1 - alpha)
        latents = scheduler.step(noise, timestep, latents, generator=generator).prev_sample
    return float(latents.mean()), float(latents.std())


@pytest.mark.parametrize("name", ["dpmsolver++", "unipc"])
@pytest.mark.parametrize("steps", [5, 20, 75, 100, 500])
def test_the_noise_level_of_a_strength_does_not_depend_on_the_steps(name: str, steps: int) -> None:
    _, timesteps = schedule(name, SD_SCHEDULER, steps, 0.6)
    assert abs(int(timesteps[0]) - 600) <= max(1, 1000 // steps // 2)
    assert timesteps[-1] <= 1000 / steps


def test_at_full_strength_both_are_the_same() -> None:
    aligned, sliced = (schedule(name, SD_SCHEDULER, 50, 1.0)[1] for name in ("pndm", "pndm-diffusers"))
    assert torch.equal(aligned, sliced)


@pytest.mark.parametrize(("steps", "strength"), [(50, 0.4), (50, 0.55), (75, 0.85), (10, 0.1)])
def test_aligned_pndm_starts_where_ddim_starts_and_repeats_its_second_step(steps: int, strength: float) -> None:
    _, pndm = schedule("pndm", SD_SCHEDULER, steps, strength)
    _, ddim = schedule("ddim", SD_SCHEDULER, steps, strength)
    assert pndm[0] == ddim[0]
    assert torch.equal(pndm.unique(), ddim.unique())
    if len(ddim) > 1:
        assert pndm[1] == pndm[2]
        assert len(pndm) == len(ddim) + 1


def test_no_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match="no step"):
        schedule("ddim", SD_SCHEDULER, 20, 0.04)
    with pytest.raises(ValueError, match="euler-ish"):
        schedule("euler-ish", SD_SCHEDULER, 20, 0.5)
