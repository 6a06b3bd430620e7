"""Fixtures: a headless Chromium, and reports to open in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_run

from diffva_ray.evaluate.report.page import write_report

BINARIES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
MakePage = Callable[..., str]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser, started once; without one the tests are skipped with a hint what to install."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="BROWSER TESTS SKIPPED: pip install playwright")
    binary = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BINARIES)), None)
    if binary is None:
        pytest.skip("BROWSER TESTS SKIPPED: no Chromium found; `make browser` installs it")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=list(FLAGS))
        yield browser
        browser.close()


class PageEvents:
    """Errors and requests of an open page."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., tuple[Any, PageEvents]]]:
    """``visit(uri, width=, height=, **options)`` opens a page in its own context and waits for the viewer.

    At the end, no page may have had an error or have requested anything but files beside it.
    """
    contexts, everything = [], []

    def open_page(uri: str, width: int = 1280, height: int = 900, **options: Any) -> tuple[Any, PageEvents]:
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page, seen = context.new_page(), PageEvents()
        everything.append((uri.partition("index.html")[0], seen))
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("console", lambda line: seen.errors.append(line.text) if line.type in ("error", "warning") else None)
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("dialog", lambda dialog: (seen.errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.goto(uri)
        page.wait_for_selector("#viewer:not([hidden])")
        return page, seen

    yield open_page
    for context in contexts:
        context.close()
    for folder, seen in everything:
        assert not seen.errors
        assert all(url.startswith(folder) for url in seen.requests)


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of axe-core: the file named by ``AXE_CORE``, else from the npm registry; skips without either."""
    given = os.environ.get("AXE_CORE")
    if given:
        return Path(given).read_text()
    folder = tmp_path_factory.mktemp("axe")
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("ACCESSIBILITY TESTS SKIPPED: no npm to fetch axe-core with, and AXE_CORE names no file")
    packed = subprocess.run(
        [npm, "pack", "--silent", "axe-core@4"], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    if packed.returncode:
        pytest.skip("ACCESSIBILITY TESTS SKIPPED: axe-core cannot be fetched, and AXE_CORE names no file")
    with tarfile.open(folder / packed.stdout.strip().splitlines()[-1]) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


@pytest.fixture(scope="session")
def make_page(tmp_path_factory: pytest.TempPathFactory) -> MakePage:
    """``make_page(images=, hostile=)`` returns the address of a report; every 50th image is quarantined."""

    def make(images: int = 60, hostile: bool = False) -> str:
        folder = tmp_path_factory.mktemp("browser")
        return Path(write_report(make_run(folder, images, hostile))).as_uri()

    return make


@pytest.fixture(scope="session")
def page_uri(make_page: MakePage) -> str:
    """A report of 60 images, for all tests that do not change it."""
    return make_page()
