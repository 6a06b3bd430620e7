"""Every verb, used wrongly: one line that names the cause and the next step, no traceback, nothing written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffva_ray.cli import main

LONG = "mild " * 60
WRONG = [  # a command line, and what its message has to name: the cause and what helps, in whatever words
    ("demoo", "demo"),
    ("generate", "--data"),
    ("train --data nowhere --out x", "nowhere"),
    ("train --data IMAGES --out x --recipe nope", "--recipe nope", "paper"),
    ("train --data IMAGES --out x --recipe nope.yaml", "--recipe nope.yaml"),
    ("train --data IMAGES --out x --set train.foo=3", "train.foo", "stages"),
    ("train --data IMAGES --out x --set generate.strenght=0.3", "generate.strenght", "strength?"),
    ("train --data IMAGES --out x --set train.stages.1.prior_clas=a", "prior_clas", "prior_class?"),
    ("train --data IMAGES --out x --set train.lora.rnk=3", "train.lora.rnk", "rank?"),
    ("train --data IMAGES --out x --set strength", "--set strength", "key=value"),
    ("train --data IMAGES --out x --set train.stages.9.steps=3", "'9'"),
    ("train --data IMAGES --out x --workers 0", "--workers", "'0'"),
    ("generate --data IMAGES --model nowhere --out x", "--model nowhere", "train"),
    ("generate --data IMAGES --model MODEL --out x --method foo", "foo", "sdedit"),
    ("generate --data IMAGES --model MODEL --out x --strength 2", "generate.strength"),
    ("generate --data IMAGES --model MODEL --out x --strength 0.01", "0.01"),
    ("generate --data IMAGES --model MODEL --out x --sweep foo=1", "--sweep foo=1", "strength"),
    ("generate --data IMAGES --model MODEL --out x --sweep strength=0.3 --sweep strength=0.6", "strength", "twice"),
    ("generate --data IMAGES --model MODEL --out x --sweep strength=0.5,0.5", "strength", "twice"),
    ("generate --data IMAGES --model MODEL --out hdfs://a", "hdfs://a", "s3://"),
    ("generate --data IMAGES --model hdfs://a --out x", "hdfs://a", "s3://"),
    ("generate --data ftp://a --model MODEL --out x", "ftp://a", "s3://"),
    ("generate --data IMAGES --model MODEL --out x --recipe fantom", "fantom", "phantom"),
    ("generate --data IMAGES --model MODEL --out x --set generate.negative_prompt=LONG", "negative_prompt", "16"),
    ("generate --data IMAGES --model MODEL --out x --prompt LONG", "16 tokens"),
    ("generate --data IMAGES --model MODEL --out x --probe", "--probe", "--dry-run"),
    ("generate --data IMAGES --model MODEL --out x --classes Measles", "Measles", "COVID"),
    ("generate --data IMAGES --model MODEL --out x --method masked --scheduler pndm", "--scheduler ddim"),
    ("generate --data IMAGES --model MODEL --out x --method controlnet", "controlnet"),
    ("generate --data IMAGES --model MODEL --out x --method controlnet --dry-run", "controlnet"),
    ("generate --data IMAGES --model MODEL --out x --method classifier-guided", "classifier"),
    ("reduce nowhere", "nowhere", "diffva generate"),
    ("export nowhere --to coco --out x", "nowhere", "diffva generate"),
    ("report nowhere", "nowhere", "diffva generate"),
    ("compare nowhere nowhere", "nowhere", "diffva generate"),
    ("verify IMAGES", "IMAGES", "diffva generate"),
    ("retry nowhere", "nowhere", "diffva generate"),
    ("status nowhere", "nowhere", "run.json", "diffva.json"),
    ("score nowhere --data IMAGES", "nowhere", ".png"),
    ("explain nowhere.png --model MODEL", "nowhere.png"),
    ("explain IMAGES --model MODEL", "IMAGES"),
    ("interpolate IMAGES --model MODEL --prompt a", "--prompt"),
    ("studio --study nowhere", "nowhere", "diffva study"),
    ("study nowhere --out x", "nowhere", "diffva generate"),
    ("readers nowhere", "nowhere", "diffva study"),
    ("inspect nowhere", "nowhere"),
    ("phantoms x --classes Foo", "Foo", "Normal"),
    ("paper --model nowhere --out x --quick", "--model nowhere"),
]


FAQ = (Path(__file__).parents[2] / "docs" / "faq.md").read_text()
SOURCES = "".join(path.read_text() for path in (Path(__file__).parents[2] / "diffva_ray").rglob("*.py"))


def test_the_faq_quotes_our_messages() -> None:
    quoted = re.findall(r"^\*\*`([^`]+)`", FAQ, re.M)
    assert len(quoted) >= 5
    gone = [text for text in quoted if not all(part.strip(" :") in SOURCES for part in text.split("..."))]
    assert not gone, f"docs/faq.md quotes messages that no longer exist: {gone}"


def test_every_verb_is_covered() -> None:
    assert set(main.commands) - {"demo"} <= {line.split()[0] for line, *_ in WRONG}


@pytest.mark.parametrize(("line", "named"), [(line, named) for line, *named in WRONG], ids=[line for line, *_ in WRONG])
def test_a_wrong_command_prints_one_line(
    line: str, named: list[str], images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"IMAGES": str(images), "MODEL": str(model), "LONG": LONG}
    result = CliRunner().invoke(main, [names.get(word, word.replace("LONG", LONG)) for word in line.split()])
    errors = [
        text for text in result.output.splitlines() if text and not text.startswith(("Usage:", "Try ", "recipe "))
    ]
    assert (result.exit_code, len(errors)) == (2, 1), result.output
    unnamed = [word for word in named if names.get(word, word) not in errors[0]]
    assert not unnamed, f"{unnamed} not in: {errors[0]}"
    assert list(tmp_path.iterdir()) == []
