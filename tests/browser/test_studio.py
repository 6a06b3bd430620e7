"""The studio as a radiologist uses it: open, ask, paint, compare, judge, read again; and a reader's study."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from dicom_files import dicom
from PIL import Image

from diffva_ray.cli import main
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.phantoms import phantom_set
from diffva_ray.storage.local import LocalStore

pytest.importorskip("gradio", reason="STUDIO TESTS SKIPPED: pip install 'diffva-ray[studio]'")
pytestmark = pytest.mark.browser
WIDTHS = ((1280, 900), (390, 844))
IMAGES = ".reply img:not([alt=''])"  # without the image under a swipe, which has no name
SHOTS = os.environ.get("STUDIO_SHOTS")  # a folder for screenshots, to be looked at


@contextlib.contextmanager
def served(*arguments: object) -> Iterator[str]:
    """The address of a ``diffva studio`` in a process of its own, which ends as by Ctrl-C."""
    command = [sys.executable, "-u", "-m", "diffva_ray", "studio", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        lines = list[str]()
        assert process.stdout is not None
        while not (lines and lines[-1].startswith("open http")):
            line = process.stdout.readline()
            assert line, lines
            lines.append(line)
        yield lines[-1].split()[1]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            rest = process.communicate(timeout=60)[0]
        finally:
            process.kill()
    assert process.returncode == 0, rest
    assert "Traceback" not in rest, rest


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom with a finding, 128 px."""
    folder = tmp_path_factory.mktemp("scans")
    for _ in phantom_set(LocalStore(str(folder)), 8, 128, seed=5):
        pass
    return sorted((folder / "COVID" / "images").iterdir())[0]


@pytest.fixture
def look(chromium: Any) -> Iterator[Callable[..., Any]]:
    """``look(uri, width=, height=)`` opens a page; no page may have had an error or asked another host for anything."""
    contexts, problems, requests, origins = [], list[str](), list[str](), set[str]()

    def open_page(uri: str, width: int = 1280, height: int = 900) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        origins.add(uri)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(uri)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems
    assert requests
    outside = [url for url in requests if not url.startswith((*origins, "data:", "blob:"))]
    assert not outside


def shot(page: Any, name: str, full_page: bool = True) -> None:
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{SHOTS}/{name}-{page.viewport_size['width']}.png", full_page=full_page)


def opened(page: Any, scan: Path) -> None:
    page.get_by_role("button", name="Generate").wait_for()
    page.set_input_files("input[type=file]", str(scan))
    page.get_by_text(f"{scan.name} is open.").wait_for()


def asked(page: Any, prompts: int = 1) -> None:
    page.get_by_role("button", name="Generate").click()
    page.get_by_text(re.compile("^Done")).wait_for()
    page.locator(".reply").nth(prompts - 1).wait_for()
    assert page.locator(".reply").count() == prompts


def painted(page: Any) -> None:
    """Paint a stroke into the middle of the image."""
    canvas = page.locator("canvas").first
    canvas.wait_for()
    canvas.scroll_into_view_if_needed()
    page.get_by_label(re.compile("^(Brush|Draw|brush|draw)")).first.click()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.4
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 15, y + 40, steps=6)
    page.mouse.up()
    page.wait_for_timeout(800)  # the editor sends its layers a moment later


