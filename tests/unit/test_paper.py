"""``diffva paper`` on a few phantoms with the tiny model: all of it is there, says what it is, and can be continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from diffva_ray.cli import main
from diffva_ray.config.recipe import DataConfig, RecipeError, load_recipe, recipe_names
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.phantoms import make_phantoms
from diffva_ray.evaluate.records import grey, read_records
from diffva_ray.generate.run import open_run
from diffva_ray.metrics.validity import load_judge
from diffva_ray.paper.experiments import EXPERIMENTS, METHOD_KEYS, SETTINGS, Experiment, guided, settings_recipe
from diffva_ray.paper.inputs import SEEDS, copy_images, drawn, phantom_chexpert, sampled
from diffva_ray.paper.layout import Table, flat, number, thinned, with_interval
from diffva_ray.paper.state import PaperState
from diffva_ray.paper.studies import _places
from diffva_ray.paper.tables import CLASSES
from diffva_ray.storage.local import LocalStore

ABNORMAL = ("Lung_Opacity", "COVID", "Viral Pneumonia")
STEPS = ("--set", "generate.num_inference_steps=4")


def paper(model: Path, out: Path, *more: object) -> Result:
    command = ["paper", "--model", model, "--out", out, "--executor", "inline", *STEPS, *more]
    return CliRunner().invoke(main, [str(argument) for argument in command])


@pytest.fixture(scope="module")
def model(model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a card that says where its images are, as ``diffva train`` writes it."""
    copy = tmp_path_factory.mktemp("paper-model") / "tiny"
    shutil.copytree(model, copy)
    card = json.loads((copy / "diffva.json").read_text())
    (copy / "diffva.json").write_text(json.dumps({**card, "data": str(images)}))
    return copy


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    result = paper(model, folder / "out", "--quick", "--limit", 8, "--base", model, "--sources", sources(folder))
    assert result.exit_code == 0, result.output
    return folder / "out"


def sources(folder: Path) -> Path:
    """A table that calls every image of Viral Pneumonia, and half of the healthy ones, a child's."""
    make_phantoms(str(folder / "data"), 32, 32, SEEDS["radiography"])
    rows = ["file,source"]
    for number_, image in enumerate(open_dataset(str(folder / "data")).images):
        child = image.label == "Viral Pneumonia" or (image.label == "Normal" and number_ % 2)
        rows.append(f"{image.path},{'children' if child else 'adults'}")
    (folder / "sources.csv").write_text("\n".join(rows) + "\n")
    return folder / "sources.csv"


def table(made: Path, key: str) -> dict:
    return json.loads((made / "tables" / f"{key}.json").read_text())


def test_every_table_and_figure_is_there_in_every_form(made: Path) -> None:
    for key in (*(f"table{n}" for n in range(1, 6)), *(f"tableS{n}" for n in (1, 2, 3, 4, 5, 8, 9, 10, 11, 12))):
        for ending in ("csv", "md", "tex", "json"):
            assert (made / "tables" / f"{key}.{ending}").stat().st_size > 100, (key, ending)
    for number_ in range(2, 11):
        assert (made / "figures" / f"figure{number_:02d}.png").read_bytes().startswith(b"\x89PNG")
    page, text = (made / "index.html").read_text(), (made / "index.md").read_text()
    # lungs are not found on every counterfactual of an untrained model
    hearts = (made / "tables/tableS6.json").exists()
    sections = page.count('<section id="table') + page.count('<section id="figure')
    assert sections == text.count("\n## Table") + text.count("\n## Figure") == 24 + hearts
    assert hearts or "Table S6. Cardiothoracic ratio: no lungs" in text
    assert "Not for clinical use" in page
    assert "figure 1: a drawing" in text
    assert "children against children" not in text


def test_published_values_stand_beside_ours(made: Path) -> None:
    """Numbers as the paper prints them, in the row they belong to."""
    rows = table(made, "table1")["rows"]
    distances = {(row[0], row[1]): row for row in rows if "[95 %]" in row[2]}
    assert distances["Viral Pneumonia images", "real Normal"][4] == "97.6"
    assert distances["COVID images", "their healthy counterfactuals"][4] == "32.2"
    difference = next(
        row for row in rows if row[0] == "Viral Pneumonia images" and row[2] == "absolute difference of the two"
    )
    assert difference[4] == "59.97"
    assert {row[4] for row in table(made, "table2")["rows"]} == {"", "60.6", "110.72", "45.11"}
    assert [row["paper"] for row in table(made, "table4")["details"]] == ["52.08", "17.71", None]
    paper = [None, "91.57", "113.14", "113.71", None, None, "275", None]
    assert [row["paper"] for row in table(made, "table5")["details"]] == paper
    for label, paper_ in CLASSES.items():
        assert paper_["difference"] == pytest.approx(abs(paper_["counterfactuals"] - paper_["healthy"])), label


