"""pytorch-fid and we, at its own 2048 dimensions: PNG files to the number, and features below and above N = d.

make slow
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from diffva_ray.data.encoding import encode_grey, quantise
from diffva_ray.data.phantoms import phantom
from diffva_ray.evaluate.distances import embed
from diffva_ray.metrics import features
from diffva_ray.metrics.fid import Moments, frechet_distance, frechet_distance_features


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_png_files_to_the_same_number(
    tmp_path: Path, inception_state: dict, inception_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    inception = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: inception_state)
    files: dict[str, list[Path]] = {"Normal": [], "COVID": []}
    for label, found in files.items():
        (tmp_path / label).mkdir()
        for patient in range(24):
            found.append(tmp_path / label / f"{patient:02d}.png")
            found[-1].write_bytes(encode_grey(quantise(phantom(label, patient, 6, 299).image)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = [str(tmp_path / label) for label in files]
        expected = fid_score.calculate_fid_given_paths(folders, 8, "cpu", 2048, num_workers=0)
    extractor = features.inception(inception_weights, "legacy")
    sets = [embed(extractor, [file.read_bytes for file in found], 299) for found in files.values()]
    assert expected > 0.01
    # sqrtm of a singular product (24 images, 2048 dimensions) is off by some 1e-6 of the traces; ours is exact there
    traces = sum(float(np.var(part.astype(float), axis=0, ddof=1).sum()) for part in sets)
    assert frechet_distance_features(*sets) == pytest.approx(expected, rel=1e-4, abs=5e-6 * traces)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("n1", "n2"), [(2500, 2200), (300, 2500), (300, 200)])
def test_from_features_below_and_above_the_dimension(n1: int, n2: int) -> None:
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    random = np.random.default_rng(0)
    scale = np.arange(1, 2049) ** -0.5
    x = (random.standard_normal((n1, 2048)) * scale).astype(np.float32)
    y = (random.standard_normal((n2, 2048)) * scale + 0.02).astype(np.float32)
    statistics = [part for z in (x.astype(float), y.astype(float)) for part in (z.mean(0), np.cov(z, rowvar=False))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = float(fid_score.calculate_frechet_distance(*statistics))
    assert frechet_distance_features(x, y) == pytest.approx(expected, rel=1e-4)
    shards = [Moments.of(part) for part in np.array_split(x, 7)]
    whole = shards[0]
    for shard in shards[1:]:
        whole = whole.merge(shard)
    assert frechet_distance(whole, Moments.of(y)) == pytest.approx(
        frechet_distance(Moments.of(x), Moments.of(y)), rel=1e-9
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("n", [24, 300])
def test_below_the_dimension_the_difference_is_sqrtm_s(n: int) -> None:
    """Singular covariances with a known distance, sum (a - b)^2 (the same axes; see tests/unit/metrics/test_fid.py):
    ours is exact, pytorch-fid's is off by a share of the traces, which is more of a small distance."""
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    random = np.random.default_rng(0)
    axes = np.linalg.qr(random.standard_normal((2048, n - 1)))[0]
    centred = np.linalg.qr(np.column_stack([np.ones(n), random.standard_normal((n, n - 1))]))[0][:, 1:]
    a, b = np.arange(1, n) ** -0.5, np.arange(1, n) ** -0.5 * random.uniform(0.9, 1.1, n - 1)
    x, y = (np.sqrt(n - 1) * centred * spread @ axes.T for spread in (a, b))
    truth, traces = float(np.sum((a - b) ** 2)), float(np.sum(a * a + b * b))
    assert frechet_distance_features(x, y) == pytest.approx(truth, abs=1e-12 * traces)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(truth, abs=1e-12 * traces)
    statistics = [part for z in (x, y) for part in (z.mean(0), np.cov(z, rowvar=False))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = float(fid_score.calculate_frechet_distance(*statistics))
    assert theirs == pytest.approx(truth, abs=5e-6 * traces)