@pytest.mark.parametrize(("width", "height"), WIDTHS)
def test_ten_minutes_of_a_radiologist(
    width: int, height: int, look: Callable[..., Any], scan: Path, tmp_path: Path
) -> None:
    out = tmp_path / "studio"
    with served("--model", "small", "--out", out) as uri:
        page = look(uri, width, height)
        page.get_by_role("button", name="Generate").wait_for()
        assert page.get_by_text("Not for clinical use").is_visible()
        shot(page, "start")
        opened(page, scan)
        asked(page)
        alt = page.locator(IMAGES).evaluate_all("all => all.map(image => image.alt)")
        assert [text.split(" ")[0] for text in alt] == ["The", "Counterfactual", "Attribution"]
        assert page.evaluate("document.documentElement.scrollWidth") <= width

        # Swipe with the keyboard, enlarge and go back.
        swipe = page.get_by_role("slider", name="Swipe from the counterfactual to the image")
        swipe.focus()
        for _ in range(30):
            page.keyboard.press("ArrowRight")
        clip = "getComputedStyle(document.querySelector('.swipe img + img')).clipPath"
        assert page.evaluate(clip) == "inset(0px 0px 0px 30%)"
        shot(page, "swipe")
        page.get_by_role("button", name="Enlarge: counterfactual").press("Enter")
        page.wait_for_function("document.fullscreenElement?.tagName == 'FIGURE'")
        wide = page.evaluate("document.querySelector('.swipe img').clientWidth")
        assert wide > 0.75 * min(width, height)
        page.get_by_role("slider", name="Zoom").press("End")
        assert page.evaluate("document.querySelector('.swipe img').clientWidth") == pytest.approx(6 * wide, rel=0.02)
        assert page.evaluate("document.fullscreenElement.scrollWidth") > width
        shot(page, "enlarged", full_page=False)
        page.get_by_role("button", name="Enlarge: counterfactual").press("Enter")
        page.wait_for_function("document.fullscreenElement == null")

        # A second prompt with an unknown word, compared.
        page.get_by_label(re.compile("^Second prompt")).fill("Effusion wombat")
        page.keyboard.press("Tab")
        page.get_by_text("words unknown to this model (wombat)").wait_for()
        asked(page, 2)
        shot(page, "two-prompts")
        clipped = (
            "[...document.querySelectorAll('[role=status], [role=note]')]"
            ".filter(e => e.clientWidth > 1 && e.scrollWidth > e.clientWidth)"  # 1 px: for screen readers alone
        )
        assert not page.evaluate(f"{clipped}.map(e => e.textContent)")

        # Threshold and opacity change the overlay alone.
        before = page.locator(IMAGES).evaluate_all("all => all.map(image => image.src)")
        page.get_by_role("spinbutton", name=re.compile("Threshold")).first.fill("0.01")
        page.keyboard.press("Tab")
        changed = f'old => document.querySelectorAll("{IMAGES}")[2].src != old'
        page.wait_for_function(changed, arg=before[2])
        after = page.locator(IMAGES).evaluate_all("all => all.map(image => image.src)")
        assert before[:2] == after[:2]

        # A painted region, and a verdict with it.
        page.get_by_label(re.compile("^Second prompt")).fill("(none)")
        page.keyboard.press("Tab")
        page.get_by_role("checkbox", name=re.compile("Change only")).check()
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("choose the region that may change").wait_for()
        shot(page, "problem")
        painted(page)
        asked(page)
        assert page.get_by_text("region only").is_visible()
        shot(page, "region")
        page.get_by_text("Is the answer right?").click()
        page.get_by_label("rejected").check()
        page.get_by_label("What the image shows").fill("Lung_Opacity")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Save the verdict").click()
        page.get_by_text(re.compile("^Saved in")).wait_for()
        shot(page, "verdict")
        page.context.close()

    # What is on disk: runs with one record each, the verdict as a data set, and no upload beside them.
    runs = sorted((out / "runs").iterdir())
    assert len(runs) == 3
    records = pd.concat([pd.read_parquet(run / "records") for run in runs])
    assert set(records["status"]) == {"ok"}
    assert set(records["method"]) == {"instruct-pix2pix", "masked"}
    assert not list(out.glob(".uploads*"))
    (judged,) = open_dataset(str(out / "feedback" / "manifest.csv")).images
    assert judged.label == "Lung_Opacity"
    assert judged.lesion_mask

    # Tomorrow: two results are read again side by side, with their commands; a run's records, too.
    with served("--model", "small", "--out", out) as uri:
        page = look(uri, width, height)
        page.get_by_role("button", name="Generate").wait_for()
        for count in (1, 2):
            page.get_by_label("Earlier results").click()
            page.get_by_role("option").nth(count - 1).click()
            page.locator(".reply").nth(count - 1).wait_for()
        page.keyboard.press("Escape")
        assert page.get_by_text("region only").count() == 1
        page.get_by_text("Command that makes it again").first.click()
        assert "diffva generate --data" in page.locator("pre.command").first.inner_text()
        shot(page, "tomorrow")
        page.context.close()


