from __future__ import annotations

import io
import json
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from diffva_ray.config.recipe import DataConfig
from diffva_ray.evaluate import drawing
from diffva_ray.evaluate.direction import induces
from diffva_ray.evaluate.drawing import diverging, overlay
from diffva_ray.evaluate.figures import (
    QUANTILE,
    distributions,
    figure_grid,
    inducing,
    map_scale,
    spanning,
    write_figures,
)
from diffva_ray.evaluate.records import read_records
from diffva_ray.generate.run import Run

MakeRun = Callable[..., Run]


def test_red_is_exactly_where_the_map_exceeds_the_threshold() -> None:
    random = np.random.default_rng(1)
    image = random.uniform(size=(32, 32)).astype(np.float32)
    signed = random.normal(0, 0.1, (32, 32)).astype(np.float32)
    signed[0, 0] = np.float32(0.05)  # equal is not above
    painted = overlay(image, signed, float(np.float32(0.05)))
    assert painted.shape == (32, 32, 3)
    assert painted.dtype == np.float32
    red = painted[..., 0] > painted[..., 1] + 1e-6
    np.testing.assert_array_equal(red, signed > np.float32(0.05))
    np.testing.assert_array_equal(painted[~red], np.repeat(image[..., None], 3, axis=2)[~red])


def test_red_stays_inside_the_region_and_grows_with_the_map() -> None:
    image = np.full((4, 4), 0.5, np.float32)
    signed = np.tile(np.array([0.1, 0.2, 0.3, 0.4], np.float32), (4, 1))
    region = np.zeros((4, 4), bool)
    region[1] = True
    painted = overlay(image, signed, 0.05, region)
    assert (painted[~region] == 0.5).all()
    assert (np.diff(painted[1, :, 1]) <= 0).all()
    assert painted[1, 0, 1] > painted[1, 3, 1]


def test_diverging_is_white_at_zero_red_above_and_blue_below() -> None:
    blue, white, red, beyond = diverging(np.array([[-0.2, 0.0, 0.2, 9.0]], np.float32), 0.2)[0]
    assert white.min() > 0.95
    assert red[0] > 2 * red[2]
    assert blue[2] > 2 * blue[0]
    np.testing.assert_array_equal(beyond, red)


def test_a_prompt_that_names_a_finding_induces_it() -> None:
    data = DataConfig()
    assert induces("covid 19", data)
    assert induces("Lung  Opacity in the right lung", data)
    assert not induces("normal chest scan", data)
    assert not induces("", data)
    assert not induces("no COVID 19", DataConfig(healthy_prompt="no COVID 19"))
    assert induces("Cardiomegaly", data, "Cardiomegaly")  # a class that the recipe has no prompt for
    assert [induces("Cardiomegaly", data, label) for label in ("Normal", "COVID", None)] == [True, False, False]
    assert not induces("a normal chest scan, frontal", data, "Normal")


@pytest.mark.parametrize(("prompt", "red"), [("normal chest scan", "M > τ"), ("COVID 19", "−M (inducing) > τ")])
@pytest.mark.parametrize("labels", [("COVID", "Lung_Opacity"), ("Normal", "Normal")])
def test_the_sign_of_the_overlay_follows_the_prompt(
    make_run: MakeRun, prompt: str, red: str, labels: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The healthy prompt removes findings; the prompt of a finding induces it."""
    captions: list[str] = []
    fill = drawing.textwrap.wrap

    def wrap(text: str, width: int, **more: object) -> list[str]:
        captions.append(text)
        return fill(text, width, **more)

    monkeypatch.setattr(drawing.textwrap, "wrap", wrap)
    run = make_run(prompt=prompt, labels=labels)
    figure_grid(run)
    assert f"Red: {red}" in captions[0]
    assert inducing(run, read_records(run)) == (prompt == "COVID 19")


@pytest.mark.parametrize("judged", [True, False])
def test_figures_are_images(make_run: MakeRun, judged: bool) -> None:
    run = make_run(judged=judged)
    assert write_figures(run) == ["figures/grid.png", "figures/distributions.png"]
    for path in ("figures/grid.png", "figures/distributions.png"):
        picture = Image.open(io.BytesIO(run.store.read(path)))
        assert picture.format == "PNG"
        assert min(picture.size) > 500
        assert np.asarray(picture.convert("L")).std() > 5
    assert distributions(run) == run.store.read("figures/distributions.png")  # the same every time


def test_names_that_look_like_formulas_are_drawn_literally(make_run: MakeRun, hostile: str) -> None:
    run = make_run(prompt=hostile, labels=("$\\frac{$", "$x"))
    assert write_figures(run) == ["figures/grid.png", "figures/distributions.png"]


def test_a_run_without_a_finished_image_has_no_figures(make_run: MakeRun) -> None:
    run = make_run(shards=0)
    assert write_figures(run) == []
    with pytest.raises(ValueError, match="no finished image"):
        figure_grid(run)


def test_the_grid_spans_each_class_from_best_to_worst(make_run: MakeRun) -> None:
    run = make_run()
    records = read_records(run)
    records["judge_image"] = 0.1
    chosen = spanning(run, records)
    assert [rank for rank, _ in chosen] == ["best", "median", "lowest"] * 2
    for label in ("COVID", "Lung_Opacity"):
        scores = records.loc[records["label"] == label, "judge_counterfactual"]
        found = [row["judge_counterfactual"] for _, row in chosen if row["label"] == label]
        assert found[0] == scores.max()
        assert found[2] == scores.min()


def test_the_threshold_is_the_validated_one_then_the_runs_own_then_a_quantile(make_run: MakeRun) -> None:
    run = make_run()
    records = read_records(run)
    scale = map_scale(run, records)
    assert f"{QUANTILE:.0%} quantile" in scale.threshold_from
    run.store.put("tables/thresholds.json", b'{"positive": 0.04}')
    assert map_scale(run, records).threshold == 0.04
    row = {"map": "positive", "label": "all", "threshold": 0.05, "threshold_from": "validation"}
    run.store.put(
        "tables/metrics.json",
        json.dumps({"records": dict.fromkeys(("planned", "ok", "quarantined"), 0), "localization": [row]}).encode(),
    )
    scale = map_scale(run, records)
    assert (scale.threshold, scale.threshold_from) == (0.05, "fixed on validation")
