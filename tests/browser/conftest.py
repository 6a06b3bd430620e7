"""A headless Chromium, and runs on disk of any size whose films share a few pictures."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffva_ray.config import load_recipe
from diffva_ray.data.films import Dataset, Film
from diffva_ray.data.images import encode_grey, encode_map, quantise
from diffva_ray.evaluate.report.page import write_report
from diffva_ray.generate.plan import Request, Run, make_plan, part, pixel_keys, start_run
from diffva_ray.schema import RECORDS
from diffva_ray.storage import LocalStore

SIZE = 32
LABELS = ("COVID", "Lung_Opacity", "Viral Pneumonia")
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\n\u2028${x} "  # in a reason and a prompt
HOSTILE_NAME = "a'b\"<script>alert(1)<\\script>&amp;#%20 é.png"  # of a file: all but slashes
BINARIES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
MakePage = Callable[..., str]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser, started once. Skips, saying what to install, where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="BROWSER TESTS SKIPPED: pip install playwright")
    binary = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BINARIES)), None)
    if binary is None:
        pytest.skip("BROWSER TESTS SKIPPED: no Chromium found; `make browser` installs it")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=list(FLAGS))
        yield browser
        browser.close()


class Seen:
    """What went wrong or out while a page was open."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., tuple[Any, Seen]]]:
    """``visit(uri, width=, height=, **options)`` opens a page in a context of its own, and waits for the viewer; at
    the end nothing may have gone wrong, and nothing been asked for but files beside the page."""
    contexts, everything = [], []

    def open_page(uri: str, width: int = 1280, height: int = 900, **options: Any) -> tuple[Any, Seen]:
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page, seen = context.new_page(), Seen()
        everything.append((uri.partition("index.html")[0], seen))
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("console", lambda said: seen.errors.append(said.text) if said.type in ("error", "warning") else None)
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
    """The text of axe-core: from ``AXE_CORE`` (a file), else from the npm registry. Skips where neither is there."""
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
    """``make_page(films=, hostile=)``: the address of the report of such a run. Every 50th film is quarantined."""

    def make(films: int = 60, hostile: bool = False) -> str:
        folder = tmp_path_factory.mktemp("browser")
        return Path(write_report(make_run(folder, films, hostile))).as_uri()

    return make


@pytest.fixture(scope="session")
def page_uri(make_page: MakePage) -> str:
    """A report of 60 films, for all tests that only look."""
    return make_page()


def make_run(folder: Path, films: int, hostile: bool) -> Run:
    """A run of ``films`` records that no model has made; records that look the same share their files."""
    data, store = LocalStore(str(folder / "data")), LocalStore(str(folder / "run"))
    random = np.random.default_rng(0)
    _shared_files(data, store, random)
    names = [HOSTILE_NAME if hostile and n == 1 else f"film-{n:05d}.png" for n in range(films)]
    for name in names:
        for label in LABELS:
            if hostile:
                data.put(f"{label}/images/{name}", data.read("film.png"))
    listed = [
        Film(
            f"{LABELS[n % 3]}/images/{name}" if hostile else f"{LABELS[n % 3]}/images/film-{n:05d}.png",
            LABELS[n % 3], 1, "lungs.png", "lesion.png", "twin.png",
        )
        for n, name in enumerate(names)
    ]  # fmt: skip
    if not hostile:
        for label in LABELS:
            (folder / "data" / label / "images").mkdir(parents=True)
        for film in listed:
            os.link(folder / "data" / "film.png", folder / "data" / film.path)
    recipe = load_recipe("phantom", [f"model.resolution={SIZE}", "generate.shard_size=500"])
    request = Request(prompt=HOSTILE if hostile else "normal chest scan")
    table = make_plan(Dataset(data, listed, "phantoms"), recipe, request)
    about = {
        "recipe": recipe.model_dump(mode="json"), "data": data.uri, "data_root": data.uri, "data_kind": "phantoms",
        "model": str(folder / "model"), "code_revision": "abc123", "started": "2025-01-01T00:00:00+00:00",
    }  # fmt: skip
    (folder / "model").mkdir()
    (folder / "model" / "diffva.json").write_text(json.dumps({"digest": "d" * 64, "data_kind": "phantoms"}))
    run = start_run(store, table, pixel_keys(recipe, request, "d" * 64, "2.0", "cpu"), about)
    for shard in range(run.shards):
        rows = [_record(row, hostile, random) for row in run.shard_rows(shard)]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=RECORDS), sink)
        run.store.put(f"records/{part(shard)}.parquet", sink.getvalue())
    return run


def _shared_files(data: LocalStore, store: LocalStore, random: np.random.Generator) -> None:
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    lungs = (np.abs(np.abs(x - 0.5) - 0.22) < 0.14) & (np.abs(y - 0.5) < 0.34)
    lesion = (x - 0.3) ** 2 + (y - 0.4) ** 2 < 0.01
    twin = (0.75 - 0.5 * lungs + 0.03 * random.normal(size=(SIZE, SIZE))).clip(0, 1)
    for name, picture in {"film": twin + 0.3 * lesion, "twin": twin, "lungs": lungs, "lesion": lesion}.items():
        data.put(f"{name}.png", encode_grey(quantise(picture.clip(0, 1).astype(np.float32))))
    store.put("counterfactuals/part-00000/twin.png", encode_grey(quantise(twin.astype(np.float32))))
    store.put("reconstructions/part-00000/twin.png", encode_grey(quantise(twin.astype(np.float32))))
    store.put("maps/part-00000/map.png", encode_map(0.2 * lesion + 0.03 * random.normal(size=(SIZE, SIZE))))


def _record(row: dict[str, Any], hostile: bool, random: np.random.Generator) -> dict[str, Any]:
    made = {name: row.get(name) for name in RECORDS.names}
    if int(row["record_id"], 16) % 50 == 0 or (hostile and int(row["record_id"], 16) % 4 == 0):
        return {**made, "status": "bad_image", "error": f"damaged {HOSTILE}" if hostile else "truncated PNG"}
    before, after = random.beta(1, 6), random.beta(6, 1)
    return {
        **made, "status": "ok", "width": SIZE, "height": SIZE, "ssim": random.uniform(0.7, 1), "psnr": 25.0,
        "counterfactual_path": "counterfactuals/part-00000/twin.png",
        "reconstruction_path": "reconstructions/part-00000/twin.png", "attribution_path": "maps/part-00000/map.png",
        "map_energy": random.uniform(0, 0.05), "judge_source": before, "judge_counterfactual": after,
    }  # fmt: skip
