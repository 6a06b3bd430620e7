"""Every verb, used wrongly: one line that names the cause and the next step, no traceback, nothing written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffva_ray.cli import main

LONG = "mild " * 60
WRONG = [
    ("demoo", "Did you mean 'demo'"),
    ("generate", "Missing option '--data'"),
    ("train --data nowhere --out x", "nowhere: no files there; expected"),
    ("train --data IMAGES --out x --recipe nope", "--recipe nope: no such recipe; there are paper"),
    ("train --data IMAGES --out x --recipe nope.yaml", "--recipe nope.yaml: cannot be read"),
    ("train --data IMAGES --out x --set train.foo=3", "train.foo: no such key; there are stages"),
    ("train --data IMAGES --out x --set generate.strenght=0.3", "did you mean strength?"),
    ("train --data IMAGES --out x --set train.stages.1.prior_clas=a", "did you mean prior_class?"),
    ("train --data IMAGES --out x --set train.lora.rnk=3", "train.lora.rnk: no such key; did you mean rank?"),
    ("train --data IMAGES --out x --set strength", "--set strength: write it as key=value"),
    ("train --data IMAGES --out x --set train.stages.9.steps=3", "'9' is not a section"),
    ("train --data IMAGES --out x --workers 0", "give a number of workers"),
    ("generate --data IMAGES --model nowhere --out x", "--model nowhere: no diffva.json there; train a model first"),
    (
        "generate --data IMAGES --model MODEL --out x --method foo",
        "method: no such method; there are sdedit",
    ),
    ("generate --data IMAGES --model MODEL --out x --strength 2", "generate.strength: Input should be less than"),
    ("generate --data IMAGES --model MODEL --out x --sweep foo=1", "--sweep foo=1: write key=value,value"),
    ("generate --data IMAGES --model MODEL --out x --sweep strength=0.3 --sweep strength=0.6", "is given twice"),
    ("generate --data IMAGES --model MODEL --out x --sweep strength=0.5,0.5", "a value is given twice"),
    ("generate --data IMAGES --model MODEL --out gs://a", "gs://a: unknown scheme 'gs'"),
    ("generate --data IMAGES --model gs://a --out x", "gs://a: unknown scheme 'gs'"),
    ("generate --data IMAGES --model MODEL --out x --set generate.negative_prompt=LONG", "negative_prompt 'mild mild"),
    ("generate --data IMAGES --model MODEL --out x --dry-run --method controlnet", "needs a controlnet"),
    ("generate --data IMAGES --model MODEL --out x --probe", "--probe and --images-per-second are for --dry-run"),
    ("generate --data IMAGES --model MODEL --out x --classes Measles", "no class 'Measles'; there are COVID"),
    ("generate --data IMAGES --model MODEL --out x --method masked --scheduler pndm", "give --scheduler ddim"),
    (
        "generate --data IMAGES --model MODEL --out x --method controlnet",
        "needs a controlnet, which this model lacks",
    ),
    ("generate --data IMAGES --model MODEL --out x --prompt LONG", "more than the 16 tokens this model reads"),
    ("generate --data ftp://a --model MODEL --out x", "ftp://a"),
    ("reduce nowhere", "nowhere: no run there (no run.json); make one with diffva generate"),
    ("report nowhere", "no run there"),
    ("compare nowhere nowhere", "no run there"),
    ("verify IMAGES", "no run there"),
    ("retry nowhere", "no run there"),
    ("status nowhere", "neither a run (run.json) nor a model (diffva.json)"),
    ("score nowhere --data IMAGES", "nowhere: no maps there; expected .png"),
    ("explain nowhere.png --model MODEL", "nowhere.png: no such file"),
    ("explain IMAGES --model MODEL", "a folder; explain takes one image"),
    ("interpolate IMAGES --model MODEL --prompt a", "give --prompt twice"),
    ("inspect nowhere", "nowhere: no files there; expected"),
    ("phantoms x --classes Foo", "unknown phantom class 'Foo'; there are Normal"),
    ("paper --model nowhere --out x --quick", "--model nowhere"),
]


FAQ = (Path(__file__).parents[2] / "docs" / "faq.md").read_text()
SOURCES = "".join(path.read_text() for path in (Path(__file__).parents[2] / "diffva_ray").rglob("*.py"))


def test_the_faq_quotes_our_messages() -> None:
    quoted = re.findall(r"^\*\*`([^`]+)`", FAQ, re.M)
    assert len(quoted) >= 5
    for text in quoted:
        for part in text.split("..."):
            assert part.strip(" :") in SOURCES, text


def test_every_verb_is_covered() -> None:
    assert set(main.commands) - {"demo"} <= {line.split()[0] for line, _ in WRONG}


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_command_prints_one_line(
    line: str, message: str, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"IMAGES": str(images), "MODEL": str(model), "LONG": LONG}
    words = [names.get(word, word.replace("LONG", LONG)) for word in line.split()]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2, result.output
    assert message in result.output
    errors = [
        text for text in result.output.splitlines() if text and not text.startswith(("Usage:", "Try ", "recipe "))
    ]
    assert len(errors) == 1, result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []
