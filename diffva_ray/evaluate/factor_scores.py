"""What an edit changed and what it kept, by the model's factor classifier: sides of findings, sex, view, age."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffva_ray.config.prompts import wanted
from diffva_ray.data.places import SIDES
from diffva_ray.evaluate.tables import by_label
from diffva_ray.metrics.intervals import group_bootstrap, proportion_interval
from diffva_ray.schema import TableRow

if TYPE_CHECKING:  # these load torch
    from diffva_ray.metrics.factors import Factor, FactorClassifier

BEFORE, AFTER = "factor_before:", "factor_after:"  # columns of a record's scores, followed by the factor's name
_WORDS = {"sex": ({"woman", "female"}, {"man", "male"}), "view": ({"ap"}, {"pa"})}  # words that ask for yes, for no


def factor_scores(
    classifier: FactorClassifier | None, before: NDArray[np.float32], after: NDArray[np.float32]
) -> TableRow:
    """Probability of yes for each factor in image and counterfactual [H, W]."""
    if classifier is None:
        return {}
    first, second = classifier.probabilities(np.stack([before, after]))
    names = [factor.name for factor in classifier.factors]
    return {
        **{BEFORE + name: float(value) for name, value in zip(names, first, strict=True)},
        **{AFTER + name: float(value) for name, value in zip(names, second, strict=True)},
    }


def factor_answers(
    classifier: FactorClassifier | None,
    before: NDArray[np.float32],
    after: NDArray[np.float32],
    prompt: str,
    prompts: Mapping[str, str],
    healthy: str,
) -> list[TableRow]:
    """For each factor: what yes and no mean, what the prompt asks for (None: nothing), the probabilities of yes in
    image and counterfactual [H, W], and how often the classifier is right. ``prompts`` and ``healthy``: as for
    ``asks``."""
    if classifier is None:
        return []
    scores = factor_scores(classifier, before, after)
    return [
        {
            "factor": factor.name, "otherwise": factor.otherwise, "asked": asks(prompt, factor, prompts, healthy),
            "before": scores[BEFORE + factor.name], "after": scores[AFTER + factor.name],
            "accuracy": factor.accuracy, "chance": factor.chance,
        }
        for factor in classifier.factors
    ]  # fmt: skip


def asks(prompt: str, factor: Factor, prompts: Mapping[str, str], healthy: str) -> bool | None:
    """The answer that a prompt asks for; None if the factor is not its subject. ``prompts``: of the classes, of which
    ``healthy`` is the healthy one's name."""
    text = wanted(prompt).casefold()
    words = set(re.findall(r"\w+", text))
    if factor.kind == "age":
        years = re.search(r"\b(\d{1,3})[ -]years?[ -]old", text)
        return None if years is None else int(years[1]) >= int(factor.value)
    if factor.kind in _WORDS:
        yes, no = (bool(words & those) for those in _WORDS[factor.kind])
        return yes if yes != no else None
    named = [label for label, name in prompts.items() if _contains(text, name)]
    if named == [healthy]:
        return False
    sides = words & {*SIDES, "bilateral"}
    if factor.label not in named or not sides:
        return None
    if factor.value in sides or "bilateral" in sides:
        return True
    return None if len(named) > 1 else False


def _contains(text: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name.casefold())}\b", text) is not None


def factor_rows(
    scores: list[TableRow], classifier: FactorClassifier | None, prompts: Mapping[str, str], healthy: str
) -> list[TableRow]:
    """For each class, prompt and factor: how often the counterfactual has the answer that the prompt asks for, or, for
    a factor that it does not name, the answer of the image. ``accuracy`` is the classifier's own, beside ``chance``."""
    frame = pd.DataFrame(scores)
    if classifier is None or "prompt" not in frame:
        return []
    rows: list[TableRow] = []
    for label, members in by_label(frame):
        for prompt, group in members.groupby("prompt", sort=True):
            for factor in classifier.factors:
                wish = asks(str(prompt), factor, prompts, healthy)
                rows.append(_row(label, str(prompt), group, factor, wish))
    return rows


def _row(label: str, prompt: str, group: pd.DataFrame, factor: Factor, wish: bool | None) -> TableRow:
    before, after = (group[column + factor.name].to_numpy(float) for column in (BEFORE, AFTER))
    aim = before > 0.5 if wish is None else np.full(len(after), wish)
    right, gain = ((after > 0.5) == aim).astype(float), after - before
    return {
        "label": label, "prompt": prompt, "factor": factor.name,
        "asked": "as before" if wish is None else "yes" if wish else "no", "n": len(group),
        "right": float(right.mean()), "right_interval": list(proportion_interval(right, group["group"].to_numpy())),
        "before": float(before.mean()), "after": float(after.mean()),
        "change_interval": list(group_bootstrap(gain, group["group"].tolist())),
        "accuracy": factor.accuracy, "chance": factor.chance,
    }  # fmt: skip
