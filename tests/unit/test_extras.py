"""The plain wheel, without any extra: it trains, generates and computes tables; what needs an extra says so first."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffva_ray.config.recipe import Recipe, to_yaml

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()
# Modules that only extras bring, and a run of command lines in one process that cannot import them.
ABSENT = (
    "matplotlib s3fs aiobotocore botocore pytorch_fid pydicom peft captum lpips torchxrayvision bitsandbytes obstore "
    "torchmetrics moto boto3 gradio"
)
PLAIN = f"""
import importlib.machinery, json, sys
absent = set({ABSENT!r}.split())
found = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in absent else found(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
from click.testing import CliRunner
from diffva_ray.cli import main
results = [CliRunner().invoke(main, line.split()) for line in sys.argv[1:]]
assert not absent & {{name.split(".")[0] for name, module in sys.modules.items() if module}}
print(json.dumps([[result.exit_code, result.stdout, result.stderr] for result in results]))
"""
WORKS = (
    "--help",
    "inspect IMAGES",
    "train --data IMAGES --out model2 --executor inline TINY",
    "generate --data IMAGES --model MODEL --out run --executor inline",
    "reduce run --executor inline",
    "verify run",
    "status run",
    "score run --data IMAGES --allow-training-images",
)
NEEDS = {  # a command line and its extra
    "report run": "report",
    "compare run run": "report",
    "explain IMAGES/COVID/images/COVID-3.png --model MODEL": "report",
    "interpolate IMAGES/COVID/images/COVID-3.png --model MODEL --prompt a --prompt b": "report",
    "demo --quick --out new": "report",
    "paper --quick --model MODEL --out new": "report",
    "reduce run --executor inline --inception-weights download": "fid",
    "reduce run --executor inline --inception-weights IMAGES/phantoms.json": "fid",
    "reduce run --executor inline --extractor torchxrayvision=x": "xrv",
    "reduce run --executor inline --judge torchxrayvision=x": "xrv",
    "reduce run --executor inline --lpips-weights x": "lpips",
    "studio --model MODEL --out new": "studio",
    "status s3://bucket/run": "s3",
    "status gs://bucket/run": "cloud",
    "generate --data az://container/images --model MODEL --out new": "cloud",
    "generate --data IMAGES --model MODEL --out s3://bucket/run": "s3",
    "generate --data s3://bucket/images --model MODEL --out new": "s3",
    "generate --data dicom --model MODEL --out new": "dicom",
    "train --data IMAGES --out model3 --executor inline --set train.lora={'rank':4} TINY": "lora",
    "train --data IMAGES --out model4 --executor inline --set train.stages.1.optimizer=adamw8bit TINY": "bnb",
}


def test_few_packages_are_required_and_every_extra_is_explained() -> None:
    required = re.search(r"^dependencies = \[\n(.*?)^\]", PROJECT, re.M | re.S)
    assert required
    assert len(required[1].splitlines()) <= 20
    extras = re.search(r"optional-dependencies\]\n(.*?)\n\n", PROJECT, re.S)
    assert extras
    names = {line.split(" =")[0] for line in extras[1].splitlines()}
    table = (ROOT / "docs" / "index.md").read_text().split("| extra |")[1].split("\n\n")[0]
    assert names - {"test", "docs"} == set(
        re.findall(r"`([a-z0-9]+)`", "".join(re.findall(r"^\|(.*?)\|", table, re.M)))
    )
    assert set(NEEDS.values()) <= names


@pytest.mark.timeout(300)
def test_the_plain_wheel_generates_and_names_the_extra_of_the_rest(
    images: Path, model: Path, tiny: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny))
    (tmp_path / "dicom" / "A").mkdir(parents=True)
    (tmp_path / "dicom" / "A" / "scan.dcm").write_bytes(b"\0" * 128 + b"DICM")
    names = {"IMAGES": str(images), "MODEL": str(model), "TINY": "--recipe tiny.yaml"}
    lines = [re.sub("|".join(names), lambda word: names[word[0]], line) for line in (*WORKS, *NEEDS)]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, *lines], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = dict(zip((*WORKS, *NEEDS), json.loads(done.stdout.splitlines()[-1])))

    for line in WORKS:
        code, output, errors = results[line]
        assert code == 0, (line, output, errors)
    assert {"records", "ssim", "localization", "fid"} <= json.loads(
        (tmp_path / "run/tables/metrics.json").read_text()
    ).keys()

    for line, extra in NEEDS.items():
        code, output, errors = results[line]
        said = [text for text in errors.splitlines() if text.startswith("diffva ")]
        assert code == 2, (line, output, errors)
        assert f"pip install 'diffva-ray[{extra}]'" in said[-1], (line, errors)
        assert len(said) == 1, (line, errors)
    assert not (tmp_path / "new").exists()
