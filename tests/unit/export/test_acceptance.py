"""The rule of --accept: what it selects, and that nothing but a condition on columns is evaluated."""

from __future__ import annotations

import pyarrow as pa
import pytest

from diffva_ray.data.dataset import UnusableData
from diffva_ray.export.acceptance import Rule
from diffva_ray.schema import RECORDS

ROWS = [
    {"ssim": 0.9, "judge_counterfactual": 0.8, "judge_image": 0.1, "label": "COVID", "sample": 0},
    {"ssim": 0.9, "judge_counterfactual": 0.3, "judge_image": 0.2, "label": "Normal", "sample": 1},
    {"ssim": 0.7, "judge_counterfactual": None, "judge_image": None, "label": "COVID", "sample": 0},
]
TABLE = pa.Table.from_pylist(ROWS, schema=RECORDS)


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("", [True, True, True]),
        ("ssim > 0.8 and judge_counterfactual > 0.5", [True, False, False]),
        ("ssim < 0.8 or judge_counterfactual > 0.5", [True, False, True]),
        ("judge_counterfactual - judge_image > 0.5", [True, False, False]),
        ("not judge_counterfactual > 0.5", [False, True, False]),  # unknown stays unknown
        ("not (ssim > 0.8)", [False, False, True]),
        ("0.5 < ssim < 0.8", [False, False, True]),
        ("-ssim < -0.8", [True, True, False]),
        ('label == "COVID"', [True, False, True]),
        ('label in ("Normal", "Other")', [False, True, False]),
        ('label not in ["Normal"]', [True, False, True]),
        ("sample == 0", [True, False, True]),
        (" ssim\n > 0.8 ", [True, True, False]),
    ],
)
def test_a_rule_selects_records(text: str, accepted: list[bool]) -> None:
    assert Rule(text, RECORDS).accepts(TABLE).tolist() == accepted


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('__import__("os").system("true")', "no column __import__"),
        ("ssim.__class__ == 1", "not allowed"),
        ("label[0] == 1", "not allowed"),
        ("(lambda: ssim)() > 1", "not allowed"),
        ("[x for x in (1, 2)] == 1", "no column x"),
        ("(ssim := 1) > 0", "not allowed"),
        ("ssim ** 9 > 1", "not allowed"),
        ('f"{ssim}" == "1"', "not allowed"),
        ("ssim is None", "use <"),
        ("label in ssim", "use <"),
        ("ssim > True", "not allowed"),
        ("sim > 0.8", "ssim"),
        ("ssim > 0.8 and", "write it as"),
        ("ssim > 0.8; 1", "write it as"),
        ("ssim", "not a condition"),
        ("1 < 2", "not a condition"),
        ("label > 0.5", "mixed"),
        ('ssim == "0.8"', "mixed"),
        ("label and ssim > 1", "mixed"),
        ("ssim > 0" + " and ssim > 0" * 100, "characters"),
        ("(" * 400 + "ssim" + ")" * 400 + " > 0", "write it as"),
    ],
)
def test_anything_else_is_refused_in_one_line(text: str, named: str) -> None:
    with pytest.raises(UnusableData) as caught:
        Rule(text, RECORDS)
    assert named in str(caught.value)
    assert str(caught.value).startswith('--accept "')
    assert len(str(caught.value).splitlines()) == 1


def test_reasons_name_the_conditions_that_do_not_hold() -> None:
    rows = [{"ssim": 0.9, "l1": 0.1}, {"ssim": 0.5, "l1": 0.1}, {"ssim": 0.5, "l1": 0.9}, {"ssim": None, "l1": 0.1}]
    table = pa.Table.from_pylist(rows, schema=RECORDS)
    rule = Rule("ssim > 0.8 and l1 < 0.2", RECORDS)
    assert rule.reasons(table) == ["", "not ssim > 0.8", "not ssim > 0.8; not l1 < 0.2", "not ssim > 0.8"]
    assert Rule("ssim > 0.8 or l1 < 0.2", RECORDS).reasons(table)[2] == "not (ssim > 0.8 or l1 < 0.2)"
    for accepted, reason in zip(rule.accepts(table), rule.reasons(table)):
        assert accepted == (reason == "")
    with pytest.raises(UnusableData, match="not a condition on a column"):
        Rule("ssim > 0.8 and 1 < 2", RECORDS)
