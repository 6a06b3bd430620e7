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
from diffva_ray.evaluate.tables import best_thresholds, localization_rows
from diffva_ray.metrics.baselines import NormalComponents
from diffva_ray.metrics.localization import THRESHOLDS, positive, score, smooth

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
        found.append(module._Example(images, "COVID", lesion, None))
    monkeypatch.setattr(module, "_examples", lambda run, lesions: found)


@pytest.mark.usefixtures("examples")
def test_validation_images_choose_smoothing_threshold_and_prior() -> None:
    chosen = tuned(Baselines(smoothing=0.0), None, {})  # type: ignore[arg-type]
    assert chosen.own_smoothing["brightness"] == 0.05  # the strongest that is tried: the noise is that of single pixels
    assert chosen.prior is not None
    assert chosen.prior.max() == 8 / 12  # rows 11 to 14 are in eight of the lesions
    names = {
        "brightness", "asymmetry", "centre_prior", "autoencoder_difference", "learned_prior", "positive x prior",
    }  # fmt: skip
    assert set(chosen.thresholds) == names | {f"{name} for COVID" for name in names}
    # of a validation run's own thresholds, those of the baselines belong to other settings
    stored = {"positive": 0.1, "positive under strength 0.3": 0.2, "brightness": 0.9, "brightness for COVID": 0.9}
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
    notes: list[str] = []
    fitted = read_normals(dataset, 32, notes)
    assert fitted is not None
    assert len(fitted.axes) == len(dataset.images) - 1
    assert notes == ["1 of 3 normal images for the PCA baseline cannot be read"]


def test_miou_has_a_threshold_of_each_class_and_weighs_classes_alike() -> None:
    """Against masks: thresholds chosen on one set, applied to another, as CheXlocalize does (Saporta et al. 2022)."""
    random = np.random.default_rng(0)
    strengths = {"COVID": 0.02, "Lung_Opacity": 0.4, "Viral Pneumonia": 0.1}  # a pooled threshold misses two of them

    def images(n: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
        found = []
        for label, strength in strengths.items():
            for _ in range(n if label != "COVID" else 3 * n):
                truth = np.zeros((24, 24), bool)
                x, y = random.integers(0, 14, 2)
                truth[y : y + 8, x : x + 8] = True
                found.append((label, truth, (truth + random.uniform(0, 0.9, truth.shape)) * strength))
        return found

    def scores(of: list[tuple[str, np.ndarray, np.ndarray]]) -> LocalizationScores:
        rows = []
        for number, (label, truth, saliency) in enumerate(of):
            names = {"label": label, "map": "positive", "region": "image", "lesion_in_region": 1.0,
                     "image_path": str(number), "group": number, "record_id": str(number)}  # fmt: skip
            rows.append({**names, **vars(score(saliency, truth))})
        return LocalizationScores.of(rows)

    validation, test = images(8), images(6)
    thresholds = best_thresholds(scores(validation))
    rows = {row["label"]: row for row in localization_rows(scores(test), thresholds, "validation")}
    for label in strengths:

        def mean_iou(of: list, threshold: float, label: str = label) -> float:
            pairs = [(truth, saliency >= threshold) for one, truth, saliency in of if one == label]
            return float(np.mean([(truth & found).sum() / (truth | found).sum() for truth, found in pairs]))

        chosen = thresholds[f"positive for {label}"]
        assert mean_iou(validation, chosen) == pytest.approx(max(mean_iou(validation, t) for t in THRESHOLDS))
        assert rows[label]["iou_fixed"] == pytest.approx(mean_iou(test, chosen), abs=1e-6)
    assert rows["all"]["iou_fixed"] == pytest.approx(np.mean([rows[label]["iou_fixed"] for label in strengths]))
    assert rows["all"]["iou_fixed"] > rows["all"]["dice_fixed"] / (2 - rows["all"]["dice_fixed"])  # one for all
    low, high = rows["all"]["pointing_game_interval"]
    assert low <= rows["all"]["pointing_game"] <= high
