"""Time one FID from PNG files, cold start, against pytorch-fid on the same images, weights and cores.

    python benchmarks/fid.py --images 150 --out benchmarks/results/fid.json

Weights are random (kaiming, seed 0) in pytorch-fid's architecture, because the real ones are not available everywhere;
the time does not depend on them. Each measurement is a process, from its first import to the number. CPU seconds are
those of all threads and depend less on other load than the wall clock. Memory: ours also with twice the images.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

SIDE = 299
LIBRARIES = ("torch", "numpy", "scipy", "pytorch_fid", "torchvision")


def write_images(folder: Path, label: str, images: int) -> None:
    """Write phantoms of the Radiography Database's size."""
    from diffva_ray.data.encoding import encode_grey, quantise
    from diffva_ray.data.phantoms import phantom

    folder.mkdir(parents=True)
    for patient in range(images):
        (folder / f"{patient:05d}.png").write_bytes(encode_grey(quantise(phantom(label, patient, 6, SIDE).image)))


def write_weights(path: Path) -> None:
    """Write random weights under pytorch-fid's names."""
    import torch
    from torchvision.models import inception_v3

    state = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    generator = torch.Generator().manual_seed(0)
    for key, value in state.items():
        if value.ndim == 4:
            torch.nn.init.kaiming_normal_(value, generator=generator)
        elif key.endswith("bn.bias"):
            value.normal_(0, 0.1, generator=generator)
    torch.save(state, path)


def pytorch_fid(first: str, second: str, weights: str, threads: int) -> dict[str, float]:
    """Call pytorch-fid's own function, with the weights instead of its download."""
    import warnings

    import torch
    from pytorch_fid import fid_score, inception

    warnings.simplefilter("ignore")  # scipy on sqrtm(disp=...)
    torch.set_num_threads(threads)
    inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
    block = inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]
    model = inception.InceptionV3([block])
    moments = [
        fid_score.compute_statistics_of_path(folder, model, 50, 2048, "cpu", num_workers=0)
        for folder in (first, second)
    ]
    between = time.perf_counter()
    value = fid_score.calculate_frechet_distance(*moments[0], *moments[1])
    return {"value": float(value), "seconds_distance": time.perf_counter() - between}


def ours(first: str, second: str, weights: str, threads: int) -> dict[str, float]:
    """Compute one row as ``diffva reduce --resize legacy`` does: the same pixels to Inception, then the distance."""
    import torch

    from diffva_ray.evaluate.distances import embed
    from diffva_ray.metrics.features import inception
    from diffva_ray.metrics.fid import frechet_distance_features

    torch.set_num_threads(threads)
    extractor = inception(weights, "legacy")
    sets = [
        embed(extractor, [file.read_bytes for file in sorted(Path(folder).glob("*.png"))], SIDE)
        for folder in (first, second)
    ]
    between = time.perf_counter()
    value = frechet_distance_features(*sets)
    return {"value": value, "seconds_distance": time.perf_counter() - between}


def measured(which: str, first: Path, second: Path, weights: Path, threads: int) -> dict[str, float]:
    """Run one of the two in its own process."""
    command = [sys.executable, __file__, "--one", which, str(first), str(second), str(weights), str(threads)]
    began = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    wall = time.perf_counter() - began
    return {"seconds": round(wall, 2), **json.loads(done.stdout.strip().splitlines()[-1])}


def report(which: str, first: str, second: str, weights: str, threads: int) -> None:
    found = {"pytorch-fid": pytorch_fid, "ours": ours}[which](first, second, weights, threads)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found |= {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_megabytes": usage.ru_maxrss / 1024}
    print(json.dumps({key: round(value, 9) for key, value in found.items()}))


@click.command()
@click.option("--images", default=150, show_default=True, help="Images of each set.")
@click.option("--threads", default=os.cpu_count() or 1, help="Cores of each side.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Path of the result file.")
@click.option("--one", nargs=5, hidden=True)
def main(images: int, threads: int, out: Path | None, one: tuple[str, str, str, str, str] | None) -> None:
    if one:
        report(*one[:4], int(one[4]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder, weights = Path(name), Path(name) / "weights.pth"
        write_weights(weights)
        for label, place in (("Normal", "a"), ("COVID", "b")):
            write_images(folder / place, label, images)
            write_images(folder / f"{place}2", label, 2 * images)
        theirs = measured("pytorch-fid", folder / "a", folder / "b", weights, threads)
        own = measured("ours", folder / "a", folder / "b", weights, threads)
        twice = measured("ours", folder / "a2", folder / "b2", weights, threads)
    from importlib.metadata import version

    result = {
        "what": "PNG files to one FID, a process each from first import to number; random Inception weights",
        "images": [images, images],
        "side": SIDE,
        "threads": threads,
        "pytorch_fid": theirs,
        "ours": own,
        "ours_twice_the_images": twice,
        "ratio_wall": round(theirs["seconds"] / own["seconds"], 2),
        "ratio_cpu": round(theirs["cpu_seconds"] / own["cpu_seconds"], 2),
        "ratio_distance": round(theirs["seconds_distance"] / own["seconds_distance"], 1),
        "relative_difference": abs(own["value"] / theirs["value"] - 1),
        "note": "with fewer images than dimensions pytorch-fid's sqrtm is off by about 1e-6 of the traces",
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
        "load_average": os.getloadavg(),
        "versions": {library: version(library.replace("_", "-")) for library in LIBRARIES},
    }
    print(json.dumps(result, indent=1))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
