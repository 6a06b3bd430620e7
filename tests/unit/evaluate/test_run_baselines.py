"""Baselines of a run: maps, settings from a validation run, the shuffled map and the paired difference."""

from pathlib import Path

import numpy as np
import pytest

from diffva_ray.config.recipe import load_recipe
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.phantoms import make_phantoms
from diffva_ray.evaluate import baselines as module
from diffva_ray.evaluate.baselines import Baselines, read_normals, tuned, with_own
from diffva_ray.evaluate.scores import LocalizationScores
from diffva_ray.evaluate.tables import localization_rows
from diffva_ray.metrics.baselines import NormalComponents
from diffva_ray.metrics.localization import positive, smooth

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.random((32, 32), np.float32)
NORMALS = NormalComponents.of(RANDOM.random((20, 32, 32), np.float32), 10)


def test_baselines_are_positive_parts_with_their_own_smoothing() -> None:
    maps = Baselines(smoothing=0.05).maps(IMAGE, IMAGE + np.float32(0.1))
    assert set(maps) == {"brightness", "asymmetry", "centre_prior", "autoencoder_difference"}
    np.testing.assert_allclose(maps["asymmetry"], positive(smooth(IMAGE - IMAGE[:, ::-1], 0.05)))
    assert (maps["autoencoder_difference"] == 0).all()  # the reconstruction is brighter everywhere
    own = Baselines(smoothing=0.05, own_smoothing={"brightness": 0.0}).maps(IMAGE, None)
    np.testing.assert_array_equal(own["brightness"], IMAGE)
    assert "autoencoder_difference" not in own


def test_the_prior_multiplies_our_map_and_the_pca_residual() -> None:
    prior = np.zeros((16, 16), np.float32)  # of another size: resized to the image's
    prior[:8] = 0.5
    fitted = Baselines(smoothing=0.0, normals=NORMALS, prior=prior)
    maps = fitted.maps(IMAGE, None)
    np.testing.assert_allclose(maps["pca_residual x prior"], maps["pca_residual"] * maps["learned_prior"])
    assert maps["pca_residual x prior"][24:].max() == 0 < maps["pca_residual"][24:].max()
    (ours,) = fitted.beside(np.ones((32, 32), np.float32), "a.png").values()
    np.testing.assert_array_equal(ours, maps["learned_prior"])
    assert Baselines(smoothing=0.0).beside(IMAGE, "a.png") == {}


def test_the_shuffled_map_is_that_of_a_validation_image_chosen_by_the_path() -> None:
    others = np.stack([np.full((16, 16), n / 10, np.float32) for n in range(5)])
    fitted = Baselines(smoothing=0.0, others=others)
    levels = [fitted.beside(IMAGE, f"{n}.png")["shuffled"] for n in range(40)]
    assert {float(level.max()) for level in levels} == {float(other.max()) for other in others}
    assert levels[0].shape == IMAGE.shape
    np.testing.assert_array_equal(levels[3], fitted.beside(IMAGE * 0, "3.png")["shuffled"])


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation images whose lesion is a bright pixel block in noise: some smoothing finds it better than none."""
    found = []
    for n in range(12):
        lesion = np.zeros((32, 32), bool)
        row = 4 + n
        lesion[row : row + 8, 10:18] = True
        noise = np.random.default_rng(n).normal(0, 0.15, (32, 32))
        image = np.clip(0.4 + 0.15 * lesion + noise, 0, 1).astype(np.float32)
        images = module.RecordImages(image, image, image, (lesion * 0.3).astype(np.float32))
        found.append(module._Example(images, lesion, None))
    monkeypatch.setattr(module, "_examples", lambda run, lesions: found)


@pytest.mark.usefixtures("examples")
def test_validation_images_choose_smoothing_threshold_and_prior() -> None:
    chosen = tuned(Baselines(smoothing=0.0), None, {})  # type: ignore[arg-type]
    assert chosen.own_smoothing["brightness"] == 0.05  # the strongest that is tried: the noise is that of single pixels
    assert chosen.prior is not None
    assert chosen.prior.max() == 8 / 12  # rows 11 to 14 are in eight of the lesions
    assert set(chosen.thresholds) == {
        "brightness", "asymmetry", "centre_prior", "autoencoder_difference", "learned_prior", "positive x prior",
    }  # fmt: skip
    # of a validation run's own thresholds, those of the baselines belong to other settings
    stored = {"positive": 0.1, "positive under strength 0.3": 0.2, "brightness": 0.9}
    assert with_own(stored, chosen) == {
        "positive": 0.1, "shuffled": 0.1, "positive under strength 0.3": 0.2, "shuffled under strength 0.3": 0.2,
        **chosen.thresholds,
    }  # fmt: skip
    assert with_own(stored, None) == {**stored, "shuffled": 0.1, "shuffled under strength 0.3": 0.2}


def test_the_difference_to_the_best_baseline_is_paired_by_image() -> None:
    """Equal means of our map and the baseline, image by image different or the same."""
    base = {"label": "COVID", "region": "image", "lesion_in_region": 1.0, "dice_curve": np.zeros(400, np.float32),
            "auprc": 0.5, "dice_best": 0.5, "iou_best": 0.5, "pointing_game": 0.5, "energy_in_truth": 0.5}  # fmt: skip
    rows = []
    for n in range(20):
        names = {"record_id": f"{n:02}", "image_path": f"{n}.png", "group": f"{n}"}
        scores = {"positive": 0.7 + 0.01 * n, "brightness": 0.6 + 0.01 * n, "asymmetry": 0.65, "shuffled": 0.99}
        rows += [{**base, **names, "map": name, "auroc": auroc} for name, auroc in scores.items()]
    table = {row["map"]: row for row in localization_rows(LocalizationScores.of(rows), None, None)}
    ours = table["positive"]
    assert ours["baseline"] == "brightness"  # 0.695 against 0.65; a shuffled map is a control, not a baseline
    assert ours["minus_baseline"] == pytest.approx(0.1)
    assert ours["minus_baseline_interval"] == pytest.approx([0.1, 0.1], abs=1e-6)  # the same for every image
    assert "baseline" not in table["brightness"]


def test_a_damaged_normal_image_is_left_out(tmp_path: Path) -> None:
    make_phantoms(str(tmp_path), 12, 32, 0)
    next((tmp_path / "Normal" / "images").glob("*.png")).write_bytes(b"no image")
    dataset = open_dataset(str(tmp_path), load_recipe("phantom", ()).data, ["Normal"])
    fitted = read_normals(dataset, 32)
    assert fitted is not None
    assert len(fitted.axes) == len(dataset.images) - 1
