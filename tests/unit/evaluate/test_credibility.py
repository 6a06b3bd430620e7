"""What would flatter a run stands above its numbers, and the numbers of its headline are withheld."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from html_page import Page

from diffva_ray.cli import main
from diffva_ray.data.encoding import encode_map
from diffva_ray.evaluate.credibility import MIN_STEPS, problems
from diffva_ray.evaluate.drawing import MIN_LIMIT, MIN_THRESHOLD
from diffva_ray.evaluate.figures import map_scale, spanning
from diffva_ray.evaluate.pair_scores import add_controls
from diffva_ray.evaluate.records import read_records
from diffva_ray.evaluate.report.numbers import cards, glance
from diffva_ray.evaluate.report.page import notes, write_report
from diffva_ray.generate.run import Run

MakeRun = Callable[..., Run]
DONE = {"planned": 2, "ok": 2, "quarantined": 0}


def trained_for(run: Run, steps: int) -> None:
    """Let the model's card say so."""
    path = Path(str(run.about["model"])) / "diffva.json"
    card = json.loads(path.read_text())
    card["recipe"]["train"] = {"stages": [{"trains": "judge", "steps": 9000}, {"trains": "denoiser", "steps": steps}]}
    path.write_text(json.dumps(card))


def test_a_model_of_two_steps_learned_nothing_and_the_page_says_it_first(make_run: MakeRun) -> None:
    run = make_run()
    trained_for(run, 2)
    page = Page(Path(write_report(run)).read_text())
    said = " ".join(page.text.split()).replace("run · diffva report", "", 1)  # its title
    assert said.index("Nothing was learned: the model was trained for 2 steps.") < said.index("Not for clinical use")
    assert problems(run, [], 0, 12) == ["Nothing was learned: the model was trained for 2 steps"]
    trained_for(run, MIN_STEPS)
    assert problems(run, [], 0, 12) == []
    assert "Nothing was learned" not in Path(write_report(run)).read_text()


def test_a_broken_autoencoder_and_training_images_are_problems(make_run: MakeRun) -> None:
    run = make_run()
    assert problems(run, [{"psnr_reconstruction": 31.0}, {"psnr_reconstruction": float("inf")}], 0, 12) == []
    (broken,) = problems(run, [{"psnr_reconstruction": 11.0}, {"psnr_reconstruction": 12.0}], 0, 12)
    assert "the autoencoder is broken, its reconstructions have a mean PSNR of 11.5 dB" in broken
    trained_for(run, 2)
    _, broken = problems(run, [{"psnr_reconstruction": 11.0}], 0, 12)
    assert broken.startswith("The autoencoder is broken"), "that nothing was learned is said once"
    trained_for(run, MIN_STEPS)
    (seen,) = problems(run, [], 3, 12)
    assert seen.startswith("3 of 12 records are of images in the model's training list")


def test_no_headline_beside_a_problem() -> None:
    metrics = {
        "problems": ["Nothing was learned: the model was trained for 2 steps"],
        "validity": [{"label": "ill", "n": 5, "flip_rate": 1.0, "confidence_gain": 0.005}],
        "localization": [{"label": "ill", "n": 5, "map": "positive", "auroc": 0.99, "region": "image"}],
    }
    said = " ".join(glance(metrics) + [f"{card.value} {card.detail}" for card in cards(metrics, DONE)])
    assert "100" not in said
    assert "0.99" not in said
    assert "No result is stated, for the reason above" in said
    metrics["problems"].append("The autoencoder is broken")
    assert glance(metrics) == ["No result is stated, for the reasons above."]


def test_rates_of_reconstruction_and_ground_truth_stand_beside_the_flip_rate() -> None:
    scores = [
        {"label": "ill", "judge_image": before, "judge_reconstruction": after, "judge_ground_truth": truth}
        for before, after, truth in ((0.1, 0.2, 0.9), (0.2, 0.7, 0.8), (0.3, 0.1, 0.4), (0.4, 0.1, None), (0.9, 0.9, 1))
    ]
    rows = [{"label": "ill", "n": 4, "flip_rate": 0.5, "confidence_gain": 0.3}]
    add_controls(rows, scores)
    assert (rows[0]["flip_rate_reconstruction"], rows[0]["flip_rate_reconstruction_n"]) == (0.25, 4)
    assert (rows[0]["flip_rate_ground_truth"], rows[0]["flip_rate_ground_truth_n"]) == (pytest.approx(2 / 3), 3)
    judge = {"accuracy": 0.9, "n": 200, "problem": ""}
    (said,) = glance({"validity": rows, "judge": judge})
    for part in ("25.0 % of reconstructions", "66.7 % of ground-truth", "mean confidence gain 0.300", "85.1 to 93.4 %"):
        assert part in said, part
    (_, card) = cards({"validity": rows, "judge": judge}, DONE)
    assert "right on 90.0 % of 200 held-out images" in card.detail


