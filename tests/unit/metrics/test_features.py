"""Extractors: the stand-in is fixed and distinguishes sets; Inception equals pytorch-fid's and loads its file only."""

import urllib.error

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from diffva_ray.metrics import features
from diffva_ray.metrics.fid import frechet_distance_features


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """On a busy machine several threads, which wait for each other, take ten times as long as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(n: int, side: int, seed: int = 0, gain: float = 1.0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((n, side, side))
    return np.clip(0.5 + gain * gaussian_filter(noise, (0, side / 32, side / 32)), 0, 1).astype(np.float32)


def test_the_stand_in_is_named_and_shaped_as_documented():
    extractor = features.stand_in()
    assert extractor.is_stand_in
    assert extractor.name == "stand-in-random-conv-64"
    assert extractor.dimension == 64
    assert extractor.weights_sha256 == features.stand_in().weights_sha256
    assert extractor(images(3, 64)).shape == (3, 64)
    assert extractor(images(3, 64)).dtype == np.float32
    assert extractor(images(0, 64)).shape == (0, 64)


GOLDEN = [2.56673, 0.66100, 2.75332, 2.95426, 0.82556, 0.51584]


def test_the_stand_in_is_the_same_on_every_machine():
    """Fixed values; if they change, old and new tables are no longer comparable."""
    ramp = np.outer(np.linspace(0, 1, 64), np.linspace(1, 0, 64)).astype(np.float32)[None]
    assert features.stand_in()(ramp)[0, [0, 9, 21, 37, 52, 63]] == pytest.approx(GOLDEN, rel=1e-3, abs=1e-4)


def test_the_stand_in_ignores_batches_and_touches_no_global_seed():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    extractor = features.stand_in()
    x = images(70, 48)  # more than one micro-batch
    together, alone = extractor(x), np.concatenate([extractor(image[None]) for image in x])
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_stand_in_distinguishes_sets():
    extractor = features.stand_in()
    same = frechet_distance_features(extractor(images(300, 64, 0)), extractor(images(300, 64, 1)))
    other = frechet_distance_features(extractor(images(300, 64, 0)), extractor(images(300, 64, 1, gain=1.3)))
    assert other > 5 * same > 0


def test_images_must_be_floats_in_a_stack():
    with pytest.raises(ValueError, match="takes float images"):
        features.stand_in()(np.zeros((2, 64, 64), np.uint8))
    with pytest.raises(ValueError, match="takes float images"):
        features.stand_in()(np.zeros((64, 64), np.float32))


@pytest.fixture
def original(inception_state, monkeypatch):
    """pytorch-fid's own network with the same weights in place of its download."""
    from pytorch_fid import inception

    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: inception_state)
    return inception.InceptionV3([3]).eval()


def test_inception_equals_pytorch_fid(inception_weights, original):
    extractor = features.inception(inception_weights, resize="legacy")
    assert (extractor.name, extractor.dimension, extractor.is_stand_in) == ("inception-pool3", 2048, False)
    assert len(extractor.weights_sha256) == 64
    before = torch.random.get_rng_state()
    features.inception(inception_weights)
    assert torch.equal(torch.random.get_rng_state(), before)
    for side in (299, 128):
        x = images(2, side)
        with torch.inference_mode():
            expected = original(torch.from_numpy(x)[:, None].expand(-1, 3, -1, -1))[0].flatten(1).numpy()
        assert 0.01 < expected.std() < 100
        np.testing.assert_allclose(extractor(x), expected, rtol=1e-4, atol=1e-5 * expected.std())


def test_clean_resizing_treats_both_sets_alike(inception_weights):
    """At 299 both paths are equal. Otherwise clean goes through the counterfactuals' grid, so a larger image gets
    (nearly) the features of its copy on that grid."""
    legacy, clean = features.inception(inception_weights, "legacy"), features.inception(inception_weights, "clean")
    x = images(1, 299)
    np.testing.assert_allclose(clean(x), legacy(x), rtol=1e-5)

    on_grid = features.inception(inception_weights, "clean", grid=64)
    large = images(1, 256)
    small = torch.nn.functional.interpolate(
        torch.from_numpy(large)[:, None], size=(64, 64), mode="bicubic", antialias=True
    )
    copy = small[:, 0].clamp(0, 1).numpy()
    np.testing.assert_allclose(on_grid(large), on_grid(copy), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(on_grid(copy), clean(copy), rtol=1e-5)
    with pytest.raises(ValueError, match="clean or legacy"):
        features.inception(inception_weights, "bilinear")


@pytest.mark.parametrize("content", ["missing", "text", "other network", "tensor"])
def test_a_wrong_file_is_named_in_one_line(content, tmp_path):
    path = tmp_path / "weights.pth"
    if content == "text":
        path.write_text("<html>404</html>")
    elif content == "other network":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    elif content == "tensor":
        torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="expected pytorch-fid's Inception state dict") as raised:
        features.inception(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_cache_is_that_of_torch_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert features.inception_cache() is None
    path = tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    path.parent.mkdir()
    path.touch()
    assert features.inception_cache() == path


def test_without_network_the_error_is_one_line_with_the_url(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(RuntimeError, match="fetch https://") as raised:
        features.download_inception()
    assert "\n" not in str(raised.value)
