"""Scores of sampled records of a run: which images are sampled, their metrics, and the means."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from diffva_ray.evaluate.pair_scores import counterfactual_rows, heart_rows, run_judge, score_pairs, zone_rows
from diffva_ray.evaluate.records import read_images, read_records
from diffva_ray.generate.run import Run
from diffva_ray.metrics.validity import Judge

MakeRun = Callable[..., Run]


def test_scores_are_those_of_the_stored_images(make_run: MakeRun) -> None:
    run = make_run()
    rows = read_records(run).to_dict("records")
    torch.manual_seed(0)
    judge = Judge(["COVID", "Lung_Opacity", "Normal"], "Normal", width=4).eval()
    scores = score_pairs(run, rows, {}, judge, None)
    assert len(scores) == 12
    row, found = rows[0], scores[0]
    images = read_images(run, row)
    lesion = np.zeros((16, 16), bool)
    lesion[4:8, 4:8] = True
    before, after = judge.probabilities(np.stack([images.image, images.counterfactual]))
    other = 1 if row["label"] == "COVID" else 0
    assert found["collateral"] == pytest.approx(abs(after[other] - before[other]))
    assert found["changed"] == pytest.approx((np.abs(images.signed_map) > 0.05).mean())
    assert found["inside_change"] == pytest.approx(np.abs(images.signed_map)[lesion].mean())
    assert found["outside_change"] == pytest.approx(np.abs(images.signed_map)[~lesion].mean())
    assert found["gain"] == pytest.approx(row["judge_counterfactual"] - row["judge_image"])
    assert -1 <= found["cout"] <= 1
    assert found["lpips"] is None
    assert "heart_before" not in found
    table = {line["label"]: line for line in counterfactual_rows(scores)}
    assert set(table) == {"COVID", "Lung_Opacity", "all"}
    assert table["all"]["changed"] == pytest.approx(np.mean([one["changed"] for one in scores]))
    assert table["all"]["changed_interval"][0] < table["all"]["changed"] < table["all"]["changed_interval"][1]
    assert heart_rows(scores) == []


def test_without_a_judge_there_are_no_judge_scores(make_run: MakeRun) -> None:
    run = make_run(judged=False)
    assert run_judge(run) is None
    rows = read_records(run).to_dict("records")
    table = counterfactual_rows(score_pairs(run, rows, {}, None, None))
    assert not {"gain", "cout", "collateral"} & table[0].keys()
    assert {"changed", "energy", "inside_change"} <= table[0].keys()
    assert counterfactual_rows([]) == []


def test_hearts_are_compared_if_both_are_known() -> None:
    about = {"label": "Normal"}
    values = [(0.4, 0.5), (0.42, 0.5), (0.44, None), (None, None), (0.5, 0.48)]
    scores = [{**about, "group": str(n), "heart_before": a, "heart_after": b} for n, (a, b) in enumerate(values)]
    (row,) = heart_rows(scores)
    assert (row["images"], row["n"]) == (5, 3)
    assert row["change"] == pytest.approx((0.1 + 0.08 - 0.02) / 3)
    assert row["grew"] == pytest.approx(2 / 3)


def test_brightness_finds_the_bright_zone(make_run: MakeRun) -> None:
    """Images of the run have a lesion in the upper third of the patient's right lung: zone A."""
    run = make_run()
    rows = read_records(run).to_dict("records")
    scores = {row["image_path"]: np.array([3.0, 0, 0, 0, 0, 0]) for row in rows}
    found = {row["map"]: row for row in zone_rows(run, rows, scores)}
    assert found["brightness"]["spearman"] > 0.4  # one zone of six above ties: 0.65 at most
    assert found["brightness"]["spearman_within_image"] > 0.4
    assert abs(found["absolute"]["spearman"]) < 0.4  # its maps are noise
    assert found["brightness"]["lungs"] == "mask 12"
