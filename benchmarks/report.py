"""Measure the cost of `diffva report` by the number of records, and of its page in a browser.

    python benchmarks/report.py [--images 10000,20000,1000000]

Each size is a synthetic run: real plan, real records, and as many images as are read. The command runs in its own
process, once from scratch and once again; time and peak memory are measured from outside. A headless Chromium opens the
page from disk.
"""

from __future__ import annotations

import io
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diffva_ray.config.recipe import load_recipe
from diffva_ray.data.encoding import encode_grey, encode_map, quantise
from diffva_ray.generate.keys import pixel_keys
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import part, start_run
from diffva_ray.provenance import code_revision
from diffva_ray.schema import PLAN, RECORDS
from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.store import Store

LABELS = ("COVID", "Lung_Opacity", "Viral Pneumonia")
SHARD, FILES, LINKS = 10_000, 10_000, 100  # records per shard; names per image folder; names per file
DIGEST = "d" * 64
Table = dict[str, Any]


def make_run(folder: Path, images: int, side: int) -> Path:
    """Make a run of ``images`` records below ``folder``; the data set is a manifest.

    Image folders have 10,000 links to a hundred files; counterfactuals and maps are a hundred files each.
    """
    random, data, run = np.random.default_rng(0), LocalStore(str(folder / "data")), LocalStore(str(folder / "run"))
    pictures(data, run, random, side)
    names = [f"d{n // FILES:03d}/image-{n % FILES:05d}.png" for n in range(images)]
    for number in range(-(-images // FILES)):
        (folder / "data" / f"d{number:03d}").symlink_to("images", target_is_directory=True)
    labels = random.choice(LABELS, images, p=(0.3, 0.6, 0.1))
    manifest = pd.DataFrame({"path": names, "label": labels})
    manifest.to_csv(folder / "data" / "images.csv", index=False)
    recipe = load_recipe("phantom", [f"model.resolution={side}", f"generate.shard_size={SHARD}"])
    request, config = Request(), recipe.generate
    place = np.arange(images)
    fixed = {
        "prompt": recipe.data.healthy_prompt, "method": config.method, "scheduler": config.scheduler,
        "strength": config.strength, "guidance_scale": config.guidance_scale,
        "num_inference_steps": config.num_inference_steps, "sample": 0,
    }  # fmt: skip
    plan = manifest.rename(columns={"path": "image_path"}).assign(
        record_id=[f"{n * 0x9E3779B97F4A7C15 % 2**64:020x}" for n in range(images)],
        shard=place // SHARD, position=place % SHARD, image_size=1000, seed=random.integers(2**62, size=images),
        lung_mask_path="lungs.png", lesion_mask_path="", ground_truth_path="", **fixed,
    )  # fmt: skip
    plan = plan.reindex(columns=PLAN.names, fill_value="")  # what the data set does not know: patient, view ...
    (folder / "model").mkdir()
    (folder / "model" / "diffva.json").write_text(json.dumps({"digest": DIGEST, "data_kind": "manifest"}))
    about = {
        "recipe": recipe.model_dump(mode="json"), "data": f"{data.uri}/images.csv", "data_root": data.uri,
        "data_kind": "manifest", "model": str(folder / "model"), "code_revision": code_revision(),
        "started": "2025-01-01T00:00:00+00:00",
    }  # fmt: skip
    table = pa.Table.from_pandas(plan, schema=PLAN, preserve_index=False)
    start_run(run, table, pixel_keys(recipe, request, DIGEST, "2.0", "cpu"), about)
    for shard, rows in plan.groupby("shard"):
        sink = io.BytesIO()
        made = records(rows, random).reindex(columns=RECORDS.names)
        pq.write_table(pa.Table.from_pandas(made, schema=RECORDS, preserve_index=False), sink, compression="zstd")
        run.put(f"records/{part(int(str(shard)))}.parquet", sink.getvalue())
    return folder / "run"


def pictures(data: Store, run: Store, random: np.random.Generator, side: int) -> None:
    """Write a hundred smooth images, their counterfactuals and maps, and 10,000 names of the images."""
    root = Path(data.uri)
    (root / "images").mkdir(parents=True)
    y, x = np.mgrid[0:side, 0:side] / side
    lungs = (np.abs(np.abs(x - 0.5) - 0.22) < 0.14) & (np.abs(y - 0.5) < 0.34)
    data.put("lungs.png", encode_grey(quantise(lungs.astype(np.float32))))
    for n in range(LINKS):
        spot = np.exp(-((x - random.uniform(0.2, 0.8)) ** 2 + (y - random.uniform(0.3, 0.7)) ** 2) / 0.01)
        counterfactual = 0.75 - 0.5 * lungs + 0.02 * random.normal(size=(side, side))
        data.put(
            f"base/{n:03d}.png", encode_grey(quantise((counterfactual + 0.2 * spot).clip(0, 1).astype(np.float32)))
        )
        run.put(f"counterfactuals/{n:03d}.png", encode_grey(quantise(counterfactual.clip(0, 1).astype(np.float32))))
        run.put(f"attributions/{n:03d}.png", encode_map((0.2 * spot).astype(np.float32)))
    for n in range(FILES):
        os.link(root / "base" / f"{n % LINKS:03d}.png", root / "images" / f"image-{n:05d}.png")


def records(rows: pd.DataFrame, random: np.random.Generator) -> pd.DataFrame:
    """Return records for planned rows with plausible scores; two percent are quarantined."""
    many = len(rows)
    ok: NDArray[np.bool_] = random.random(many) > 0.02
    file = [f"{n % LINKS:03d}.png" for n in range(many)]
    hashes = [f"{n:064x}" for n in random.integers(2**62, size=many)]
    scores = {
        "ssim": random.beta(30, 3, many), "ms_ssim": random.beta(40, 2, many), "psnr": random.normal(28, 3, many),
        "l1": random.beta(2, 60, many), "attribution_energy": random.beta(2, 80, many),
        "attribution_energy_lung_fraction": random.beta(6, 3, many), "judge_image": random.beta(1, 6, many),
        "judge_counterfactual": random.beta(6, 1, many),
    }  # fmt: skip
    made = rows.assign(
        image_sha256=None, source_prompt="", map="compensated", model_digest=DIGEST, ms_ssim_scales=5, width=299,
        height=299, device="cpu", counterfactual_path=[f"counterfactuals/{name}" for name in file],
        reconstruction_path=[f"counterfactuals/{name}" for name in file],
        attribution_path=[f"attributions/{name}" for name in file],
        counterfactual_sha256=hashes, attribution_sha256=hashes,
        reconstruction_sha256=hashes, status=np.where(ok, "ok", "bad_image"),
        error=np.where(ok, None, "truncated PNG"), **scores,
    )  # fmt: skip
    made.loc[~ok, list(scores)] = np.nan
    return made


def measured(run: Path, *options: str) -> Table:
    """Return seconds and peak memory of one `diffva report`."""
    program = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, done.returncode)"
    )
    started = time.monotonic()
    command = [sys.executable, "-m", "diffva_ray.cli", "report", str(run), *options]
    caption = subprocess.run([sys.executable, "-c", program, *command], check=True, capture_output=True, text=True)
    peak, code = map(int, caption.stdout.split())
    if code:
        raise SystemExit(f"diffva report ended with {code}: {caption.stderr}")
    return {"seconds": round(time.monotonic() - started, 1), "peak_mib": peak // 1024}


def opened(run: Path) -> Table:
    """Return the cost of the page in a browser: time until the viewer is ready and for a filter, script memory."""
    from playwright.sync_api import sync_playwright

    binary = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        started = time.monotonic()
        page.goto((run / "report" / "index.html").as_uri())
        page.wait_for_selector("#viewer:not([hidden])")
        ready = time.monotonic() - started
        act = "document.getElementById('label').value = 'COVID'; document.getElementById('label')"
        spent = page.evaluate(
            f"(() => {{ const t = performance.now(); {act}.dispatchEvent(new Event('change', {{bubbles: true}}));"
            "document.body.offsetHeight; return performance.now() - t; })()"
        )
        heap = page.evaluate("performance.memory.usedJSHeapSize")
        caption = page.text_content("#images .caption")
        browser.close()
    return {
        "ready_s": round(ready, 2),
        "filter_ms": round(spent, 1),
        "heap_mib": heap // 2**20,
        "says": caption.strip(),
    }


def written(run: Path) -> Table:
    """Return the number and size of the report's files."""
    files = [file for file in (run / "report").rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return {"report_files": len(files), "report_mib": round(size / 2**20, 1)}


def processor() -> str:
    """Return the processor's name, if the system reports it."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()}, {names[0]}" if names else platform.machine()


@click.command()
@click.option("--images", "sizes", default="10000,20000", show_default=True, help="Records of each run.")
@click.option("--side", default=64, show_default=True, help="Side of an image in pixels.")
@click.option("--result", default="benchmarks/results/report.json", type=click.Path(path_type=Path))
@click.option("--keep", type=click.Path(path_type=Path), help="Keep the runs in this folder.")
def main(sizes: str, side: int, result: Path, keep: Path | None) -> None:
    rows = []
    load = [
        round(value, 1) for value in os.getloadavg()
    ]  # load of other processes; seconds are upper bounds on a busy machine
    for images in map(int, sizes.split(",")):
        folder = keep or Path(tempfile.mkdtemp())
        run = make_run(folder / f"images-{images}", images, side)
        row: Table = {"records": images, "first": measured(run), "again": measured(run), **written(run)}
        rows.append({**row, "page": opened(run)})
        click.echo(json.dumps(rows[-1]))
        if keep is None:
            shutil.rmtree(folder)
    about = {
        "command": f"python benchmarks/report.py --images {sizes}",
        "code": code_revision(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "load_before": load,
        "side": side,
        "own_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "runs": rows,
    }
    result.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