def test_ours_are_the_numbers_of_the_runs(made: Path) -> None:
    """Table 1 and the run's own metrics agree; the difference is that of the two lines above it."""
    details = [row for row in table(made, "table1")["details"] if row["setting"] == "generate-0.55"]
    metrics = json.loads((made / "runs/generate-0.55/tables/metrics.json").read_text())["fid"]
    values = {(row["set1"], row["set2"]): row for row in metrics}
    covid = [row for row in details if row["image_set_1"] == "COVID images"]
    assert covid[0]["value"] == values["COVID (source)", "COVID (counterfactual)"]["value"]
    assert covid[1]["value"] == values["Normal (reference)", "COVID (source)"]["value"]
    assert (covid[0]["n1"], covid[0]["n2"]) == (8, 8)
    line = next(row for row in table(made, "table1")["rows"] if row[0] == "COVID images" and "difference" in row[2])
    assert line[5] == number(abs(covid[0]["value"] - covid[1]["value"]))
    real = [row for row in table(made, "table1")["details"] if row["image_set_2"] == "real Normal"]
    by_class = {row["image_set_1"]: set() for row in real}
    for row in real:
        by_class[row["image_set_1"]].add((row["value"], *(row["interval"] or ())))
    assert all(len(found) == 1 for found in by_class.values())  # the same two sets in every column


def test_a_stand_in_is_never_called_fid_and_small_scales_are_not_set_beside(made: Path) -> None:
    for key in ("table1", "table2", "table4", "table5"):
        found = table(made, key)
        assert "stand-in, not FID" in found["caption"]
        assert not any(cell.startswith("FID") for row in found["rows"] for cell in row)
        assert all(row["is_stand_in"] for row in found["details"])
    rows = table(made, "table3")["rows"]
    assert {row[3] for row in rows if row[1] == "MS-SSIM"} == {"(5 scales)"}
    assert {row[3] for row in rows if row[1] == "SSIM"} == {"0.780", "0.768", "0.798"}


def test_table_five_says_what_guidance_of_one_or_less_does(made: Path) -> None:
    caption = table(made, "table5")["caption"]
    assert "Guidance 0.01 and 1 give the same pixels in 8 of 8 images." in caption


def test_table_five_is_made_of_random_healthy_images(made: Path) -> None:
    """The last row alone is of abnormal images, of all classes together."""
    rows = table(made, "table5")["details"]
    assert [row["n2"] for row in rows] == [8, 8, 8, 8, 8, 8, 8, 24]
    assert [row.get("within_class", 0) > 0 for row in rows] == [False] * 7 + [True]
    assert all(row["halves"]["crossed"] > 0 for row in rows[:-1])
    for name in ("no-text", "no-image-prior", "neither", "prompt-only", "pure-noise", "before-training"):
        assert set(read_records(open_run(str(made / "runs" / name)))["label"]) == {"Normal"}


def test_sizes_of_the_papers_samples_stand_beside_ours(made: Path) -> None:
    assert table(made, "table4")["rows"][0][4:] == ["8060", "8 of 8"]
    assert table(made, "table5")["rows"][0][4:] == ["4000", "8 of 8"]


