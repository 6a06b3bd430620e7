"""The reference systems edit as their papers say; without its own part, each is the simpler method it contains."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from diffva_ray.config.generation import ClassifierGuidedConfig, ReferencesConfig
from diffva_ray.counterfactual.engine import CounterfactualBatch, CounterfactualEngine
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.data.phantoms import phantom
from diffva_ray.model import text
from diffva_ray.model.bundle import Bundle
from diffva_ray.references.charachon import path_gradient
from diffva_ray.references.ddim import decode
from diffva_ray.references.healthy_only import octaves
from diffva_ray.references.swiss_army_knife import severity, task_gradient
from diffva_ray.references.textual_inversion import PLACE, SENTENCE, sentence
from diffva_ray.references.time_editing import edited, means_healthy, tokens

IMAGES = [phantom(label, n, seed=1, size=32).image for n, label in enumerate(["COVID", "Lung_Opacity", "Normal"])]
ILL, HEALTHY = "COVID 19", "normal chest scan"


@pytest.fixture(scope="module")
def bundle(complete: Callable[[], Bundle]) -> Bundle:
    return complete()


def run(
    bundle: Bundle, method: str, prompt: str = HEALTHY, scale: float = 30.0, **settings: object
) -> CounterfactualBatch:
    own = {key: settings.pop(key) for key in list(settings) if key in ReferencesConfig.model_fields}
    changes = {
        "source_prompt": settings.pop("source", ""),
        "negative_prompt": "",
        "classifier_guided": ClassifierGuidedConfig(scale=scale),
        "references": ReferencesConfig(**own),
    }
    engine = CounterfactualEngine(bundle, bundle.recipe.generate.model_copy(update=changes), "cpu")
    chosen = engine.settings.replace(
        **{"method": method, "scheduler": "ddim", "num_inference_steps": 10, "guidance_scale": 3.0, **settings}
    )
    return engine(IMAGES, [1, 2, 3], [prompt] * 3, chosen)


def gap(one: CounterfactualBatch, other: CounterfactualBatch) -> float:
    return float(np.abs(one.counterfactuals - other.counterfactuals).max())


def test_wolleb_is_classifier_guidance_of_the_unconditional_model(bundle: Bundle) -> None:
    """Also where the recipe names a source prompt, which then has no effect."""
    theirs = run(bundle, "wolleb", source=ILL)
    assert gap(theirs, run(bundle, "classifier-guided")) < 1e-5
    assert gap(theirs, run(bundle, "classifier-guided", source=ILL)) > 1e-3


def test_diff_scm_and_what_is_healthy_are_normalised_dynamically(bundle: Bundle) -> None:
    """A quantile of 1 that is never reached leaves Wolleb's method and DDIM inversion."""
    for method, plain in (("diff-scm", "wolleb"), ("what-is-healthy", "ddim-inversion")):
        weak = {"scale": 1.0, "guidance_scale": 1.0, "prompt": ""}
        assert gap(run(bundle, method, quantile=0.5, **weak), run(bundle, plain, **weak)) > 1e-3
    strong = {"guidance_scale": 60.0}
    reach = [np.ptp(run(bundle, method, **strong).counterfactuals) for method in ("what-is-healthy", "ddim-inversion")]
    assert reach[0] < reach[1]


def test_the_task_gradient_is_that_of_the_squared_error_of_the_severity(bundle: Bundle) -> None:
    classifier = bundle.extra("classifier").double()
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    t, wanted, step = torch.tensor(300), -4.0, 1e-5
    found = task_gradient(classifier, z, t, wanted)
    way = torch.randn_like(z)
    with torch.no_grad():
        errors = [(severity(classifier, z + sign * step * way, t) - wanted).square().sum() / 2 for sign in (1, -1)]
        healthy = classifier.log_healthy(z, t)
        assert severity(classifier, z, t).item() == pytest.approx((torch.log1p(-healthy.exp()) - healthy).item())
    assert ((errors[0] - errors[1]) / (2 * step)).item() == pytest.approx((found * way).sum().item(), rel=1e-4)
    classifier.float()


