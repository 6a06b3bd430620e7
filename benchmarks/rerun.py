"""Time the repeated command on a finished run of 10,000 records, and check that it writes nothing.

python benchmarks/rerun.py
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "chaos"))

from histories import SIZES

from diffva_ray.config.recipe import load_recipe, to_yaml
from diffva_ray.data.phantoms import phantom_set
from diffva_ray.provenance import code_revision
from diffva_ray.storage.local import LocalStore
from diffva_ray.train.checkpoint import discard
from diffva_ray.train.loop import train


@click.command()
@click.option("--records", default=10_000, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "rerun.json")
def main(records: int, out: Path) -> None:
    """Make a run with many samples of few images, and repeat the command."""
    folder = Path(tempfile.mkdtemp(prefix="diffva-rerun-"))
    images = 40  # 30 of them abnormal
    draws = -(-records // 30)
    sizes = [f"generate.samples={draws}", "generate.shard_size=64", "generate.micro_batch=64", "generate.strength=0.5"]
    recipe = load_recipe("phantom", (*SIZES, *sizes))
    for _ in phantom_set(LocalStore(str(folder / "images")), images, 16, seed=5):
        pass
    train(
        recipe,
        str(folder / "images"),
        str(folder / "model"),
        fingerprint="rerun",
        provenance={},
        report=discard,
        threads=1,
    )

    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    command = [
        sys.executable, "-m", "diffva_ray.cli", "generate", "--data", folder / "images", "--model", folder / "model",
        "--out", folder / "run", "--recipe", folder / "recipe.yaml", "--limit", records, "--executor", "inline",
    ]  # fmt: skip

    def generate() -> float:
        started = time.monotonic()
        subprocess.run([str(word) for word in command], check=True)
        return time.monotonic() - started

    first = generate()
    before = snapshot(folder / "run")
    again = generate()
    written = sum(before.get(path) != state for path, state in snapshot(folder / "run").items())
    result = {
        "command": "python benchmarks/rerun.py", "code": code_revision(), "records": records,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "files": len(before),
        "first_seconds": round(first, 1), "again_seconds": round(again, 2),
        "files_written_again": written,
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps(result, indent=1))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every file with its modification time and size."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


if __name__ == "__main__":
    main()
