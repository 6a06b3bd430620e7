from __future__ import annotations

import io
import json
from collections.abc import Callable
from importlib import resources

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from diffva_ray.config.recipe import DataConfig
from diffva_ray.evaluate import drawing, report
from diffva_ray.evaluate.direction import induces
from diffva_ray.evaluate.drawing import changes, diverging, overlay
from diffva_ray.evaluate.figures import (
    QUANTILE,
    ShownRecord,
    figure_grid,
    inducing,
    map_scale,
    spanning,
    write_figures,
)
from diffva_ray.evaluate.marks import marks
from diffva_ray.evaluate.records import as_records, read_records
from diffva_ray.evaluate.report.images import coloured
from diffva_ray.generate.run import Run

MakeRun = Callable[..., Run]
START = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
FIGURES = [f"figures/{name}.{kind}" for name in ("grid", "distributions") for kind in START]


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


@pytest.mark.parametrize(("prompt", "sign"), [("normal chest scan", 1), ("COVID 19", -1)])
@pytest.mark.parametrize("labels", [("COVID", "Lung_Opacity"), ("Normal", "Normal")])
def test_the_sign_of_the_papers_overlay_follows_the_prompt(
    make_run: MakeRun, prompt: str, sign: int, labels: tuple[str, str]
) -> None:
    """The healthy prompt removes findings; the prompt of a finding induces it."""
    run = make_run(prompt=prompt, labels=labels)
    records = read_records(run)
    shown = ShownRecord.read(run, as_records(records)[0], {})
    assert shown is not None
    red = np.ptp(shown.red(0.02), axis=2) > 1e-3  # coloured
    lungs = np.ones_like(red) if shown.truth.lungs is None else shown.truth.lungs
    np.testing.assert_array_equal(red, (sign * shown.images.signed_map > 0.02) & lungs)
    assert 0 < red.sum() < red.size
    assert inducing(run, records) == (prompt == "COVID 19")


def test_two_colours_tell_what_was_taken_away_from_what_was_put_in() -> None:
    image = np.full((1, 4), 0.3, np.float32)
    signed = np.array([[0.2, 0.04, -0.04, -0.2]], np.float32)
    away, same, also, put_in = changes(image, signed, 0.05)[0]
    assert away[0] > 2 * away[2]
    assert put_in[2] > 2 * put_in[0]
    np.testing.assert_array_equal(np.stack([same, also]), np.float32(0.3))
    everywhere = changes(image, signed, 0.05, region=np.zeros((1, 4), bool))
    np.testing.assert_array_equal(everywhere, np.float32(0.3))


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                            [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip


def seen(colour: np.ndarray, deficiency: str) -> np.ndarray:
    """An sRGB colour as somebody with the deficiency sees it, in CIELAB."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    mixed = np.clip(DEFICIENCIES[deficiency] @ linear, 0, 1)
    return rgb2lab(np.where(mixed <= 0.0031308, 12.92 * mixed, 1.055 * mixed ** (1 / 2.4) - 0.055))


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize("grey", [0.15, 0.4, 0.65])  # lung, rib, heart
def test_the_two_colours_differ_for_every_kind_of_colour_vision(deficiency: str, grey: float) -> None:
    """At the threshold, where the overlay is faintest, and at full colour."""
    for size in (0.0501, 1):
        image, signed = np.full((1, 3), grey, np.float32), np.array([[size, 0, -size]], np.float32)
        away, plain, put_in = (seen(colour.astype(float), deficiency) for colour in changes(image, signed, 0.05)[0])
        assert deltaE_ciede2000(away, put_in) > 20
        assert min(deltaE_ciede2000(away, plain), deltaE_ciede2000(put_in, plain)) > 10
    ends = diverging(np.array([[-1, 0, 1]], np.float32), 1)[0].astype(float)
    below, zero, above = (seen(colour, deficiency) for colour in ends)
    assert min(deltaE_ciede2000(below, above), deltaE_ciede2000(below, zero), deltaE_ciede2000(above, zero)) > 20


def test_the_page_has_the_colours_of_the_figures() -> None:
    style = (resources.files(report) / "viewer.css").read_text()
    assert f"linear-gradient(90deg, {drawing.DARKER}, #fff, {drawing.BRIGHTER})" in style
    legend = Image.open(io.BytesIO(coloured(np.array([[-1.0, 1.0]], np.float32), 1))).convert("RGB")
    drawn = [np.array(to_rgb(colour)) * 255 for colour in (drawing.DARKER, drawing.BRIGHTER)]
    np.testing.assert_allclose(np.asarray(legend)[0], drawn, atol=1)


@pytest.mark.parametrize("judged", [True, False])
def test_figures_are_images(make_run: MakeRun, judged: bool) -> None:
    run = make_run(judged=judged)
    assert write_figures(run) == FIGURES
    for path in ("figures/grid.png", "figures/distributions.png"):
        picture = Image.open(io.BytesIO(run.store.read(path)))
        assert picture.format == "PNG"
        assert min(picture.size) > 500
        assert np.asarray(picture.convert("L")).std() > 5
    first = {path: run.store.read(path) for path in FIGURES}
    assert all(data.startswith(START[path.rpartition(".")[2]]) for path, data in first.items())
    write_figures(run)
    assert {path: run.store.read(path) for path in FIGURES} == first  # the same every time


def test_names_that_look_like_formulas_are_drawn_literally(make_run: MakeRun, hostile: str) -> None:
    run = make_run(prompt=hostile, labels=("$\\frac{$", "$x"))
    assert write_figures(run) == FIGURES


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


def test_a_text_known_of_some_records_only_is_none_for_the_others() -> None:
    """pandas has NaN there, which is no text: a spacing known of some images must not stop the page."""
    columns = {"view": ["PA", None], "spacing": [None, "0.14"], "psnr": [30.0, None]}
    first, second = as_records(pa.table(columns).to_pandas())
    assert (first["view"], first["spacing"], first["psnr"]) == ("PA", None, 30.0)
    assert (second["view"], second["spacing"]) == (None, "0.14")
    assert [marks(row["view"], row["spacing"], 2500).sides for row in (first, second)] == [True, False]