def test_the_swiss_army_knife_moves_severity_towards_the_wanted_value(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up as well as down, and not at all where the value is reached already."""
    ends: list[torch.Tensor] = []
    decode = LatentDiffusion.decode
    monkeypatch.setattr(LatentDiffusion, "decode", lambda self, z: ends.append(z) or decode(self, z))
    reached = {}
    for wanted in (-1.0, 0.0, 1.0):
        run(bundle, "swiss-army-knife", scale=3.0, severity=wanted)
        with torch.inference_mode():
            reached[wanted] = severity(bundle.extra("classifier"), ends[-2], torch.tensor(0)).mean().item()
    assert reached[-1.0] < reached[0.0] < reached[1.0]


def test_partial_diffusion_reads_nothing_but_the_image(bundle: Bundle) -> None:
    """The more noise the more of the image is lost; with AutoDDPM what lies outside the mask is kept."""
    lost = []
    for strength in (0.2, 0.9):
        made = run(bundle, "anoddpm", strength=strength)
        lost.append(np.abs(made.counterfactuals - made.reconstructions).mean())
    assert lost[0] < lost[1]
    assert gap(run(bundle, "anoddpm"), run(bundle, "anoddpm", prompt=ILL)) == 0
    kept, wide = (run(bundle, "autoddpm", strength=0.9, mask_quantile=part) for part in (0.95, 0.3))
    assert np.abs(kept.counterfactuals - kept.reconstructions).mean() < lost[1]
    assert (
        np.abs(kept.counterfactuals - kept.reconstructions).mean()
        < np.abs(wide.counterfactuals - wide.reconstructions).mean()
    )


def test_times_edit_minimises_its_objective() -> None:
    """By gradient, and in its limits: with a small weight the sources' tokens become the targets'; with a large one
    nothing changes; directions that no source has are mapped as before in any case."""
    torch.manual_seed(0)
    w, k, d = torch.randn(5, 8).double(), torch.randn(3, 8).double(), torch.randn(3, 8).double()
    found = edited(w, k, d, 0.3).requires_grad_()
    objective = (k @ found.T - d @ w.T).square().sum() + 0.3 * (found - w).square().sum()
    (slope,) = torch.autograd.grad(objective, found)
    assert slope.abs().max() < 1e-10
    assert edited(w, k, d, 1e-9) @ k.T == pytest.approx((w @ d.T).numpy(), abs=1e-6)
    assert edited(w, k, d, 1e9) == pytest.approx(w.numpy(), abs=1e-6)
    other = torch.linalg.svd(k).Vh[-1]
    assert edited(w, k, d, 0.3) @ other == pytest.approx((w @ other).numpy(), abs=1e-9)


def test_time_makes_the_diseases_words_mean_healthy_while_it_edits(bundle: Bundle) -> None:
    """The model under the disease's prompt then predicts what it predicted under the healthy one, and afterwards it is
    bit for bit the model that it was."""
    model, z, t = LatentDiffusion(bundle), torch.randn(1, 4, 8, 8), torch.tensor(400)
    before = {name: value.clone() for name, value in bundle.unet.state_dict().items()}
    with torch.inference_mode():
        ill, healthy = tokens(model, [ILL, bundle.recipe.data.healthy_prompt]).split(1)
        own, wanted = model.predict(z, t, ill), model.predict(z, t, healthy)
        with means_healthy(model, 1e-3):
            made = model.predict(z, t, ill)
        assert (made - wanted).abs().mean() < 0.3 * (own - wanted).abs().mean()
    assert all(torch.equal(before[name], value) for name, value in bundle.unet.state_dict().items())
    assert gap(run(bundle, "time", source=ILL), run(bundle, "ddim-inversion", source=ILL, prompt=ILL)) > 1e-4


def test_a_vector_takes_the_place_of_one_word(bundle: Bundle) -> None:
    """With the embedding of that word the sentence is the sentence; another vector changes it."""
    words = bundle.text_encoder.get_input_embeddings().weight
    ids, mask = text.tokenize(bundle.tokenizer, [SENTENCE])
    with torch.inference_mode():
        plain = text.embed(bundle.text_encoder, ids, mask)
        assert sentence(bundle, words[ids[0, PLACE]][None]) == pytest.approx(plain.numpy(), abs=1e-6)
        assert (sentence(bundle, -words[ids[0, PLACE]][None]) - plain).abs().max() > 1e-3
    assert gap(run(bundle, "textual-inversion"), run(bundle, "ddim-inversion")) > 0


def test_steex_makes_the_classifier_call_the_image_healthy(bundle: Bundle) -> None:
    """The more the smaller the weight of proximity."""
    classifier, odds = bundle.extra("image_classifier"), []
    for proximity in (0.0, 1000.0):
        made = run(bundle, "steex", strength=1.0, num_inference_steps=20, proximity=proximity)
        odds.append(classifier.log_odds(torch.from_numpy(made.counterfactuals)).mean().item())
    untouched = classifier.log_odds(torch.from_numpy(made.reconstructions)).mean().item()
    assert odds[0] < odds[1] <= untouched + 1e-3


def test_steex_changes_the_latents_of_the_region_alone(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[torch.Tensor] = []
    generated = LatentDiffusion.generated

    def watched(model: LatentDiffusion, z: torch.Tensor, request: Edit) -> Generated:
        changes.append(z - request.latents)
        return generated(model, z, request)

    monkeypatch.setattr(LatentDiffusion, "generated", watched)
    engine = CounterfactualEngine(bundle, bundle.recipe.generate.model_copy(update={"source_prompt": ""}), "cpu")
    lungs = np.zeros((32, 32), np.bool_)
    lungs[:, :16] = True
    settings = engine.settings.replace(method="steex", scheduler="ddim", num_inference_steps=5)
    engine(IMAGES[:1], [1], settings=settings, lungs=[lungs])
    assert changes[0][0, :, :, 4:].abs().max() == 0
    assert changes[0][0, :, :, :4].abs().max() > 0


def test_singla_makes_another_image_for_another_posterior(bundle: Bundle) -> None:
    assert gap(run(bundle, "singla", posterior=0.0), run(bundle, "singla", posterior=1.0)) > 1e-3


def test_charachons_map_is_the_difference_of_both_images_weighted_by_the_gradient(bundle: Bundle) -> None:
    """What both lose of the image is in neither map."""
    plain, weighted = (run(bundle, "charachon", gradients=used) for used in (False, True))
    assert np.array_equal(plain.reconstructions, weighted.reconstructions)
    whole, part = (made.reconstructions - made.counterfactuals for made in (plain, weighted))
    assert (np.abs(part) <= np.abs(whole) + 1e-6).all()
    assert 0 < np.abs(part).sum() < np.abs(whole).sum()
    weight = path_gradient(bundle.extra("image_classifier"), *torch.rand(2, 3, 32, 32))
    assert weight.amax(dim=(1, 2)) == pytest.approx(np.ones(3))
    assert weight.min() >= 0


def test_noise_of_octaves_has_unit_variance_and_is_correlated_by_blocks() -> None:
    made = octaves(torch.randn(4000, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert made.shape == (4000, 1, 8, 8)
    assert made.var(0).mean().item() == pytest.approx(1, abs=0.02)
    within, across = ((made[:, 0, 0, 0] * made[:, 0, 0, x]).mean().item() for x in (1, 4))
    assert within == pytest.approx(2 / 3, abs=0.05)
    assert across == pytest.approx(0, abs=0.05)


def test_the_ddpm_steps_keep_a_gaussian(bundle: Bundle) -> None:
    """For data N(0, 1) the exact prediction of the noise is known; variance 1 is kept the better the more steps."""
    model, gaps = LatentDiffusion(bundle), []
    for stride in (100, 10):
        timesteps = torch.arange(981, 0, -stride)
        z, *noises = torch.randn(len(timesteps) + 1, 20000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
        made = decode(model, z, timesteps, lambda z_t, t: (1 - model.alphas[t]).sqrt() * z_t, noises=noises)
        gaps.append(abs(made.std().item() - 1))
        assert (z * made).mean().abs().item() < 0.2  # nothing of the start is left; without noise it would be
    assert gaps[1] < gaps[0]
    assert gaps[1] < 0.04