def test_a_sample_is_drawn_by_the_seed(images: Path, tmp_path: Path) -> None:
    config = DataConfig()
    first, again, other = (
        drawn(str(images), config, "Normal", 3, str(tmp_path / name), seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    names = [[image.path for image in open_dataset(sample.uri).images] for sample in (first, again, other)]
    assert names[0] == names[1] != names[2]
    assert (first.size, first.available) == (3, open_dataset(str(images)).classes["Normal"])
    assert drawn(str(images), config, "Normal", 1000, str(tmp_path / "d"), 0).uri == str(images)


def test_again_does_nothing_and_weights_make_new_tables(made: Path, model: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in made.rglob("*") if file.is_file()}
    more = ("--base", model, "--sources", made.parent / "sources.csv")
    result = paper(model, made, "--quick", "--limit", 8, *more)
    assert result.exit_code == 0
    assert {file: file.stat().st_mtime_ns for file in made.rglob("*") if file.is_file()} == before


def test_other_images_in_the_same_folder_are_refused(made: Path, model: Path, images: Path) -> None:
    result = paper(model, made, "--radiography", images, "--limit", 8)
    assert result.exit_code == 3
    assert "radiography" in result.stderr


def test_what_cannot_be_made_is_listed(model: Path, images: Path, tmp_path: Path) -> None:
    """No CheXpert, one abnormal class, no lesion masks: a shorter sheet that says so."""
    data = tmp_path / "data"
    for label in ("Normal", "COVID"):
        shutil.copytree(images / label / "images", data / label / "images")
    result = paper(model, tmp_path / "out", "--radiography", data, "--limit", 4)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "index.md").read_text()
    assert "table 4, real cardiomegaly against generated: no CheXpert given" in text
    assert "Table S3. Maps against known lesions: no image has a lesion mask or box" in text
    assert "class Viral Pneumonia" in text
    assert "children against children): no source" in text
    assert "the base model before fine-tuning: no model before fine-tuning given (--base)" in text
    assert table(tmp_path / "out", "table4")["details"][0]["image_set_1"] == "healthy images"


def test_a_prompt_the_model_cannot_read_costs_its_figure_only(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other runs are made. Bad images in a run of the tables are another matter and end the command."""
    long = Experiment("carcinoma", "figure 4", "few healthy", "paper_induction", ("carcinoma " * 40,))
    seen: list[PaperState] = []
    monkeypatch.setattr("diffva_ray.paper.build.EXPERIMENTS", (long, EXPERIMENTS[4]))
    monkeypatch.setattr("diffva_ray.paper.page.write_page", seen.append)
    assert paper(model, tmp_path / "out", "--quick", "--limit", 4).exit_code == 0
    (made,) = seen
    assert set(made.runs) == {"healthy-own"}
    assert made.missing[0][0] == "figure 4"
    assert "tokens" in made.missing[0][1]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ((), "--radiography"),
        (("--radiography", "nowhere"), "nowhere"),
        (("--quick", "--set", "model.resolution=64"), "--set"),
        (("--quick", "--base", "nowhere"), "--base nowhere: no diffva.json"),
        (("--quick", "--sources", "nowhere.csv"), "nowhere.csv"),
        (("--quick", "--carcinoma", "nowhere.png"), "--carcinoma nowhere.png: no such file"),
    ],
)
def test_wrong_usage_is_exit_2(more: tuple[str, ...], named: str, model: Path, tmp_path: Path) -> None:
    result = paper(model, tmp_path / "out", *more)
    assert result.exit_code == 2
    assert named in result.stderr


def test_dry_run_lists_every_run_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    result = paper(model, tmp_path / "out", "--quick", "--dry-run")
    plan = json.loads(result.stdout)
    runs = {run["run"]: run for run in plan["runs"]}
    assert runs.keys() == {f"runs/{experiment.name}" for experiment in EXPERIMENTS if not experiment.of_base}
    assert (runs["runs/neither"]["strength"], runs["runs/neither"]["guidance_scale"]) == (0.99, 0.1)
    assert runs["runs/no-image-prior"]["prompts"] == ["healthy chest scan"]
    assert runs["runs/generate-0.85"]["prompts"] == ["normal chest x-ray"]
    assert not (tmp_path / "out").exists()


def test_settings_are_the_recipes_and_the_model_stays_itself(tiny) -> None:
    for experiment in EXPERIMENTS:
        recipe = settings_recipe(tiny, experiment)
        assert recipe.model == tiny.model
        assert recipe.generate.micro_batch == tiny.generate.micro_batch
        if experiment.recipe and not experiment.changes:
            named = load_recipe(experiment.recipe)
            assert all(getattr(recipe.generate, key) == getattr(named.generate, key) for key in METHOD_KEYS)
            assert recipe.data.healthy_prompt == named.data.healthy_prompt
            assert recipe.assumed == named.assumed != ()
    with pytest.raises(RecipeError, match="--set model"):
        settings_recipe(tiny, EXPERIMENTS[0], ["model.tokenizer_length=20"])
    assert {experiment.recipe for experiment in EXPERIMENTS} - {None} <= set(recipe_names())


def test_guidance_is_off_at_one_and_between_equal_prompts() -> None:
    config = load_recipe("paper").generate
    assert guided(config, "normal")
    assert not guided(config, "")
    assert not guided(config.model_copy(update={"guidance_scale": 1.0}), "normal")


def test_chexpert_phantoms_are_read_as_chexpert(tmp_path: Path) -> None:
    dataset = open_dataset(phantom_chexpert(str(tmp_path / "chexpert"), 3, 32))
    assert dataset.kind == "chexpert"
    assert dataset.classes == {"Cardiomegaly": 3, "Normal": 3}
    assert all(image.size > 0 for image in dataset.images)


def test_a_copy_keeps_masks_and_boxes(images: Path, tmp_path: Path) -> None:
    """Images are renamed on the way; each mask and box has to follow its own."""
    data = tmp_path / "data"
    shutil.copytree(images / "COVID", data / "COVID")
    names = sorted(file.name for file in (data / "COVID/images").iterdir())
    (data / "boxes.csv").write_text(
        "file,x,y,w,h\n" + "".join(f"COVID/images/{n},{i},2,3,4\n" for i, n in enumerate(names))
    )
    original = open_dataset(str(data))
    copied = open_dataset(copy_images(original, sampled(original.images, 3), str(tmp_path / "copy")))
    assert len(copied.images) == len(copied.shapes) == 3
    for image in copied.images:
        counterfactual = next(other for other in original.images if other.path.endswith(image.path.rpartition("_")[2]))
        assert copied.shapes[image.path] == original.shapes[counterfactual.path]
        for mine, theirs in (
            (image.path, counterfactual.path),
            (image.lung_mask, counterfactual.lung_mask),
            (image.lesion_mask, counterfactual.lesion_mask),
        ):
            assert copied.store.read(mine) == original.store.read(theirs)


def test_the_smaller_draw_is_part_of_the_larger(images: Path) -> None:
    everything = open_dataset(str(images)).images
    few, more = sampled(everything, 2), sampled(everything, 4)
    assert set(few) < set(more)
    assert len(few) == 8
    assert sampled(everything[::-1], 2) == few


def test_layout_of_numbers(tmp_path: Path) -> None:
    numbers = [number(value) for value in (None, float("nan"), 0.01234, 12.345, 123.45)]
    assert numbers == ["–", "–", "0.0123", "12.3", "123.5"]
    assert with_interval(1.0, [0.5, 2.0]) == "1 [0.5, 2]"
    assert with_interval(1.0, None) == "1"
    assert flat({"a": {"b": [1, 2]}, "c": "x"}) == {"a_b_low": 1, "a_b_high": 2, "c": "x"}
    rows = [["a", "b", "1"], ["a", "b", "2"], ["a", "c", "2"]]
    assert thinned(rows) == [["a", "b", "1"], ["", "", "2"], ["", "c", "2"]]
    Table("t", "Title", "Caption", ["h|", "%"], [["1", "a_b"]], [{"x": np.nan}]).write(LocalStore(str(tmp_path)))
    assert (tmp_path / "tables/t.md").read_text().splitlines()[2] == "| h\\| | % |"
    assert r"a\_b" in (tmp_path / "tables/t.tex").read_text()
    assert json.loads((tmp_path / "tables/t.json").read_text())["details"] == [{"x": None}]


def test_children_are_compared_with_children(made: Path) -> None:
    """The values are those of the run's own table; adults are never in a row of children."""
    rows = [row for row in table(made, "tableS12")["details"] if row["setting"] == "generate-0.55"]
    metrics = json.loads((made / "runs/generate-0.55/tables/metrics.json").read_text())["fid"]
    values = {(row["set1"], row["set2"]): row["value"] for row in metrics}
    by_set = {(row["image_set_1"], row["image_set_2"]): row for row in rows}
    children = by_set["real Normal of children", "healthy counterfactuals of Viral Pneumonia of children"]
    assert children["value"] == values["Normal of children (reference)", "Viral Pneumonia of children (counterfactual)"]
    assert children["n2"] == 8
    adults = by_set["real Normal of adults", "healthy counterfactuals of COVID of adults"]
    assert adults["n1"] == children["n1"] == 4
    assert by_set["real Normal", "healthy counterfactuals of COVID"]["n1"] == 8
    assert ("real Normal of children", "healthy counterfactuals of COVID of children") not in by_set


def test_places_of_the_change(made: Path) -> None:
    rows = table(made, "tableS11")["details"]
    prompts = next(experiment.prompts for experiment in EXPERIMENTS if experiment.name == "places")
    assert [row["prompt"] for row in rows] == list(prompts)
    records = read_records(open_run(str(made / "runs/places")))
    for row in rows:
        assert row["n"] == len(records) // len(prompts) == 8
        assert 0.1 < row["lungs_area"] < 0.5
        assert row["lungs_area"] + row["outside_chest_area"] < 1
        assert 0.4 < row["left_area"] < 0.6
        assert row["lungs_map"] + row["outside_chest_map"] <= 1
        assert row["lungs_change"] == pytest.approx(row["lungs_map"] - rows[0]["lungs_map"])
    assert rows[0]["left_change"] == 0


def test_left_is_the_patients_left_and_outside_is_outside() -> None:
    lungs = np.zeros((20, 20), bool)
    lungs[5:15, 3:8] = lungs[5:15, 12:17] = True
    inside, outside, left = _places(lungs)
    assert (inside == lungs).all()
    assert left[:, 10:].all()
    assert not left[:, :10].any()
    assert not outside[5:15, 3:17].any()  # the heart between the lungs is not outside
    assert not outside[10, 2]  # the wall of the chest: a tenth of 14 px
    assert outside[10, 1]
    assert outside[:4].all()


def test_the_settings_are_compared_with_their_cost(made: Path) -> None:
    rows = table(made, "tableS8")["details"]
    assert len(rows) == 9
    assert {row["images"] for row in rows} == {24}  # of each pair of settings
    by_setting = {(row["strength"], row["guidance_scale"]): row for row in rows}
    for guidance in (1.5, 4.0, 7.5):
        calls = [by_setting[strength, guidance]["unet_calls"] for strength in (0.25, 0.55, 0.85)]
        assert calls == [4, 6, 8]  # int(4 steps x strength) + 1 for diffusers' PNDM, twice for guidance
    records = read_records(open_run(str(made / "runs/grid")))
    chosen = records[(records["strength"] == 0.55) & (records["guidance_scale"] == 4.0)]
    assert by_setting[0.55, 4.0]["ssim"] == pytest.approx(chosen["ssim"].mean())


def test_the_judge_reads_diseases_and_interpolations_back(made: Path, model: Path) -> None:
    judge, run = load_judge(LocalStore(str(model))), open_run(str(made / "runs/other-disease"))
    assert judge is not None
    records = read_records(run)
    pairs = table(made, "tableS9")["details"]
    assert {(row["class"], row["prompt_class"]) for row in pairs} == {
        (label, target) for label in records["label"].unique() for target in ABNORMAL
    }
    first = pairs[0]
    prompt = load_recipe("phantom").data.prompt(first["prompt_class"])
    of_pair = records[(records["label"] == first["class"]) & (records["prompt"] == prompt)]
    images = np.stack([grey(run.store, path) for path in of_pair["counterfactual_path"]])
    expected = judge.probabilities(images)[:, judge.classes.index(first["prompt_class"])]
    assert first["after"] == pytest.approx(expected.mean(), abs=1e-4)
    assert len(of_pair) == first["n"]

    reflected = table(made, "tableS10")
    assert {row["prompt_class"] for row in reflected["details"]} == set(ABNORMAL)
    for row in reflected["details"]:
        assert len(row["judge"]) == len(row["own"]) == 5
        assert all(0 <= value <= 1 for value in (*row["judge"], *row["own"]))
    assert len(reflected["rows"]) == 2 * len(ABNORMAL)  # the judge's and the model's own reading


def test_an_interrupted_paper_goes_on_and_readers_scores_make_new_tables(
    made: Path, model: Path, tmp_path: Path
) -> None:
    """Scores given afterwards: only the lost shard is made again, the tables are."""
    out = tmp_path / "out"
    shutil.copytree(made, out)
    (out / "_SUCCESS").unlink()
    (out / "index.html").unlink()
    lost = sorted((out / "runs/no-text/records").iterdir())[0]
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("part-*.parquet")}
    images = sorted((made / "data" / "radiography" / "COVID" / "images").iterdir())
    zones = [f"S-{zone}" for zone in "ABCDEF"]
    lines = [
        ",".join([f"COVID/images/{image.name}", *(str((n + z) % 4) for z in range(6))])
        for n, image in enumerate(images)
    ]
    scores = tmp_path / "zones.csv"
    scores.write_text("\n".join([",".join(["file", *zones]), *lines]) + "\n")

    more = ("--base", model, "--sources", made.parent / "sources.csv", "--brixia", scores)
    result = paper(model, out, "--quick", "--limit", 8, *more)
    assert result.exit_code == 0, result.output
    assert lost.exists()
    assert (out / "index.html").exists()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert table(out, "table5")["details"] == table(made, "table5")["details"]
    rows = table(out, "tableS7")["details"]
    assert {row["run"] for row in rows} == set(SETTINGS.values())
    assert {row["n"] for row in rows} == {len(images)}
    assert [row["map"] for row in rows].count("brightness") == 1
    assert "Table S7" in (out / "index.md").read_text()