def test_a_run_of_training_images_is_no_test(images: Path, model: Path, tmp_path: Path) -> None:
    """The whole way: the tiny model learned nothing, and ``images`` are what it was trained on."""

    def diffva(*words: object) -> str:
        done = CliRunner().invoke(main, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    out = tmp_path / "run"
    diffva("generate", "--data", images, "--model", model, "--out", out, "--executor", "inline")
    said = diffva("reduce", out, "--executor", "inline")
    metrics = json.loads((out / "tables" / "metrics.json").read_text())
    learned, broken, seen = metrics["problems"]
    assert "trained for 4 steps" in learned
    assert "The autoencoder is broken" in broken
    assert "18 of 18 records" in seen
    assert "No result is stated" in said
    assert all(
        said.count(problem) == 1 and said.index(problem) < said.index("Validity") for problem in (learned, broken)
    )
    assert "flip_rate_reconstruction" in (out / "tables" / "validity.csv").read_text()
    assert "The judge is not tested on held-out images" in (out / "tables" / "validity.md").read_text()


def put_maps(run: Run, spread: float) -> None:
    for path in read_records(run)["attribution_path"]:
        run.store.put(path, encode_map(np.random.default_rng(0).normal(0, spread, (16, 16))))


def test_maps_of_noise_look_faint(make_run: MakeRun) -> None:
    run = make_run()
    put_maps(run, 0.004)
    scale = map_scale(run, read_records(run))
    assert (scale.limit, scale.threshold, scale.threshold_from) == (MIN_LIMIT, MIN_THRESHOLD, "fixed")
    put_maps(run, 0.1)
    assert map_scale(run, read_records(run)).limit > 0.2


def test_best_is_judged_abnormal_before_and_healthy_after(make_run: MakeRun) -> None:
    run = make_run()
    records = read_records(run)
    records["judge_image"], records["judge_counterfactual"] = 0.9, 0.99  # healthy from the start
    assert {rank for rank, _ in spanning(run, records)} == {"highest", "median", "lowest"}
    flipped = records.index[records["label"] == "COVID"][3]
    records.loc[flipped, ["judge_image", "judge_counterfactual"]] = 0.1, 0.6
    best = [row["record_id"] for rank, row in spanning(run, records) if rank == "best"]
    assert best == [records.loc[flipped, "record_id"]]


def test_a_judge_that_guesses_ranks_no_image(make_run: MakeRun) -> None:
    run = make_run()
    records: pd.DataFrame = read_records(run)
    run.about["judge"] = {"classes": ["COVID", "Normal"], "calibration": {"accuracy": 0.5, "images": 10}}
    by_ssim = records[records["label"] == "COVID"].sort_values("ssim", ascending=False)["record_id"].iloc[0]
    assert spanning(run, records)[0][1]["record_id"] == by_ssim
    assert spanning(run, records)[0][0] == "highest"


def test_the_examples_leave_out_a_judge_that_guesses(make_run: MakeRun) -> None:
    run = make_run()
    quality = {"accuracy": 0.95, "images": 200, "chance": 0.5}
    run.about["judge"] = {"classes": ["COVID", "Normal"], "calibration": quality}
    assert "healthy <b>" in Path(write_report(run)).read_text()
    run.about["judge"]["calibration"] = {**quality, "accuracy": 0.5}
    page = Path(write_report(run)).read_text()
    assert "healthy <b>" not in page
    assert "Best: judged abnormal" not in page


@pytest.mark.parametrize(("ok", "said"), [(1, ["Only 1 record: "]), (9, ["Only 9 records: "]), (10, []), (0, [])])
def test_few_records_are_said(make_run: MakeRun, ok: int, said: list[str]) -> None:
    texts = [note.text for note in notes(make_run(), None, {"planned": ok, "records": ok, "ok": ok})]
    assert [text.partition("the numbers")[0] for text in texts if text.startswith("Only")] == said
