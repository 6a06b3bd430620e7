from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from html_page import Page

from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.encoding import encode_grey
from diffva_ray.evaluate.records import read_records
from diffva_ray.evaluate.report.catalogue import read_earlier, scripted, unscripted
from diffva_ray.evaluate.report.charts import charts
from diffva_ray.evaluate.report.images import max_listed, sample, shares
from diffva_ray.evaluate.report.numbers import cards, glance, wilson
from diffva_ray.evaluate.report.page import whole, write_report
from diffva_ray.evaluate.report.result_tables import report_tables
from diffva_ray.generate.committed import parts, start_retry
from diffva_ray.generate.run import Run
from diffva_ray.schema import RECORDS

MakeRun = Callable[..., Run]
PHANTOM_WARNING = "trained on phantoms and has not learned real images"

PLACE = {
    "n": 10, "auprc": 0.6, "dice_best": 0.7, "iou_best": 0.5, "pointing_game": 1.0, "energy_in_truth": 0.4,
    "auroc_interval": [0.8, 0.95], "region": "lungs",
}  # fmt: skip
BETTER = {"baseline": "brightness", "minus_baseline": 0.268, "minus_baseline_interval": [0.2, 0.3]}
BESIDE = "+0.268 (0.200 to 0.300) against the best baseline, brightness"
METRICS: dict[str, Any] = {
    "records": {"planned": 12, "ok": 12, "quarantined": 0},
    "localization": [
        {**PLACE, "label": label, "map": name, "auroc": auroc, "threshold": 0.04, "threshold_from": "validation",
         "dice_fixed": 0.66, **(BETTER if name == "positive" else {})}
        for label in ("COVID", "all") for name, auroc in (("positive", 0.91), ("brightness", 0.642))
    ],
    "validity": [{"label": "all", "n": 9, "flip_rate": 0.875, "called_healthy_before": 0.1, "confidence_gain": -0.2}],
    "ground_truth": [{"label": "all", "n": 12, "psnr": 30.0, "ssim": 0.9, "psnr_input": None,
                      "lesion_error_ratio": 0.48}],
    "ssim": [{"label": "all", "n": 12, "ssim": 0.923, "ssim_sd": 0.01, "ms_ssim": 0.98, "ms_ssim_scales": 3,
              "psnr": 29.0, "l1": 0.02, "attribution_energy": 0.01, "preset": "wang", "grid": 16}],
    "fid": [{"set1": "COVID (source)", "set2": "COVID (counterfactual)", "n1": 6, "n2": 6, "value": 0.017,
             "extractor": "stand-in-random-conv-64", "is_stand_in": True, "weights_sha256": "ab" * 32,
             "resize": "antialiased-64", "interval": [0.01, 0.02], "n_matched": {"n": 6, "mean": 0.017, "sd": 0.0},
             "kid": {"value": -0.01, "standard_error": 0.006}}],
    "notes": ["a note of the reduce step"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take seconds to draw and have tests of their own; here they are blank where there would be one."""

    def write(run: Run, records: pd.DataFrame) -> list[str]:
        paths = ["figures/grid.png", "figures/distributions.png"] if len(records) else []
        for path in paths:
            run.store.put(path, encode_grey(np.zeros((2, 2), np.uint8)))
        return paths

    monkeypatch.setattr("diffva_ray.evaluate.report.page.write_figures", write)


def written(run: Run) -> tuple[str, Page]:
    html = Path(write_report(run)).read_text()
    return html, Page(html)


def beside(run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The index of the viewer (its first file) and all details."""
    files = sorted((Path(run.store.uri) / "report" / "data").iterdir())
    index = unscripted(next(file for file in files if file.name == "index-000.js").read_bytes())
    return index, [row for file in files if file.name.startswith("details") for row in unscripted(file.read_bytes())]


def flat(page: Page) -> str:
    return " ".join(page.text.split())


def test_the_page_of_a_finished_run(make_run: MakeRun) -> None:
    run = make_run()
    run.store.put("tables/metrics.json", json.dumps(METRICS).encode())
    run.store.put("_SUCCESS", b"{}")
    html, page = written(run)
    text = flat(page)
    for said in ("87.5 %", "0.910", BESIDE, "0.660", "48.0 %", "0.923", "−0.0100 ± 0.0060",
                 "a note of the reduce step", "not FID", "3 of 5 scales", "Not for clinical use"):  # fmt: skip
        assert said in text, said
    assert 'class="ours"' in html
    assert PHANTOM_WARNING not in text
    assert "Unfinished" not in text
    listed = len(list((Path(run.store.uri) / "report" / "images").iterdir()))
    assert listed >= 2 * 12  # a strip and a map of every record


def test_everything_the_page_names_is_beside_it(make_run: MakeRun) -> None:
    run = make_run()
    html, page = written(run)
    folder = Path(run.store.uri) / "report"
    for link in page.links:
        assert link.startswith("#") or (folder / unescape(link)).is_file(), link
    for link in page.links:
        assert not link.startswith("#") or link.startswith("#record=") or f'id="{link[1:]}"' in html, link
    assert not re.search(r"(https?:)?//[a-z]", html.replace("http://www.w3.org/2000/svg", ""))  # a name, not an address
    assert "@import" not in html
    assert set(re.findall(r"url\([^)]*\)", html)) == {'url("#greys")'}  # a filter of the page itself
    assert not {"iframe", "object", "embed", "link"} & set(page.tags)
    for picture in page.pictures:
        assert "alt" in picture  # "" says decoration, or a second picture of what has been named
        assert picture.get("loading") == "lazy" or not picture.get("src")


def test_the_policy_allows_the_pages_own_blocks_and_nothing_else(make_run: MakeRun) -> None:
    _, page = written(make_run())
    assert "default-src 'none'" in page.policy
    assert "unsafe" not in page.policy
    for kind in ("script", "style"):
        assert len(page.blocks[kind]) == 1
        digest = base64.b64encode(hashlib.sha256(page.blocks[kind][0].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in page.policy
    assert "'strict-dynamic'" in page.policy  # files of records, for that script alone


def test_hostile_names_are_text(make_run: MakeRun, hostile: str) -> None:
    run = make_run(prompt=hostile, bad={"05.png": f"broken {hostile}"}, labels=(hostile.replace("/", ""), "B"))
    html, page = written(run)
    assert page.tags.count("script") == 1
    assert "<script>alert" not in html
    assert f"broken {hostile}" in page.text
    assert f"“{hostile}”" in page.text
    for file in (Path(run.store.uri) / "report" / "data").iterdir():
        assert file.read_bytes().isascii()
    _, details = beside(run)
    assert {row["prompt"] for row in details} == {hostile}


def test_an_unfinished_run_says_how_far_it_is(make_run: MakeRun) -> None:
    _, page = written(make_run(shards=1))
    assert "Unfinished: 4 of 12 planned records are done" in flat(page)
    assert "progress" in page.tags
    assert page.pictures


def test_a_run_without_any_record_has_a_page(make_run: MakeRun) -> None:
    _, page = written(make_run(shards=0))
    assert "0 of 12 planned records" in flat(page)
    assert not page.pictures


def test_a_run_without_tables_says_how_to_get_them(make_run: MakeRun) -> None:
    run = make_run()
    _, page = written(run)
    assert f"diffva reduce {run.store.uri}" in page.text
    assert "table" not in page.tags


@pytest.mark.parametrize(
    "damage",
    [{"records": 7}, {"records": {}}, {"fid": 7}, {"ssim": {}}, {"localization": [7]}, {"judge": []}, {"notes": 7}],
    ids=json.dumps,
)
def test_damaged_tables_count_as_missing(make_run: MakeRun, damage: dict[str, object]) -> None:
    run = make_run()
    run.store.put("tables/metrics.json", json.dumps({**METRICS, **damage}).encode())
    assert f"diffva reduce {run.store.uri}" in written(run)[1].text


def test_tables_of_other_records_are_called_out(make_run: MakeRun) -> None:
    run = make_run(shards=1)
    run.store.put("tables/metrics.json", json.dumps(METRICS).encode())
    assert "The tables are of 12 records; 4 are ok now." in flat(written(run)[1])


def test_quarantined_records_are_listed_with_their_reasons(make_run: MakeRun) -> None:
    _, page = written(make_run(bad={"05.png": "truncated PNG: its end mark is missing"}))
    assert "truncated PNG: its end mark is missing" in page.text
    assert "Lung_Opacity/images/05.png" in page.text
    assert "ok of 12 planned, 1 quarantined" in flat(page)


@pytest.mark.parametrize(
    ("trained_on", "data_kind", "warned"),
    [("phantoms", "radiography", True), ("phantoms", "phantoms", False), ("radiography", "radiography", False)],
)
def test_a_phantom_model_on_real_images_is_warned_of(
    make_run: MakeRun, trained_on: str, data_kind: str, warned: bool
) -> None:
    _, page = written(make_run(trained_on=trained_on, data_kind=data_kind))
    assert (PHANTOM_WARNING in page.text) is warned


def test_writing_again_replaces_what_an_earlier_page_had(make_run: MakeRun) -> None:
    run = make_run()
    for gone in ("report/images/gone.png", "report/data/details-0099.js"):
        run.store.put(gone, scripted([]))
    first, _ = written(run)
    assert not run.store.exists("report/images/gone.png")
    assert not run.store.exists("report/data/details-0099.js")
    assert written(run)[0] == first


def test_the_files_of_an_image_are_found_by_its_name(make_run: MakeRun) -> None:
    """Every record is in the table, quarantined ones too; the paths are those of files of the run."""
    run = make_run(bad={"05.png": "truncated PNG"})
    html, _ = written(run)
    assert 'href="files.csv"' in html
    table = pd.read_csv(io.BytesIO(run.store.read("report/files.csv"))).set_index("image_path")
    assert len(table) == run.about["records"]
    assert list(table.index) == sorted(table.index)
    row = table[(table["status"] == "ok") & (table["label"] == "Lung_Opacity")].iloc[0]
    assert row.name.startswith("Lung_Opacity/images/")
    for column in ("counterfactual_path", "attribution_path", "reconstruction_path"):
        assert run.store.exists(row[column])
    assert table.loc["Lung_Opacity/images/05.png", "status"] == "bad_image"


def test_pictures_are_made_once(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(shards=2)
    written(run)
    before = read_earlier(run)
    assert len(before.panels) == 8
    made: list[str] = []
    put = type(run.store).put

    def watched(store: Any, path: str, data: bytes) -> None:
        made.append(path)
        put(store, path, data)

    monkeypatch.setattr(type(run.store), "put", watched)
    written(run)
    assert not [path for path in made if path.startswith("report/images")]
    assert read_earlier(run) == before


def test_an_unreadable_earlier_report_is_no_matter(make_run: MakeRun) -> None:
    run = make_run()
    run.store.put("report/data/index-000.js", b"of something else")
    assert not read_earlier(run).panels
    written(run)
    assert len(read_earlier(run).panels) == 12


def test_images_that_have_gone_are_counted(make_run: MakeRun) -> None:
    run = make_run()
    for file in (Path(run.about["data_root"]) / "COVID" / "images").iterdir():
        file.unlink()
    _, page = written(run)
    assert ". 6 are not shown: their files can no longer be read." in flat(page)


def test_the_sample_is_even_over_classes_and_spans_the_scores(make_run: MakeRun) -> None:
    records = read_records(make_run())
    chosen = sample(records, 6)
    assert sorted(row["label"] for row in chosen) == ["COVID"] * 3 + ["Lung_Opacity"] * 3
    scores = records.loc[records["label"] == "COVID", "ssim"]
    assert {scores.min(), scores.max()} <= {row["ssim"] for row in chosen}
    order = records["record_id"].tolist()
    assert [row["record_id"] for row in chosen] == sorted((row["record_id"] for row in chosen), key=order.index)
    assert len(sample(records, 200)) == 12


def test_boxes_given_to_the_report_are_outlined_and_scored(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    for name in ("00", "02"):
        (Path(run.about["data_root"]) / f"COVID/lesions/{name}.png").unlink()
    (tmp_path / "boxes.csv").write_text("file,x,y,w,h\nCOVID/images/00.png,2,2,4,4\n")
    write_report(run, boxes=str(tmp_path / "boxes.csv"))
    found = {row["image_path"]: row for row in beside(run)[1]}
    boxed, unknown = found["COVID/images/00.png"], found["COVID/images/02.png"]
    assert boxed["lesion"].startswith("M")
    assert 0 <= boxed["auroc"] <= 1
    assert (unknown["lesion"], unknown["auroc"]) == ("", None)
    (tmp_path / "boxes.csv").write_text("file,x,y,w,h\nelsewhere.png,2,2,4,4\n")
    with pytest.raises(UnusableData, match="none of its files is an image of"):
        write_report(run, boxes=str(tmp_path / "boxes.csv"))


def test_of_the_records_that_are_not_shown_no_more_than_a_part_is_held(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ten million records, all columns would take many GB."""
    run, read = make_run(), list[weakref.ref[pa.Table]]()

    def watched(run: Run, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        for number, table in parts(run, columns):
            assert sum(earlier() is not None for earlier in read) <= 1  # which the loop has not let go of yet
            read.append(weakref.ref(table))
            yield number, table

    monkeypatch.setattr("diffva_ray.evaluate.report.page.parts", watched)
    records = read_records(run)
    ids = set(records["record_id"][[1, 2, 11]])
    assert [row["record_id"] for row in whole(run, ids)] == records["record_id"][[1, 2, 11]].tolist()
    assert len(read) == 3
    assert whole(run, set()) == []


def test_a_sample_is_said(make_run: MakeRun) -> None:
    run = make_run()
    text = flat(Page(Path(write_report(run, listed=4)).read_text()))
    assert "A sample: " in text
    assert "of 12 finished records" in text
    assert max_listed(64) == 20_000
    assert max_listed(512) == max_listed(2048) < 5_000


def test_shares_pass_on_what_small_classes_leave() -> None:
    assert shares({"a": 2, "b": 100, "c": 100}, 50) == {"a": 2, "b": 24, "c": 24}
    assert shares({"a": 1, "b": 1}, 50) == {"a": 1, "b": 1}
    assert shares({}, 50) == {}


def test_only_cards_and_tables_that_apply() -> None:
    done = {"planned": 3, "ok": 3, "quarantined": 0}
    assert [card.title for card in cards(None, done)] == ["Records"]
    only = {"ssim": METRICS["ssim"]}
    assert [card.title for card in cards(only, done)] == ["Records", "SSIM, mean"]
    assert [table.key for table in report_tables(only)] == ["ssim"]
    localization = report_tables(METRICS)[0]
    assert [group.title for group in localization.groups] == ["all classes, n = 10", "COVID, n = 10"]
    assert [cell.text for cell in localization.groups[0].rows[0][1] if cell.best][:1] == ["0.910"]


def test_zones_lpips_and_distances_class_by_class_have_their_tables() -> None:
    set_row = {"conditions": "COVID, Lung_Opacity", "n1": 9, "n2": 12, "within": 0.045, "pooled": 0.033}
    metrics = {
        "ssim": [{**METRICS["ssim"][0], "lpips": 0.1234, "lpips_interval": [0.11, 0.14], "lpips_n": 7}],
        "brixia": [
            {"map": name, "n": 72, "spearman": rank, "spearman_interval": [-0.2, 0.5], "spearman_within_image": None,
             "n_within": 0, "lungs": "mask 10, found 2"}
            for name, rank in (("positive under strength 0.4", 0.31), ("brightness", -0.1))
        ],
        "fid_within": [{"set1": "images", "set2": "counterfactuals", "extractor": "stand-in", **set_row}],
    }  # fmt: skip
    found = {table.key: table for table in report_tables(metrics)}
    assert list(found) == ["brixia", "fid-within", "ssim"]
    texts = {
        key: [[cell.text for cell in cells] for group in table.groups for _, cells in group.rows]
        for key, table in found.items()
    }
    heads = [head for head, _ in found["brixia"].heads]
    assert heads == ["map", "n", "Spearman, all zones", "95% interval", "n within"]
    assert texts["brixia"][1] == ["baseline: brightness", "72", "−0.100", "−0.200 to 0.500", "0"]
    assert [kind for kind, _ in found["brixia"].groups[0].rows] == ["ours", ""]
    assert found["brixia"].groups[0].rows[0][1][0].text.startswith("ours, max(M, 0)")
    assert "mask 10, found 2" in found["brixia"].caption
    assert texts["fid-within"] == [["images", "counterfactuals", "9", "12", "0.045", "0.033"]]
    assert "COVID, Lung Opacity" in found["fid-within"].caption
    at = [head for head, _ in found["ssim"].heads].index("LPIPS")
    assert texts["ssim"][0][at : at + 3] == ["0.123", "0.110 to 0.140", "7"]


def test_what_the_run_found_in_sentences() -> None:
    assert glance(None) == []
    said = " ".join(glance(METRICS))
    for part in (
        "Of 9 images",
        "87.5 %",
        "AUROC of 0.910",
        "0.910; +0.268 (0.200 to 0.300) against the best baseline, brightness",
        "48.0 %",
    ):
        assert part in said
    low, high = wilson(0.875, 8)
    assert (round(low, 3), round(high, 3)) == (0.529, 0.978)  # of the binomial with 7 of 8, after Wilson
    assert wilson(1, 10)[1] == pytest.approx(1)
    assert wilson(0, 10)[0] == pytest.approx(0)


def test_charts_are_of_all_finished_records(make_run: MakeRun) -> None:
    drawn = charts(read_records(make_run(bad={"05.png": "broken"})))
    assert [chart.key for chart in drawn] == ["ssim", "attribution_energy", "judge_counterfactual"]
    assert [line.n for line in drawn[0].lines] == ["6", "5"]
    for line in drawn[0].lines:
        assert drawn[0].left <= drawn[0].ticks[0][0] <= drawn[0].right
        assert line.low <= line.median <= line.high
    assert "COVID median 0." in drawn[0].description


@pytest.mark.parametrize("spread", [0.5, 0.02, 0.004, 0.0007])
def test_the_ticks_of_a_chart_are_told_apart(make_run: MakeRun, spread: float) -> None:
    records = read_records(make_run())
    records["attribution_energy"] = np.linspace(0, spread, len(records))
    ticks = [text for _, text in charts(records)[1].ticks]
    assert len(set(ticks)) == len(ticks) > 1
    assert [float(text) for text in ticks] == sorted(map(float, ticks))


def test_there_is_no_chart_without_its_numbers(make_run: MakeRun) -> None:
    records = read_records(make_run(judged=False))
    assert [chart.key for chart in charts(records)] == ["ssim", "attribution_energy"]
    assert charts(records.head(0)) == []


def test_every_try_of_a_retried_record_is_told(make_run: MakeRun) -> None:
    run = make_run(bad={"05.png": "truncated PNG"})
    retry = start_retry(run)
    assert retry is not None
    rows = [{**row, "status": "missing", "error": "the image has gone"} for row in retry.planned(0)]
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist([{name: row.get(name) for name in RECORDS.names} for row in rows], schema=RECORDS), sink
    )
    retry.store.put("records/part-00000.parquet", sink.getvalue())
    _, page = written(run)
    assert "1 record was retried; 0 of them are ok now" in flat(page)
    index, details = beside(run)
    assert sum(index["retried"]) == 1
    told = next(row["attempts"] for row in details if row["attempts"])
    assert [(one["try"], one["status"], one["error"]) for one in told] == [
        ("first", "bad_image", "truncated PNG"),
        ("retry 1", "missing", "the image has gone"),
    ]


def test_equal_values_have_no_best() -> None:
    rows = [{**METRICS["localization"][0], "map": name, "auroc": auroc, "pointing_game": 0.0}
            for name, auroc in (("positive", 0.7), ("brightness", 0.6))]  # fmt: skip
    ours, brightness = (cells for _, cells in report_tables({"localization": rows})[0].groups[0].rows)
    assert [cell.text for cell in ours if cell.best] == ["0.700"]
    assert not [cell for cell in brightness if cell.best]
