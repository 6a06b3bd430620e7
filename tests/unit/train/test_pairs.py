"""Training on pairs, and method ``instruct-pix2pix``: the network reads the image, and equals diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionInstructPix2PixPipeline
from trainings import run, with_stages

from diffva_ray.config.recipe import Recipe, RecipeError
from diffva_ray.config.sampling import SamplingSettings
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.images import read_image
from diffva_ray.data.phantoms import phantom
from diffva_ray.model.bundle import build, load
from diffva_ray.model.card import UnusableModel
from diffva_ray.model.image_conditioning import add_image_channels, reads_image, with_image
from diffva_ray.storage.local import LocalStore
from diffva_ray.train.denoiser import DenoiserStage
from diffva_ray.train.loop import prepare

PHANTOMS = [phantom(label, n, seed=1, size=32) for n, label in enumerate(["COVID", "Lung_Opacity", "Normal"])]
IMAGES = [np.round(each.image * 255).astype(np.float32) / 255 for each in PHANTOMS]
SETTINGS = SamplingSettings(
    method="instruct-pix2pix", scheduler="ddim", strength=1.0, guidance_scale=1.0, num_inference_steps=5
)
AUTOENCODER = {"name": "autoencoder", "trains": "autoencoder", "steps": 60, "batch_size": 8, "learning_rate": 6e-3}
DENOISER = {"name": "joint", "trains": "denoiser", "steps": 300, "batch_size": 8, "learning_rate": 4e-3, "pairs": 0.9}


@pytest.fixture(scope="module")
def paired(tiny: Recipe, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model trained on the pairs of phantoms."""
    folder = tmp_path_factory.mktemp("paired") / "model"
    recipe = with_stages(tiny, AUTOENCODER, DENOISER)
    values = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"scheduler": {"prediction_type": "v_prediction"}})}
    )
    run(values, images, folder)
    return folder


def test_new_input_channels_change_nothing_at_first(tiny: Recipe) -> None:
    unet = build(tiny).unet
    latents, states = torch.randn(2, 4, 8, 8), torch.randn(2, 16, unet.config.cross_attention_dim)
    with torch.no_grad():
        before = unet(latents, 500, encoder_hidden_states=states).sample
        add_image_channels(unet)
        assert reads_image(unet)
        after = unet(with_image(unet, latents, torch.randn_like(latents)), 500, encoder_hidden_states=states).sample
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_the_network_reproduces_the_image_that_it_reads(paired: Path, images: Path) -> None:
    known = [read_image(str(path)) for path in sorted(images.glob("*/images/*.png"))[::3]]  # too few to learn others
    engine = CounterfactualEngine.from_pretrained(str(paired), "cpu")
    model = engine.model
    with torch.inference_mode():
        mean, _ = model.encode(torch.from_numpy(np.stack(known)))
        t = torch.tensor(999)
        z_t = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        empty = engine.embed("").expand(len(known), -1, -1)
        alpha = model.alphas[t]
        output = model.predict(z_t, t, empty, image=mean)
        z_0 = alpha.sqrt() * z_t - (1 - alpha).sqrt() * output
        target = mean * model.scale
        own = (z_0 - target).square().mean()
        other = (z_0 - target.roll(1, 0)).square().mean()
    assert own < 0.5 * other  # the noise alone tells nothing about the image


def test_it_equals_the_pipeline_of_diffusers(paired: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(paired)
    assert isinstance(pipeline, StableDiffusionInstructPix2PixPipeline)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, timestep_spacing="trailing"
    )
    pipeline.set_progress_bar_config(disable=True)
    engine = CounterfactualEngine.from_pretrained(str(paired), "cpu")
    prompt = "normal chest scan"
    ours = engine(IMAGES, [1, 2, 3], [prompt] * 3, SETTINGS)

    def theirs(text: str, image: np.ndarray, seed: int) -> np.ndarray:
        start = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
        result = pipeline(
            image=torch.from_numpy(image)[None, None].expand(1, 3, -1, -1),
            prompt_embeds=engine.embed(text),
            latents=start,
            num_inference_steps=SETTINGS.num_inference_steps,
            guidance_scale=1.0,
            output_type="np",
        )
        return result.images[0].mean(axis=2)

    for image, seed, counterfactual in zip(IMAGES, (1, 2, 3), ours.counterfactuals, strict=True):
        expected = np.clip(image + theirs(prompt, image, seed) - theirs("", image, seed), 0, 1)
        np.testing.assert_allclose(counterfactual, expected, atol=2e-4)
    np.testing.assert_array_equal(ours.reconstructions, np.stack(IMAGES))


def test_the_empty_prompt_changes_nothing(paired: Path) -> None:
    engine = CounterfactualEngine.from_pretrained(str(paired), "cpu")
    result = engine(IMAGES, [1, 2, 3], [""] * 3, SETTINGS)
    np.testing.assert_allclose(result.counterfactuals, np.stack(IMAGES), atol=1e-4)  # rounding of one batch


def test_other_methods_run_without_an_image(paired: Path) -> None:
    engine = CounterfactualEngine.from_pretrained(str(paired), "cpu")
    settings = engine.settings.replace(method="sdedit", scheduler="ddim", strength=0.5)
    assert np.isfinite(engine(IMAGES, [1, 2, 3], settings=settings).counterfactuals).all()


def test_a_model_without_pairs_is_refused(model: Path) -> None:
    engine = CounterfactualEngine(load(str(model)), device="cpu")
    with pytest.raises(UnusableModel, match="pairs"):
        engine(IMAGES, [1, 2, 3], settings=SETTINGS)


def test_data_without_ground_truth_are_refused(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    for path in images.glob("*/images/*.png"):
        copy = tmp_path / "data" / path.relative_to(images)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    with pytest.raises(RecipeError, match="no image of the data has a ground-truth counterfactual"):
        run(with_stages(tiny, DENOISER), tmp_path / "data", tmp_path / "model")


def test_keys_that_would_not_train_the_new_channels_are_refused(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="pairs cannot be combined with trainable: cross-attention"):
        run(with_stages(tiny, {**DENOISER, "trainable": "cross-attention"}), images, tmp_path / "model")


def test_the_ground_truth_of_a_mirror_image_is_mirrored(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    recipe = with_stages(tiny, DENOISER, mirror=True)
    _, members, (stage,) = prepare(recipe, str(images), LocalStore(str(tmp_path)))
    assert isinstance(stage, DenoiserStage)
    assert stage.pairs is not None
    truths, half = stage.pairs.truths.images, len(members.images) // 2
    for index, position in stage.pairs.position.items():
        if index < half:
            twin = stage.pairs.position[index + half]
            assert torch.equal(truths.stack([twin])[0], truths.stack([position])[0].flip(1))
