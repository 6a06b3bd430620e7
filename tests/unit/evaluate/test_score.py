"""``diffva score``: matching of maps and images, values of map files, and the same numbers as a run's tables."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from diffva_ray.cli import main
from diffva_ray.data.dataset import LabelledImage, UnusableData
from diffva_ray.data.encoding import encode_map
from diffva_ray.data.images import BadImage, decode_map
from diffva_ray.evaluate.baselines import fit_baselines, normal_images
from diffva_ray.evaluate.external_maps import MapFile, match, read_map_values, stem
from diffva_ray.evaluate.external_scores import ScoreOptions, score_maps
from diffva_ray.evaluate.records import read_records
from diffva_ray.evaluate.scores import score_records
from diffva_ray.generate.run import Run
from diffva_ray.metrics.baselines import brightness
from diffva_ray.metrics.localization import on_grid, score

MakeRun = Callable[..., Run]


def diffva(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def image_files(images: Path) -> list[Path]:
    return sorted(images.glob("*/images/*.png"))


def grey(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), np.float32) / 255


@pytest.fixture
def maps(images: Path, tmp_path: Path) -> Path:
    """The images as float maps with the same names, in one flat folder."""
    folder = tmp_path / "maps"
    folder.mkdir()
    for path in image_files(images):
        np.save(folder / f"{path.stem}.npy", grey(path))
    return folder


def named(*keys: str) -> list[MapFile]:
    return [MapFile(f"{key}.png", key) for key in keys]


IMAGES = [
    LabelledImage("COVID/images/1.png", "COVID"),
    LabelledImage("COVID/images/2.png", "COVID"),
    LabelledImage("Normal/images/1.jpg", "Normal"),
]


@pytest.mark.parametrize(
    ("keys", "found", "by"),
    [
        (["COVID/images/1", "2"], {"COVID/images/1": "COVID/images/1.png", "2": "COVID/images/2.png"}, "path"),
        (["ig/COVID/images/1"], {"ig/COVID/images/1": "COVID/images/1.png"}, "path"),
        (["out/2"], {"out/2": "COVID/images/2.png"}, "name"),
        (
            ["images/2", "elsewhere/1"],
            {"images/2": "COVID/images/2.png"},
            "path",
        ),  # not the map of image 1
    ],
)
def test_maps_find_their_images(keys: list[str], found: dict[str, str], by: str) -> None:
    matched = match(named(*keys), IMAGES, "maps")
    assert {file.key: image.path for file, image in matched.pairs} == found
    assert matched.by == by
    assert len(matched.maps_without_image) == len(keys) - len(found)
    assert len(matched.images_without_map) == len(IMAGES) - len(found)


@pytest.mark.parametrize(
    ("keys", "both"),
    [
        (["1"], ("COVID/images/1.png", "Normal/images/1.jpg")),
        (["out/1"], ("COVID/images/1.png", "Normal/images/1.jpg")),
        (["a/COVID/images/2", "b/COVID/images/2"], ("a/COVID/images/2.png", "b/COVID/images/2.png")),
    ],
)
def test_ambiguous_maps_are_refused_and_both_are_named(keys: list[str], both: tuple[str, str]) -> None:
    with pytest.raises(UnusableData) as caught:
        match(named(*keys), IMAGES, "maps")
    assert all(name in str(caught.value) for name in both)
    assert "\n" not in str(caught.value)


def test_an_image_with_two_labels_is_one_image() -> None:
    images = [LabelledImage("p/view1.jpg", "Edema"), LabelledImage("p/view1.jpg", "Effusion")]
    matched = match(named("p/view1"), images, "maps")
    assert [image.label for _, image in matched.pairs] == ["Edema", "Effusion"]


def test_only_known_extensions_are_removed() -> None:
    assert [stem(path) for path in ("a/b.c.png", "a/b.TIFF", "a.b/c", "x.npy")] == ["a/b.c", "a/b", "a.b/c", "x"]


def encoded(array: np.ndarray, kind: str) -> bytes:
    sink = io.BytesIO()
    if kind == "NPY":
        np.save(sink, array)
    else:
        Image.fromarray(array).save(sink, kind)
    return sink.getvalue()


def test_values_are_the_stored_values() -> None:
    signed = np.linspace(-3, 5, 12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(read_map_values(encoded(signed, "NPY"), "m.npy"), signed)
    np.testing.assert_array_equal(read_map_values(encoded(signed.astype(np.float64)[None], "NPY"), "m.npy"), signed)
    np.testing.assert_array_equal(read_map_values(encoded(signed, "TIFF"), "m.tif"), signed)
    steps = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    np.testing.assert_allclose(read_map_values(encoded(steps, "PNG"), "m.png"), steps / 255, atol=1e-7)
    np.testing.assert_allclose(read_map_values(encoded(steps, "NPY"), "m.npy"), steps / 255, atol=1e-7)
    colourless = np.repeat(steps[..., None], 3, axis=2)
    np.testing.assert_allclose(read_map_values(encoded(colourless, "PNG"), "m.png"), steps / 255, atol=1e-7)


def test_sixteen_bit_maps_are_read_as_requested() -> None:
    signed = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    stored = encode_map(signed)
    np.testing.assert_array_equal(read_map_values(stored, "m.png", signed16=True), decode_map(stored))
    unsigned = read_map_values(stored, "m.png")
    assert unsigned.min() < 1e-4
    assert unsigned.max() == 1


@pytest.mark.parametrize(
    ("data", "path", "reason"),
    [
        (encoded(np.arange(48, dtype=np.uint8).reshape(4, 4, 3), "PNG"), "m.png", "coloured"),
        (encoded(np.zeros((2, 4, 4)), "NPY"), "m.npy", r"\[2, 4, 4\]"),
        (encoded(np.full((4, 4), np.nan), "NPY"), "m.npy", "not finite"),
        (encoded(np.full((4, 4), 1e300), "NPY"), "m.npy", "not finite"),
        (encoded(np.array(["a"]), "NPY"), "m.npy", "numbers"),
        (encoded(np.zeros((4, 4), np.uint8), "PNG")[:-20], "m.png", "truncated"),
        (b"torn", "m.npy", "NPY"),
        (b"", "m.png", "empty"),
    ],
)
def test_files_that_are_not_maps_have_a_reason(data: bytes, path: str, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        read_map_values(data, path)


def test_the_grid_keeps_sign_and_zero() -> None:
    values = np.zeros((64, 32), np.float32)
    values[:16] = -2
    small = on_grid(values, 16)
    assert small.shape == (16, 16)
    assert (small[:3] == -2).all()
    assert (small[6:] == 0).all()
    assert on_grid(small, 16) is small


def test_the_same_numbers_as_reduce_image_by_image(make_run: MakeRun) -> None:
    run = make_run()
    rows = read_records(run).to_dict("records")
    healthy = normal_images(run.about["data"], run.recipe.data, [])
    fitted = fit_baselines(healthy, run.recipe.model.resolution, run.recipe.generate.smoothing, None, [])
    theirs, _ = score_records(run, rows, {}, fitted)
    expected = {(row["image_path"], row["map"]): row for row in theirs}
    for address in (run.store.uri, f"{run.store.uri}/attributions"):
        scored = score_maps(address, run.about["data"])
        assert len(scored.images) == len(expected) == 12 * 6
        for row in scored.images:
            other = expected[row["image_path"], row["map"]]
            for key in ("auroc", "auprc", "dice_best", "pointing_game", "region"):
                assert row[key] == other[key]
            np.testing.assert_array_equal(row["dice_curve"], other["dice_curve"])
        assert scored.metrics["matched_by"] == "record"
        assert any("is a run" in note for note in scored.metrics["notes"])


def test_a_run_on_other_images_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    run = make_run()
    for part in (tmp_path / "run" / "records").iterdir():
        table = pq.read_table(part)
        column = table.schema.get_field_index("image_sha256")
        pq.write_table(table.set_column(column, "image_sha256", [["0" * 64] * len(table)]), part)
    with pytest.raises(UnusableData, match="other images"):
        score_maps(run.store.uri, run.about["data"])
    with pytest.raises(UnusableData, match="--smoothing"):
        score_maps(run.store.uri, run.about["data"], ScoreOptions(smoothing=0.1))


def test_an_image_as_its_own_map_is_the_brightness_baseline(maps: Path, images: Path) -> None:
    result = diffva("score", maps, "--data", images, "--json")
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)
    rows = {(row["map"], row["label"]): row for row in metrics["localization"]}
    assert {name for name, _ in rows} == {
        "positive",
        "brightness",
        "asymmetry",
        "centre_prior",
        "pca_residual",  # the data set has a healthy class
    }  # no negative value: no |M|
    assert rows["positive", "all"]["auroc"] == rows["brightness", "all"]["auroc"]
    assert rows["positive", "all"]["n"] == 18
    assert metrics["grid"] == 32
    assert metrics["maps"] == {"found": 24, "scored": 18, "without_image": 0, "unreadable": 0}
    said = " ".join(metrics["notes"])
    assert "autoencoder difference is a baseline for runs only" in said
    assert "6 matched images have no known lesion" in said


def test_numbers_are_those_of_the_metric(maps: Path, images: Path) -> None:
    image = next((images / "COVID" / "images").iterdir())
    lesion, lungs = (grey(image.parents[1] / kind / image.name) > 0.5 for kind in ("lesions", "masks"))
    expected = score(brightness(grey(image)), lesion, lungs)
    assert expected is not None
    rows = score_maps(str(maps), str(images)).images
    row = next(row for row in rows if row["map"] == "positive" and row["image_path"].endswith(image.name))
    assert row["auroc"] == expected.auroc
    assert row["region"] == "lungs"


def test_signs_are_stated_and_can_be_chosen(maps: Path, images: Path) -> None:
    for path in maps.iterdir():
        np.save(path, np.load(path) - 0.5)
    both = score_maps(str(maps), str(images))
    assert {"positive", "absolute"} <= {row["map"] for row in both.images}
    assert any("some values are negative" in note for note in both.metrics["notes"])
    alone = score_maps(str(maps), str(images), ScoreOptions(signed=False))
    assert "absolute" not in {row["map"] for row in alone.images}
    for path in maps.iterdir():
        np.save(path, -np.abs(np.load(path)))
    assert any("is their sign inverted" in note for note in score_maps(str(maps), str(images)).metrics["notes"])


def test_everything_that_is_left_out_is_noted(maps: Path, images: Path) -> None:
    ill = sorted(maps.glob("COVID*"))
    ill[0].write_bytes(b"torn")
    ill[1].unlink()
    np.save(maps / "stranger.npy", np.zeros((32, 32)))
    np.save(ill[2], np.zeros((7, 7)))
    (maps / "readme.txt").write_text("how these were made")
    metrics = score_maps(str(maps), str(images)).metrics
    assert metrics["maps"] == {"found": 24, "scored": 16, "without_image": 1, "unreadable": 1}
    assert metrics["images"]["with_lesion_truth_without_map"] == 1
    said = " | ".join(metrics["notes"])
    for part in (
        "1 maps fit no image",
        "stranger.npy",
        "1 maps cannot be read",
        ill[0].name,
        "1 images have no map",
        "1 maps had another size",
        "1 files of the folder are not maps",
        "1 maps have no positive value",
    ):
        assert part in said, part


def test_the_encoding_of_sixteen_bit_maps_is_noted(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "maps"
    folder.mkdir()
    for path in image_files(images):
        (folder / path.name).write_bytes(encode_map(np.where(grey(path) > 0.8, 0.1, 0)))
    guessed = score_maps(str(folder), str(images))
    assert any("read as unsigned" in note and "mostly mid-grey" in note for note in guessed.metrics["notes"])
    told = score_maps(str(folder), str(images), ScoreOptions(encoding="signed16"))
    assert any("level 32768 is zero" in note for note in told.metrics["notes"])


def test_small_and_oblong_maps_are_resized_to_the_default_grid(images: Path, tmp_path: Path) -> None:
    for name, shape in (("cam", (7, 7)), ("oblong", (40, 64))):
        for path in image_files(images):
            (tmp_path / name).mkdir(exist_ok=True)
            np.save(tmp_path / name / f"{path.stem}.npy", on_grid(grey(path), 64)[: shape[0], : shape[1]])
        assert score_maps(str(tmp_path / name), str(images), ScoreOptions(size=None)).metrics["grid"] == 256
        assert score_maps(str(tmp_path / name), str(images), ScoreOptions(size=48)).metrics["grid"] == 48


def test_smoothing_applies_to_maps_and_baselines(maps: Path, images: Path) -> None:
    rows = score_maps(str(maps), str(images), ScoreOptions(smoothing=0.05)).metrics["localization"]
    found = {row["map"]: row["auroc"] for row in rows if row["label"] == "all"}
    plain = score_maps(str(maps), str(images)).metrics["localization"]
    assert found["positive"] == found["brightness"]
    assert found["positive"] != next(row["auroc"] for row in plain if row["label"] == "all")


def test_tables_are_written_and_their_thresholds_can_be_used(maps: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    result = diffva("score", maps, "--data", images, "--out", out)
    assert result.exit_code == 0, result.output
    assert "Localisation of the lesion (region: lungs; grid 32 px; not smoothed)" in result.output
    for name in ("scores.csv", "scores.md", "scores.tex", "scores.json", "images.csv", "metrics.json"):
        assert (out / "tables" / name).stat().st_size > 50
    for source in (out, out / "tables" / "thresholds.json"):
        again = json.loads(diffva("score", maps, "--data", images, "--threshold-from", source, "--json").stdout)
        assert all(0 < row["dice_fixed"] <= row["dice_best"] + 1e-6 for row in again["localization"])
        assert again["localization"][0]["threshold_from"] == source.name


def test_boxes_replace_masks(images: Path, maps: Path, tmp_path: Path) -> None:
    bare = tmp_path / "images"
    shutil.copytree(images, bare, ignore=shutil.ignore_patterns("lesions", "masks"))
    image = next((bare / "COVID" / "images").iterdir())
    (tmp_path / "boxes.csv").write_text(f"file,x,y,w,h\n{image.name},4,4,10,10\n")
    scored = score_maps(str(maps), str(bare), ScoreOptions(boxes=str(tmp_path / "boxes.csv")))
    assert {row["region"] for row in scored.images} == {"image"}
    assert scored.metrics["images"]["scored"] == 1


def test_wrong_usage_is_exit_2_and_one_line(maps: Path, images: Path, tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run()
    (tmp_path / "strangers").mkdir()
    np.save(tmp_path / "strangers" / "x.npy", np.zeros((4, 4)))
    (tmp_path / "wrong.json").write_text("[1]")
    (tmp_path / "far.json").write_text('{"positive": 40}')
    bare = tmp_path / "bare"
    shutil.copytree(images, bare, ignore=shutil.ignore_patterns("lesions"))
    for arguments, part in (
        ((tmp_path / "nowhere", "--data", images), "no maps there"),
        ((tmp_path / "strangers", "--data", images), "none of its 1 maps"),
        ((maps, "--data", tmp_path / "nowhere"), "nowhere"),
        ((maps, "--data", bare), "has a known lesion"),
        ((maps, "--data", images, "--threshold-from", tmp_path), "no thresholds"),
        ((maps, "--data", images, "--threshold-from", tmp_path / "no.json"), "no.json"),
        ((maps, "--data", images, "--threshold-from", tmp_path / "wrong.json"), "wrong.json"),
        ((maps, "--data", images, "--threshold-from", tmp_path / "far.json"), "far.json"),
        ((maps, "--data", images, "--boxes", tmp_path / "no.csv"), "no.csv"),
        ((maps, "--data", images, "--out", run.store.uri), "a run"),
        (("gopher://hole", "--data", images), "gopher"),
    ):
        result = diffva("score", *arguments)
        assert (result.exit_code, part in result.stderr) == (2, True), (arguments, result.output, result.exception)
        assert len(result.stderr.strip().splitlines()) == 1
