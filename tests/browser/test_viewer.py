"""The report as a reader uses it: in a browser, from disk, offline."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image
from synthetic import HOSTILE, HOSTILE_NAME, make_run

from diffva_ray.evaluate.report.page import write_report
from diffva_ray.evaluate.report.serve import ReportServer
from diffva_ray.storage.local import LocalStore

pytestmark = pytest.mark.browser
Visit = Callable[..., tuple[Any, Any]]
WIDTHS = ((1280, 900), (390, 844))


def shown(page: Any) -> int:
    """The number of records in the count."""
    return int(page.text_content("#count").split(" ")[0].replace("\u202f", ""))


def fine(page: Any) -> list[str]:
    """The last text line of the first rows, from the top."""
    return page.eval_on_selector_all(
        ".row", "rows => rows.sort((a, b) => a.getBoundingClientRect().top - b.getBoundingClientRect().top)"
        ".slice(0, 6).map(row => row.querySelector('.fine').textContent)"
    )  # fmt: skip


def selected(page: Any) -> str:
    return page.text_content("#image-path")


def test_filters_select_records(visit: Visit, page_uri: str) -> None:
    page, _ = visit(page_uri)
    everything = shown(page)
    assert everything == 60
    page.select_option("#label", "COVID")
    assert shown(page) == 20
    assert set(page.eval_on_selector_all(".row b", "all => all.map(b => b.textContent)")) == {"COVID"}
    page.fill("#text", "image-00003")
    assert shown(page) == 1
    assert selected(page) == "COVID/images/image-00003.png"
    page.fill("#text", "nothing is called this")
    assert page.is_visible("#nothing")
    page.click("#nothing-reset")
    assert shown(page) == everything
    assert page.input_value("#label") == ""


def test_the_score_range_narrows_and_shows_its_bounds(visit: Visit, page_uri: str) -> None:
    page, _ = visit(page_uri)
    page.select_option("#measure", "ssim")
    page.fill("#low", "500")
    assert 5 < shown(page) < 55
    low = float(page.text_content("#bounds").split(" to ")[0])
    assert all(float(line.removeprefix("SSIM ")) >= low - 1e-3 for line in fine(page))
    page.fill("#high", "100")  # stops at the other handle
    assert page.input_value("#high") == "500"


def test_sorting_by_a_score_both_ways(visit: Visit, page_uri: str) -> None:
    page, _ = visit(page_uri)
    page.select_option("#sort", "attribution_energy")
    up = [float(line.split(" ")[-1]) for line in fine(page) if line.startswith("map energy")]
    assert len(up) == 6
    assert up == sorted(up)
    page.click("#turn")
    down = [float(line.split(" ")[-1]) for line in fine(page)]
    assert down == sorted(down, reverse=True)
    assert down[0] > up[-1]
    assert "high to low" in page.get_attribute("#turn", "aria-label")


def test_the_divider_uncovers_the_counterfactual(visit: Visit, page_uri: str) -> None:
    page, _ = visit(page_uri)
    page.locator("#stage").scroll_into_view_if_needed()
    box = page.locator("#stage").bounding_box()
    page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 40)
    assert page.evaluate("document.getElementById('counterfactual').style.clipPath").startswith("inset(0px 0px 0px 2")
    page.focus("#divider")
    before = float(page.input_value("#divider"))
    page.keyboard.press("ArrowRight")
    assert float(page.input_value("#divider")) > before
    assert "image" in page.get_attribute("#divider", "aria-valuetext")


def test_views_and_the_opacity_of_the_map(visit: Visit, page_uri: str) -> None:
    page, _ = visit(page_uri)
    assert not page.is_visible("#heat")
    page.get_by_label("Map on image").check()
    assert page.is_visible("#heat")
    page.fill("#opacity", "30")
    assert page.evaluate("document.getElementById('heat').style.opacity") == "0.3"
    assert page.is_visible(".legend")
    page.wait_for_selector("#lesion-knob:not([hidden])")
    assert page.get_attribute("#lesion", "d").startswith("M")
    page.uncheck("#lesion-on")
    assert not page.is_visible("#lesion")
    page.get_by_label("Ground truth").check()
    assert page.is_visible("#truth")


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_marks_are_on_the_patients_sides(visit: Visit, page_uri: str, size: tuple[int, int], scheme: str) -> None:
    """R is on the left of a frontal image, L on the right, in every view and zoomed; a bar is 5 cm of the image. A
    lateral image and one of an unknown view have no sides."""
    page, _ = visit(page_uri, *size, color_scheme=scheme)

    def opened(label: str) -> None:
        if page.is_visible("#back"):
            page.click("#back")
        page.select_option("#label", label)
        page.locator(".row").first.click()
        page.wait_for_selector("#stage", state="visible")

    def on_their_sides() -> bool:
        boxes = [page.locator(name).bounding_box() for name in ("#right-side", "#left-side", "#stage")]
        right, left, stage = boxes
        middle, bottom = stage["x"] + stage["width"] / 2, stage["y"] + stage["height"]
        assert (page.text_content("#right-side"), page.text_content("#left-side")) == ("R", "L")
        assert all(stage["y"] <= mark["y"] <= bottom - mark["height"] for mark in (right, left))
        inside = stage["x"] <= right["x"] and left["x"] + left["width"] <= stage["x"] + stage["width"]
        return inside and right["x"] + right["width"] < middle < left["x"]

    opened("COVID")
    page.wait_for_selector("#right-side", state="visible")
    for view in ("Before / after", "Map on image", "Counterfactual", "Image"):
        page.get_by_label(view, exact=True).check()
        assert on_their_sides()
    page.click("#zoom-in")
    assert on_their_sides()
    ((start, end),) = re.findall(r"^M([\d.]+) .*H([\d.]+)$", page.get_attribute("#scale", "d"))
    assert float(end) - float(start) == pytest.approx(32 * 50 / 350, rel=1e-3)
    assert "PA" in page.text_content("#data")
    for label in ("Lung_Opacity", "Viral Pneumonia"):
        opened(label)
        page.wait_for_selector("#right-side", state="hidden")
        assert not page.is_visible("#left-side")
        assert not page.get_attribute("#scale", "d")
        assert not page.is_visible("#scale-length")


def test_images_are_loaded(visit: Visit, page_uri: str) -> None:
    page, _ = visit(page_uri)
    page.wait_for_function(
        "[...document.querySelectorAll('#image, .row img')].every(i => i.complete && i.naturalWidth)"
    )
    assert page.evaluate("document.getElementById('image').naturalWidth") == 3 * 32


def places(page: Any) -> list[tuple[float, ...]]:
    """Screen rectangles of image, counterfactual, map and outlines."""
    page.get_by_label("Before / after").check()
    rectangles = (
        "['image', 'counterfactual', 'heat', 'outlines'].map(id => { const e = document.getElementById(id); "
        "const h = e.hidden; e.hidden = false; const b = e.getBoundingClientRect(); e.hidden = h; "
        "return [b.x, b.y, b.width, b.height]; })"
    )
    return [tuple(round(number, 1) for number in place) for place in page.evaluate(rectangles)]


def percent(page: Any, selector: str) -> int:
    return int(page.text_content(selector).split(" ")[0])


def test_zoom_keeps_image_counterfactual_map_and_outlines_registered(visit: Visit, page_uri: str) -> None:
    page, _ = visit(page_uri)
    page.locator("#stage").scroll_into_view_if_needed()
    stage = page.locator("#stage").bounding_box()
    middle = stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2
    assert set(places(page)) == {tuple(round(stage[key], 1) for key in ("x", "y", "width", "height"))}
    page.click("#zoom-in")
    page.keyboard.press("+")
    assert percent(page, "#zoom-value") == 225
    [place] = set(places(page))
    assert place[2] == pytest.approx(2.25 * stage["width"], abs=1)
    page.mouse.move(middle[0] + 80, middle[1])
    page.mouse.down()
    page.mouse.move(middle[0] + 130, middle[1] + 40, steps=4)
    page.mouse.up()
    [moved] = set(places(page))
    assert (moved[0] - place[0], moved[1] - place[1]) == (pytest.approx(50, abs=1), pytest.approx(40, abs=1))
    assert page.input_value("#divider") == "50"  # the drag moved the image
    inset = page.evaluate("document.getElementById('counterfactual').style.clipPath").split(" ")[-1].rstrip("%)")
    line = moved[0] + float(inset) / 100 * moved[2]
    assert line == pytest.approx(middle[0], abs=1)  # image and counterfactual meet at the divider, magnified too
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] - 100, middle[1], steps=4)
    page.mouse.up()
    assert float(page.input_value("#divider")) < 40
    assert set(places(page)) == {moved}
    page.keyboard.press("Shift+ArrowRight")
    assert places(page)[0][0] < moved[0]
    page.keyboard.press("Shift+ArrowLeft")
    assert selected(page).endswith(".png")
    for _ in range(3):
        page.mouse.wheel(0, -100)
    page.wait_for_selector("#layer.pixels")
    assert page.evaluate("getComputedStyle(document.getElementById('image')).imageRendering") == "pixelated"
    page.keyboard.press("0")
    assert percent(page, "#zoom-value") == 100
    page.keyboard.press("=")
    page.keyboard.press("j")
    assert percent(page, "#zoom-value") == 100  # each new image starts at 100 %
    assert len(set(places(page))) == 1


def test_the_wheel_scrolls_and_zooms_with_ctrl(visit: Visit, page_uri: str) -> None:
    page, _ = visit(page_uri)
    page.locator("#stage").scroll_into_view_if_needed()
    page.hover("#stage")
    page.mouse.wheel(0, -40)
    page.wait_for_timeout(100)
    assert percent(page, "#zoom-value") == 100
    page.locator("#stage").scroll_into_view_if_needed()
    page.hover("#stage")
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    page.wait_for_selector("#stage.zoomed")
    page.wait_for_timeout(200)
    assert percent(page, "#zoom-value") > 150
    assert page.evaluate("visualViewport.scale") == 1  # the page itself is not zoomed


def test_a_pinch_zooms(visit: Visit, page_uri: str) -> None:
    page, _ = visit(page_uri, width=390, height=844, has_touch=True)
    page.locator(".row").nth(2).click()
    page.get_by_label("Map on image").check()
    page.locator("#stage").scroll_into_view_if_needed()
    box = page.locator("#stage").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    fingers = page.context.new_cdp_session(page)
    for kind, apart in (("touchStart", 30), ("touchMove", 50), ("touchMove", 90), ("touchEnd", None)):
        points = [] if apart is None else [{"x": x - apart, "y": y, "id": 0}, {"x": x + apart, "y": y, "id": 1}]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait_for_selector("#stage.zoomed")
    page.wait_for_timeout(200)
    assert percent(page, "#zoom-value") > 150
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_window_and_level_act_on_the_greys(visit: Visit, page_uri: str) -> None:
    def grey() -> float:
        data = page.locator("#stage").screenshot()
        return float(np.asarray(Image.open(io.BytesIO(data)).convert("L"), float)[60:-60, 60:-60].mean())

    page, _ = visit(page_uri)
    page.get_by_label("Counterfactual", exact=True).check()
    before = grey()
    assert page.is_disabled("#greys-reset")
    page.fill("#level", "20")
    assert grey() > before + 30  # a low level makes the image bright
    page.fill("#level", "80")
    assert grey() < before - 30
    page.keyboard.press("j")
    assert page.input_value("#level") == "80"  # kept for the next image
    page.keyboard.press("k")
    page.click("#greys-reset")
    assert grey() == pytest.approx(before, abs=0.5)


def test_in_print_the_page_is_light_and_whole(visit: Visit, page_uri: str, tmp_path: Path) -> None:
    page, _ = visit(page_uri, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 at 96 dpi, without its margins
    assert not page.is_visible("#viewer")
    assert not page.is_visible("nav")
    assert page.is_visible(".on-paper")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert sum(map(int, ink[4:-1].split(","))) < 60
    wide = page.evaluate(
        "[...document.querySelectorAll('table, svg, .cards, .cases')]"
        ".filter(one => one.getBoundingClientRect().right > 719).map(one => one.outerHTML.slice(0, 80))"
    )
    assert wide == []
    page.emulate_media(media=None)
    paper = page.pdf(format="A4")
    assert paper.startswith(b"%PDF")
    assert page.evaluate("[...document.querySelectorAll('.case img')].every(i => i.complete && i.naturalWidth)")


def test_a_link_opens_its_record(visit: Visit, page_uri: str) -> None:
    page, _ = visit(page_uri)
    page.fill("#text", "image-00017")
    page.keyboard.press("Escape")
    page.keyboard.press("2")
    link = page.evaluate("location.href")
    assert "#record=" in link
    other, _ = visit(link)
    assert selected(other).endswith("image-00017.png")
    assert shown(other) == 1
    assert other.is_visible("#heat")
    alone, _ = visit(link.split("&")[0])
    assert selected(alone).endswith("image-00017.png")
    assert shown(alone) == 60
    assert alone.locator(".row[aria-selected=true]").is_visible()
    alone.evaluate("location.hash = '#record=nowhere'")
    alone.wait_for_selector("#trouble:not([hidden])")
    assert "nowhere" in alone.text_content("#trouble")


def test_the_cases_lead_into_the_viewer(visit: Visit, page_uri: str) -> None:
    page, _ = visit(page_uri)
    case = page.locator(".case").nth(3)
    name = case.locator(".path").get_attribute("title")
    case.locator("a").click()
    page.wait_for_function(  # times out if the image is never shown
        "name => document.getElementById('image-path').textContent === name", arg=name
    )


def test_the_keyboard_is_enough(visit: Visit, page_uri: str) -> None:
    page, _ = visit(page_uri)
    first = selected(page)
    page.keyboard.press("j")
    second = selected(page)
    assert second != first
    page.keyboard.press("k")
    assert selected(page) == first
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("jk")  # typed into the field, not used as shortcuts
    assert page.input_value("#text") == "jk"
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "list"
    page.keyboard.press("ArrowDown")
    assert selected(page) == second
    page.keyboard.press("End")
    assert page.get_attribute("#list", "aria-activedescendant") == "row-59"
    assert page.locator(".row[aria-selected=true]").count() == 1
    page.keyboard.press("?")
    assert page.is_visible("#help")
    page.uncheck("#keys-on")
    page.keyboard.press("Escape")
    assert not page.is_visible("#help")
    last = selected(page)
    page.keyboard.press("k")
    assert selected(page) == last  # single keys are off


def test_dark_and_light(visit: Visit, page_uri: str) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page, _ = visit(page_uri, color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, dark = (sum(map(int, colour[4:-1].split(","))) for colour in colours)
    assert light > 700
    assert dark < 100


def test_on_a_phone_list_or_image_is_shown(visit: Visit, page_uri: str) -> None:
    page, _ = visit(page_uri, width=390, height=844, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.is_visible("#detail")
    page.locator(".row").nth(2).click()
    assert page.is_visible("#stage")
    assert not page.is_visible("#list")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#back")
    assert page.is_visible("#list")
    assert page.evaluate("document.activeElement.id") == "list"


def test_quarantined_records_show_their_reason(visit: Visit, make_page: Callable[..., str]) -> None:
    page, seen = visit(make_page(images=12, hostile=True))
    assert page.evaluate("typeof window.alert") == "function"
    page.select_option("#status", "quarantined")
    assert shown(page) >= 1
    page.wait_for_selector("#why:not([hidden])")
    assert HOSTILE.strip() in page.evaluate("document.getElementById('why').textContent")
    assert not page.is_visible("#stage")
    page.click("#reset")
    page.fill("#text", "amp;#%20")
    assert shown(page) == 1
    assert page.evaluate("document.getElementById('image-path').textContent").endswith(HOSTILE_NAME)
    again, _ = visit(page.evaluate("location.href"))
    assert again.input_value("#text") == "amp;#%20"
    assert page.locator("script").count() == 1
    assert page.locator("img[onerror]").count() == 0
    assert not seen.errors


def test_ten_thousand_images_are_smooth(visit: Visit, make_page: Callable[..., str], record_property: Any) -> None:
    uri = make_page(images=10_000)
    started = time.monotonic()
    page, _ = visit(uri)
    ready = time.monotonic() - started
    assert shown(page) == 10_000
    assert page.locator(".row").count() < 40
    spent = {}
    for name, act in {
        "class": "document.getElementById('label').value = 'COVID'; document.getElementById('label')",
        "sort": "document.getElementById('sort').value = 'ssim'; document.getElementById('sort')",
    }.items():
        changed = f"{act}.dispatchEvent(new Event('change', {{bubbles: true}}))"
        timed = f"{changed}; document.body.offsetHeight; return performance.now() - t;"
        spent[name] = page.evaluate(f"(() => {{ const t = performance.now(); {timed} }})()")
    assert shown(page) == 3334
    page.evaluate(
        "const t = document.getElementById('text'); t.value = 'image-09'; t.dispatchEvent(new Event('input'))"
    )
    assert 300 < shown(page) < 340
    page.fill("#text", "")
    page.evaluate("document.getElementById('list').scrollTop = 1e9")
    page.wait_for_selector("#row-3333")
    assert page.locator(".row").count() < 40
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null")
    size = (Path(uri.removeprefix("file://")).stat().st_size) // 1024
    numbers = {"ready_s": round(ready, 2), "first_paint_ms": paint, "filter_ms": spent, "page_kib": size}
    record_property("numbers", json.dumps(numbers))
    print(numbers)
    assert ready < 20
    assert max(spent.values()) < 1000


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visit: Visit, page_uri: str, axe: str, size: tuple[int, int], scheme: str) -> None:
    page, _ = visit(page_uri, *size, color_scheme=scheme, bypass_csp=True)
    states = [lambda: None, lambda: page.fill("#text", "nothing is called this"), lambda: page.click("#nothing-reset")]
    if size[0] < 700:
        states.append(lambda: page.locator(".row").first.click())
    states += [lambda: page.keyboard.press("2"), lambda: page.keyboard.press("?")]
    page.evaluate(axe)
    for act in states:
        act()
        page.wait_for_timeout(100)
        violations = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        problems = [(one["id"], [node["html"][:160] for node in one["nodes"]]) for one in violations]
        assert not problems


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReportServer]:
    run = make_run(tmp_path_factory.mktemp("served"), 6, hostile=False)
    write_report(run)
    with ReportServer(LocalStore(run.store.uri)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_the_served_page_is_the_same(visit: Visit, served: ReportServer) -> None:
    page, _ = visit(served.address)
    assert shown(page) == 6
    page.wait_for_function("[...document.querySelectorAll('#image')].every(i => i.complete && i.naturalWidth)")


@pytest.mark.parametrize(
    "path", ["/../run.json", "/%2e%2e/run.json", "/data/../../run.json", "//run.json", "/images/", "/x.png"]
)
def test_only_files_of_the_report_are_served(served: ReportServer, path: str) -> None:
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"http://127.0.0.1:{served.server_port}{path}")


def test_other_names_for_this_machine_are_refused(served: ReportServer) -> None:
    with pytest.raises(HTTPError, match="403"):
        urlopen(Request(served.address, headers={"Host": f"images.example:{served.server_port}"}))
    with urlopen(served.address) as answer:
        assert answer.headers["Cache-Control"] == "no-store"
