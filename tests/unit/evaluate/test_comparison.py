"""Comparison of two runs: joined records, differences with valid intervals, and a page that is safe to open."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from html_page import Page
from PIL import Image
from rich.console import Console

from diffva_ray.cli import main
from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.encoding import encode_map
from diffva_ray.evaluate.comparison import (
    Comparison,
    compare_runs,
    difference_rows,
    run_names,
    setting_text,
)
from diffva_ray.evaluate.records import read_records
from diffva_ray.evaluate.report.comparison_page import chosen, output_store, print_comparison, ranking, write_comparison
from diffva_ray.evaluate.scores import score_records
from diffva_ray.generate.run import Run, find_run
from diffva_ray.storage.local import LocalStore

MakeRun = Callable[..., Run]
Change = Callable[[dict[str, Any]], dict[str, Any]]


def diffva(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def copied(run: Run, name: str, keys: dict[str, Any] | None = None, change: Change = lambda row: row) -> Run:
    """A copy of the run with other fingerprint keys and changed records."""
    folder = Path(run.store.uri).with_name(name)
    shutil.copytree(run.store.uri, folder)
    about = json.loads((folder / "run.json").read_text())
    about["keys"] |= keys or {}
    (folder / "run.json").write_text(json.dumps(about))
    for part in (folder / "records").iterdir():
        table = pq.read_table(part)
        pq.write_table(pa.Table.from_pylist([change(row) for row in table.to_pylist()], schema=table.schema), part)
    other = find_run(LocalStore(str(folder)))
    assert other is not None
    return other


def with_perfect_maps(run: Run) -> Run:
    """Replace every map of the run by the lesion of its image."""
    lesion = np.zeros((16, 16), np.float32)
    lesion[4:8, 4:8] = 0.3
    for path in Path(run.store.uri).glob("attributions/*/*.png"):
        path.write_bytes(encode_map(lesion))
    return run


def snapshot(*runs: Run) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for run in runs for path in Path(run.store.uri).rglob("*") if path.is_file()}


def test_equal_runs_do_not_differ(make_run: MakeRun) -> None:
    run = make_run()
    comparison = compare_runs(run, copied(run, "again"))
    assert comparison.counts == {"pairs": 12, "only_in_a": 0, "only_in_b": 0, "same_name_other_bytes": 0}
    assert comparison.settings == []
    assert {"auroc", "ssim", "flip_rate", "lesion_error_ratio", "attribution_energy"} <= {
        row["measure"] for row in comparison.rows
    }
    for row in comparison.rows:
        assert (row["difference"], row["better"]) == (0, None)
        assert row["interval"] == [0, 0] if row["n"] > 1 else np.isnan(row["interval"]).all()


def test_numbers_equal_the_runs_own_tables(make_run: MakeRun) -> None:
    run = make_run()
    other = with_perfect_maps(copied(run, "better", {"strength": 0.4, "prompt": ""}))
    comparison = compare_runs(run, other)
    localization, counterfactuals = score_records(run, read_records(run).to_dict("records"), {})
    ours = [row["auroc"] for row in localization if row["map"] == "positive"]
    auroc = comparison.row("auroc")
    assert auroc is not None
    assert auroc["a"] == pytest.approx(np.mean(ours))
    assert (auroc["b"], auroc["better"], auroc["n"]) == (1, "b", 12)
    assert auroc["interval"][0] > 0
    left = comparison.row("lesion_error_ratio")
    assert left is not None
    expected = sum(row["lesion_error"] for row in counterfactuals) / sum(
        row["lesion_error_input"] for row in counterfactuals
    )
    assert left["a"] == pytest.approx(expected)
    assert left["difference"] == 0
    assert {name: (in_a, in_b) for name, in_a, in_b in comparison.settings} == {
        "strength": (run.about["keys"]["strength"], 0.4),
        "prompt": ("normal chest scan", ""),
    }
    assert {row["label"] for row in comparison.rows} == {"COVID", "Lung_Opacity", "all"}


def test_flip_rates_are_of_images_that_both_call_abnormal(make_run: MakeRun) -> None:
    run = make_run()
    other = copied(run, "other", change=lambda row: {**row, "judge_image": 0.1, "judge_counterfactual": 0.9})
    comparison = compare_runs(run, other)
    flips = comparison.row("flip_rate")
    before = read_records(run)["judge_image"]
    assert flips is not None
    assert (flips["n"], flips["b"]) == ((before <= 0.5).sum(), 1)
    assert any("different judges" in note for note in comparison.notes)


def test_images_of_one_run_only_are_counted(make_run: MakeRun) -> None:
    run = make_run()
    other = copied(run, "shorter")
    (Path(other.store.uri) / "records" / "part-00001.parquet").unlink()
    comparison = compare_runs(run, other)
    assert comparison.counts == {"pairs": 8, "only_in_a": 4, "only_in_b": 0, "same_name_other_bytes": 0}
    assert any("B is unfinished: 1 of 3 shards" in note for note in comparison.notes)
    assert compare_runs(other, run).counts["only_in_b"] == 4


def test_images_with_the_same_name_but_other_bytes_are_not_joined(make_run: MakeRun) -> None:
    run = make_run()
    named = copied(run, "named", change=lambda row: {**row, "image_sha256": "a" * 64})
    half = copied(
        named, "half", change=lambda row: {**row, "image_sha256": ("a" if row["label"] == "COVID" else "b") * 64}
    )
    assert compare_runs(named, half).counts["same_name_other_bytes"] == 6
    none = copied(named, "none", change=lambda row: {**row, "image_sha256": "c" * 64})
    with pytest.raises(UnusableData, match="12 have the same name but other bytes"):
        compare_runs(named, none)


def test_runs_on_other_images_are_exit_2(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    other = copied(run, "other", change=lambda row: {**row, "image_path": f"x/{row['image_path']}"})
    result = diffva("compare", run.store.uri, other.store.uri)
    assert result.exit_code == 2
    assert "no finished image in common" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (Path(run.store.uri).parent / "compare-run-other").exists()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    for wrong in (tmp_path / "nowhere", tmp_path / "damaged", "gopher://hole"):
        result = diffva("compare", run.store.uri, wrong)
        assert (result.exit_code, len(result.stderr.strip().splitlines())) == (2, 1), result.exception


def test_a_sweep_is_joined_point_by_point_or_refused(make_run: MakeRun) -> None:
    run = make_run()

    def doubled(run: Run, name: str) -> Run:
        sweep = {"sweep": [["strength", [0.3, 0.6]]]}
        other = copied(run, name, sweep)
        for part in (Path(other.store.uri) / "records").iterdir():
            rows = pq.read_table(part).to_pylist()
            again = [{**row, "strength": 0.3, "record_id": f"{row['record_id'][:-1]}x"} for row in rows]
            pq.write_table(pa.Table.from_pylist(rows + again, schema=pq.read_schema(part)), part)
        return other

    swept = doubled(run, "swept")
    assert compare_runs(swept, doubled(run, "swept-too")).counts["pairs"] == 24
    with pytest.raises(UnusableData, match="alone sweeps strength"):
        compare_runs(run, swept)


def test_metrics_that_one_run_lacks_are_left_out(make_run: MakeRun) -> None:
    run = make_run()
    other = copied(run, "unjudged", change=lambda row: {**row, "judge_image": None, "judge_counterfactual": None})
    measures = {row["measure"] for row in compare_runs(run, other).rows}
    assert "flip_rate" not in measures
    assert "dice_fixed" not in measures  # neither has a threshold from other images
    for each in (run, other):
        row = {"map": "positive", "label": "all", "threshold": 0.05, "threshold_from": "validation"}
        each.store.put(
            "tables/metrics.json",
            json.dumps({"records": dict.fromkeys(("planned", "ok", "quarantined"), 0), "localization": [row]}).encode(),
        )
    assert "dice_fixed" in {row["measure"] for row in compare_runs(run, other).rows}


def test_run_names_are_as_short_as_possible() -> None:
    assert run_names("/a/one/", "/a/two") == ("one", "two")
    assert run_names("/a/one/run", "s3://b/two/run") == ("one/run", "two/run")
    assert run_names("/a/run", "/a/run") == ("run", "run")
    assert [setting_text(value) for value in (None, "", "ab" * 32, 0.5)] == ["–", "(empty)", "abababababab", "0.5"]


@pytest.fixture
def comparison(make_run: MakeRun, hostile: str) -> Comparison:
    run = make_run(prompt=hostile, labels=(hostile.replace("/", ""), "$x_"))
    return compare_runs(run, with_perfect_maps(copied(run, "better & <b>bolder", {"prompt": f"{hostile} again"})))


def test_the_page_is_complete_and_hostile_names_are_text(comparison: Comparison, hostile: str, tmp_path: Path) -> None:
    before = snapshot(comparison.a, comparison.b)
    store = output_store(comparison.a, comparison.b, str(tmp_path / "page"))
    html = Path(write_comparison(comparison, store)).read_text()
    page = Page(html)
    assert snapshot(comparison.a, comparison.b) == before
    assert "script" not in page.tags
    assert "<script>alert" not in html
    assert "<b>bolder" not in html
    assert "better & <b>bolder" in page.text
    assert f"{hostile} again" in page.text
    for link in page.links:
        assert f'id="{link[1:]}"' in html if link.startswith("#") else (tmp_path / "page" / link).is_file(), link
    assert all(picture["alt"] for picture in page.pictures)
    assert page.tags.count("img") == 3 + 1
    assert not re.search(r"(https?:)?//[a-z]", html)
    digest = base64.b64encode(hashlib.sha256(page.blocks["style"][0].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in page.policy
    assert "default-src 'none'" in page.policy
    assert "unsafe" not in page.policy
    sheets = [Image.open(tmp_path / "page" / "images" / f"examples-{n}.png") for n in range(3)]
    assert sheets[0].height > sheets[1].height == sheets[2].height  # six images, then three and three


def test_metrics_are_json_for_scripts(comparison: Comparison, tmp_path: Path) -> None:
    write_comparison(comparison, LocalStore(str(tmp_path / "page")))
    metrics = json.loads((tmp_path / "page" / "metrics.json").read_text())
    assert metrics["images"]["pairs"] == 12
    row = next(row for row in metrics["differences"] if row["measure"] == "auroc" and row["label"] == "all")
    assert row["b"] == 1
    assert row["better"] == "b"
    assert [setting["setting"] for setting in metrics["settings"]] == ["prompt"]


def test_writing_again_replaces_old_pictures_and_nothing_else(comparison: Comparison, tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "page"))
    store.put("images/examples-2.png", b"of an earlier page")
    store.put("images/mine.png", b"somebody's own")
    first = Path(write_comparison(comparison, store)).read_text()
    assert store.read("images/examples-2.png") != b"of an earlier page"
    assert store.exists("images/mine.png")
    assert Path(write_comparison(comparison, store)).read_text() == first


def test_each_image_is_shown_once_from_most_to_least(comparison: Comparison) -> None:
    measure = ranking(comparison)
    assert measure.key == "auroc"
    groups = chosen(comparison, measure)
    assert [len(images) for _, images in groups] == [6, 3, 3]
    order = [image for _, images in groups for image in images]
    gaps = (comparison.pairs["auroc_b"] - comparison.pairs["auroc_a"]).abs()
    assert sorted(order) == list(range(12))
    assert gaps[order].is_monotonic_decreasing
    few = replace(comparison, pairs=comparison.pairs.iloc[:4])
    assert [len(images) for _, images in chosen(few, measure)] == [4]


def test_images_that_have_gone_leave_numbers_and_a_page_without_pictures(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    other = copied(run, "other")
    shutil.rmtree(run.about["data_root"])
    comparison = compare_runs(run, other)
    assert "auroc" not in {row["measure"] for row in comparison.rows}
    assert ranking(comparison).key == "confidence_gain"
    assert any("not opened" in note for note in comparison.notes)
    page = Page(Path(write_comparison(comparison, LocalStore(str(tmp_path / "page")))).read_text())
    assert page.tags.count("img") == 1


def test_one_image_has_no_interval_and_still_a_page(comparison: Comparison, tmp_path: Path) -> None:
    pairs = comparison.pairs.iloc[:1]
    one = replace(comparison, pairs=pairs, rows=difference_rows(pairs))
    text = Page(Path(write_comparison(one, LocalStore(str(tmp_path / "page")))).read_text()).text
    assert "no interval" in text
    console = Console(width=160, record=True)
    print_comparison(one, console)
    assert "better & <b>bolder" in console.export_text()


def test_the_page_goes_beside_run_a_and_never_into_a_run(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    other = copied(run, "other")
    result = diffva("compare", run.store.uri, other.store.uri)
    assert result.exit_code == 0, result.output
    assert "12 images in both runs, 0 in A only, 0 in B only" in result.output
    assert (tmp_path / "compare-run-other" / "index.html").is_file()
    link = tmp_path / "link"
    link.symlink_to(other.store.uri)
    for out in (run.store.uri, f"{other.store.uri}/page", link / "page"):
        refused = diffva("compare", run.store.uri, other.store.uri, "--out", out)
        assert (refused.exit_code, "--out" in refused.stderr) == (2, True)
    remote = replace(run, store=LocalStore(str(tmp_path)))
    remote.store.uri = "s3://bucket/run"
    with pytest.raises(UnusableData, match="--out is needed"):
        output_store(remote, other, None)