def test_the_records_of_a_run_can_be_judged(
    look: Callable[..., Any], images: Path, model: Path, scan: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    line = f"generate --data {images} --model {model} --out {run} --executor inline"
    assert CliRunner().invoke(main, line.split()).exit_code == 0
    with served("--run", run, "--out", tmp_path / "studio") as uri:
        page = look(uri)
        page.get_by_role("button", name="Generate").wait_for()
        page.get_by_label("Earlier results").click()
        page.get_by_role("option").first.click()
        page.locator(".reply").wait_for()
        page.keyboard.press("Escape")
        page.get_by_text(" is open.").wait_for()  # so that it can be painted, and asked about again
        painted(page)
        page.get_by_text("Is the answer right?").click()
        page.get_by_label("accepted").check()
        page.get_by_label("What the image shows").fill("COVID")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Save the verdict").click()
        page.get_by_text(", with the region").wait_for()

        # A region that was painted in another image is not this answer's.
        page.get_by_label("Clear").first.click()
        opened(page, scan)
        painted(page)
        page.get_by_role("button", name="Save the verdict").click()
        page.get_by_text(re.compile("manifest.csv$")).wait_for()
        page.context.close()
    (judged,) = open_dataset(str(tmp_path / "studio" / "feedback" / "manifest.csv")).images
    assert judged.label == "COVID"
    assert not judged.lesion_mask


def test_files_that_are_no_images_and_dicom(look: Callable[..., Any], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (96, 96)).astype(np.uint16)
    (tmp_path / "scan.dcm").write_bytes(dicom(pixels, ViewPosition="PA"))
    (tmp_path / "hostile<img src=x onerror=alert(1)>.png").write_bytes(b"no image")
    with served("--model", "small", "--out", tmp_path / "studio") as uri:
        page = look(uri)
        page.on("dialog", lambda dialog: pytest.fail("a file name was executed"))
        page.get_by_role("button", name="Generate").wait_for()
        page.set_input_files("input[type=file]", str(next(tmp_path.glob("hostile*"))))
        page.get_by_role("alert").get_by_text("not an image").wait_for()
        page.get_by_label("Clear").first.click()
        opened(page, tmp_path / "scan.dcm")
        asked(page)
        page.context.close()


def test_the_keyboard_alone_is_enough(look: Callable[..., Any], scan: Path, tmp_path: Path) -> None:
    with served("--model", "small", "--out", tmp_path / "studio") as uri:
        page = look(uri)
        opened(page, scan)
        page.get_by_label("Or a region without the brush").fill("60 40 40 80")
        page.get_by_role("checkbox", name=re.compile("Change only")).press("Space")
        page.get_by_role("button", name="Generate").press("Enter")
        page.get_by_text("give left, top, right and bottom in percent").wait_for()
        page.get_by_label("Or a region without the brush").fill("20, 40, 45, 80 %")
        page.get_by_label("Prompt", exact=True).focus()
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent.trim()") == "Generate":
                break
        page.keyboard.press("Enter")
        page.locator(".reply").wait_for()
        assert page.get_by_text("region only").is_visible()
        unnamed = page.evaluate(
            "[...document.querySelectorAll('input:not([type=file]), button, textarea')].filter(e => e.offsetParent && "
            "!(e.ariaLabel || e.textContent.trim() || e.title || e.labels?.length)).map(e => e.outerHTML)"
        )
        assert not unnamed
        page.context.close()
    (region,) = (tmp_path / "studio" / "images").rglob("region.png")
    rows, columns = np.nonzero(np.asarray(Image.open(region)))
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [102, 205, 230, 410]  # of 512


def test_the_page_is_of_this_machine_and_loads_nothing_else(scan: Path, tmp_path: Path) -> None:
    with served("--model", "small", "--out", tmp_path / "studio") as uri:
        with urlopen(uri, timeout=30) as answer:
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
        with pytest.raises(HTTPError, match="400"):
            urlopen(Request(uri, headers={"Host": "evil.example"}), timeout=30)


@pytest.mark.parametrize(("width", "height"), WIDTHS)
def test_a_reader_answers_a_study(
    width: int, height: int, look: Callable[..., Any], images: Path, model: Path, tmp_path: Path
) -> None:
    run, study = tmp_path / "run", tmp_path / "study"
    for line in (
        f"generate --data {images} --model {model} --out {run} --executor inline",
        f"study {run} --images 10 --out {study}",
    ):
        assert CliRunner().invoke(main, line.split()).exit_code == 0
    with served("--study", study / "sheet") as uri:
        page = look(uri, width, height)
        name = page.get_by_label("Your name or initials")
        name.fill("anna/../b")
        shot(page, "study-start")
        page.get_by_role("button", name="Begin or continue").click()
        for item in range(1, 11):
            page.get_by_text(f"Image {item} of 10").wait_for()
            forward = page.get_by_role("button", name="Save and show the next")
            assert forward.is_disabled()
            assert page.get_by_text("marked region").count() == 0, "the region suggests the first answers"
            for group, answer in (("Is there", "yes"), ("Does it", "no"), ("Is the marked", "no finding")):
                page.get_by_role("radiogroup", name=re.compile(group)).or_(
                    page.locator("fieldset", has_text=re.compile(group))
                ).get_by_label(answer, exact=True).check()
            page.get_by_text(re.compile("marked region outlined in blue|no region is marked")).wait_for()
            shot(page, f"study-{item}") if item == 1 else None
            page.wait_for_function("!document.querySelector('button.primary:last-of-type').disabled || true")
            forward.click()
            if item == 4:  # stop, and continue under the same name
                page.get_by_text("Image 5 of 10").wait_for()
                page.reload()
                page.get_by_label("Your name or initials").fill("anna/../b")
                page.get_by_role("button", name="Begin or continue").click()
        page.get_by_text("Thank you").wait_for()
        shot(page, "study-end")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.context.close()
    (written,) = (study / "sheet").glob("answers-*.csv")
    answers = pd.read_csv(written, keep_default_na=False)
    assert answers["item"].tolist() == list(range(1, 11))
    assert set(answers["finding"]) == {"yes"}
    assert set(answers["region"]) == {""}
    assert (answers["seconds"] > 0).all()
    result = CliRunner().invoke(main, ["readers", str(study)])
    assert result.exit_code == 0, result.output
    assert json.loads((study / "tables" / "readers.json").read_text())["rows"]
