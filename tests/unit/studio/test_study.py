"""The blinded study, and what simulated readers with known errors must get."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from diffva_ray.cli import main
from diffva_ray.data.encoding import quantise
from diffva_ray.evaluate.records import as_records, read_images, read_records
from diffva_ray.generate.run import open_run
from diffva_ray.studio.readers import agreement, kappa, kappa_interval, rates
from diffva_ray.studio.study import QUESTIONS, open_sheet


def diffva(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "run"
    options = ("--executor", "inline", "--steps", 2, "--samples", 2, "--strength", 1)
    result = diffva("generate", "--data", images, "--model", model, "--out", out, *options)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def study(run: Path) -> Path:
    out = run.parent / "first"
    result = diffva("study", run, "--images", 20, "--seed", 1, "--out", out)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def key(study: Path) -> pd.DataFrame:
    return pd.read_csv(study / "key.csv")


def test_the_key_says_what_each_image_is(run: Path, study: Path, key: pd.DataFrame) -> None:
    opened = open_run(str(run))
    records = {record["record_id"]: record for record in as_records(read_records(opened))}
    for _, row in key.iterrows():
        images = read_images(opened, records[row["record_id"]])
        kinds = {"real": images.image, "counterfactual": images.counterfactual, "reconstruction": images.reconstruction}
        shown = np.asarray(Image.open(study / "sheet" / f"{row['item']:03d}.png"))
        np.testing.assert_array_equal(shown, quantise(kinds[row["kind"]]))
        region = np.asarray(Image.open(study / "sheet" / f"{row['item']:03d}.region.png")) > 0
        np.testing.assert_array_equal(region, np.abs(images.signed_map) > 0.05)


def test_kinds_are_balanced_images_are_used_once_and_some_come_again(key: pd.DataFrame) -> None:
    assert len(key) == 20
    once = key.drop_duplicates("record_id")
    assert len(once) == once["image_path"].nunique() == 16
    assert set(once["kind"].value_counts()) <= {5, 6}
    assert (once.groupby("label")["kind"].nunique() == 3).all()
    again = key[key.duplicated("record_id")]
    assert (again["item"] > 8).all()
    for _, row in again.iterrows():
        first = key[key["record_id"] == row["record_id"]].iloc[0]
        assert first["kind"] == row["kind"]
        assert first["item"] <= 8


def test_the_sheet_gives_nothing_away(study: Path, key: pd.DataFrame) -> None:
    """Neither file names, nor metadata, nor the size of the images tell the kinds apart."""
    names = sorted(path.name for path in (study / "sheet").iterdir())
    assert names == sorted([f"{n:03d}{kind}.png" for n in range(1, 21) for kind in ("", ".region")] + ["study.json"])
    about = {(i.size, i.mode, str(i.info)) for i in map(Image.open, (study / "sheet").glob("???.png"))}
    assert len(about) == 1
    text = (study / "sheet" / "study.json").read_text()
    assert not any(word in text for word in ("real,", "counterfactual", "reconstruction", *key["record_id"]))


def test_the_same_seed_gives_the_same_study(run: Path, study: Path, tmp_path: Path) -> None:
    for seed, same in ((1, True), (2, False)):
        out = tmp_path / str(seed)
        assert diffva("study", run, "--images", 20, "--seed", seed, "--out", out).exit_code == 0
        assert ((out / "key.csv").read_text() == (study / "key.csv").read_text()) is same


def test_refusals_are_one_line(run: Path, study: Path, tmp_path: Path) -> None:
    for arguments, named in (
        (("study", run, "--out", study), "holds a study already"),
        (("study", run, "--images", 60, "--out", tmp_path / "x"), "needs 48 images"),
        (("readers", tmp_path), "no key.csv"),
        (("readers", study), "no answers yet"),
    ):
        result = diffva(*arguments)
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        assert named in result.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("other,anna,1,yes,no,,3", "row 2: item 1 of study other"),
        ("{study},anna,99,yes,no,,3", "row 2: item 99"),
        ("{study},anna,1,maybe,no,,3", "row 2: finding 'maybe'"),
        ("{study},anna,1,yes,no,,3\n{study},anna,1,yes,no,,3", "row 3: reader anna has answered item 1 before"),
    ],
)
def test_answers_that_do_not_fit_are_named(row: str, named: str, study: Path, tmp_path: Path) -> None:
    sheet = json.loads((study / "sheet" / "study.json").read_text())
    header = "study,reader,item,finding,realistic,region,seconds\n"
    (tmp_path / "anna.csv").write_text(header + row.format(study=sheet["study"]) + "\n")
    result = diffva("readers", study, tmp_path / "anna.csv")
    assert result.exit_code == 2
    assert named in result.stderr


def test_answers_continue_and_become_tables(study: Path, key: pd.DataFrame) -> None:
    """A reader who sees through everything and stops once in the middle."""
    for _, row in key.iterrows():
        sheet = open_sheet(str(study / "sheet"))
        assert sheet.next_item("anna") == row["item"]
        real = "yes" if row["kind"] == "real" else "no"
        answers = {"finding": real, "realistic": real, "region": "" if real == "no" else "yes"}
        sheet.answer("anna", int(row["item"]), answers, 4.2)
        sheet.answer("anna", int(row["item"]), answers, 4.2)  # a page that was open twice
    result = diffva("readers", study)
    assert result.exit_code == 0, result.output
    assert "anna, real, realistic: 100% yes" in result.output
    assert "anna, counterfactual, realistic: 0% yes" in result.output
    tables = json.loads((study / "tables" / "agreement.json").read_text())["rows"]
    within = {row["question"]: row for row in tables if row["what"] == "within"}
    assert within["realistic"]["n"] == 4
    assert within["realistic"]["agreement"] == 1
    judge = next(row for row in tables if row["what"] == "judge")
    judged = key[key["judge_healthy"].notna()].drop_duplicates("record_id")
    assert judge["n"] == len(judged) > 8
    assert judge["agreement"] == pytest.approx(((judged["kind"] == "real") == (judged["judge_healthy"] < 0.5)).mean())


def simulated(n: int, error: float, seed: int) -> pd.DataFrame:
    """Answers of two readers who say the truth (half of the images are abnormal) but for a share ``error`` of random
    slips, to n images shown twice; the judge makes no error."""
    random = np.random.default_rng(seed)
    truth = np.arange(n) % 2 == 0
    frames = []
    for reader in ("anna", "ben"):
        for show in (0, 1):
            said = truth ^ (random.random(n) < error)
            frames.append(pd.DataFrame({
                "reader": reader, "show": show, "record_id": np.arange(n), "image_path": np.arange(n).astype(str),
                "patient": "", "kind": np.where(truth, "real", "counterfactual"), "seconds": 5.0,
                "judge_healthy": np.where(truth, 0.1, 0.9), **{name: said.astype(float) for name in QUESTIONS},
            }))  # fmt: skip
    return pd.concat(frames)


def test_simulated_readers_get_their_known_rates_and_kappas() -> None:
    """With half of the images abnormal, kappa with the truth is 1 - 2e, and of two such readings (1 - 2e)^2."""
    error, frame = 0.1, simulated(4000, 0.1, seed=2)
    for row in rates(frame):
        expected = 1 - error if row["kind"] == "real" else error
        assert row["yes"] == pytest.approx(expected, abs=0.03)  # 4.5 standard errors
        assert row["interval"][0] < row["yes"] < row["interval"][1]
    expected = {"within": (1 - 2 * error) ** 2, "between": (1 - 2 * error) ** 2, "judge": 1 - 2 * error}
    rows = agreement(frame)
    assert {row["what"] for row in rows} == set(expected)
    for row in rows:
        assert row["kappa"] == pytest.approx(expected[row["what"]], abs=0.04), row


def test_the_intervals_cover_the_truth_as_often_as_they_say() -> None:
    covered = {"rate": 0, "kappa": 0}
    for seed in range(40):
        frame = simulated(60, 0.2, seed)
        rate = next(row for row in rates(frame) if row["reader"] == "anna" and row["kind"] == "real")
        between = next(row for row in agreement(frame) if row["what"] == "between")
        covered["rate"] += rate["interval"][0] <= 0.8 <= rate["interval"][1]
        covered["kappa"] += between["interval"][0] <= 0.6**2 <= between["interval"][1]
    assert covered["rate"] >= 34
    assert covered["kappa"] >= 34


def test_kappa_by_hand() -> None:
    """20 both yes, 5 and 10 apart, 15 both no: (0.7 - 0.5) / (1 - 0.5)."""
    assert kappa(np.array([15.0, 5, 10, 20])) == pytest.approx(0.4)
    assert kappa(np.array([5.0, 0, 0, 5])) == 1
    assert kappa(np.array([0.0, 5, 5, 0])) == -1
    assert np.isnan(kappa(np.array([0.0, 0, 0, 9])))
    assert np.isnan(kappa_interval(np.array([0.0, 0, 0, 9]))).all()
    low, high = kappa_interval(np.array([150.0, 50, 100, 200]))
    assert low < 0.4 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.0402, rel=0.15)  # asymptotic standard error (Fleiss et al. 1969)
