"""Factors of a phantom that words can name: age, sex and view, and side, zone, size and severity of its findings.

Size and severity are numbers in [0, 1], of which a word names a third. The effects of age, sex and view on the anatomy
are plausible, not measured: docs/phantoms.md states each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffva_ray.data.places import SEVERITIES, SIDES, SIZES, ZONES
from diffva_ray.data.thorax import Thorax

SEXES, VIEWS = ("F", "M"), ("PA", "AP")
AGES = (20, 90)  # youngest and oldest patient in years
SECOND = 0.3  # probability of a second finding
FACTORS = ("age", "sex", "view", "side", "zone", "size", "severity", "second")
OF_A_CLASS = {  # factors of the findings of a class; COVID and Viral Pneumonia are always on both sides
    "Lung_Opacity": ("side", "zone", "size", "severity"),
    "COVID": ("severity",),
    "Viral Pneumonia": ("severity",),
    "Cardiomegaly": ("severity",),
    "Pneumothorax": ("side", "size"),
    "Mass": ("side", "zone", "size"),
}
BILATERAL = ("COVID", "Viral Pneumonia")
SECONDS = ("Lung_Opacity", "Mass", "Pneumothorax", "Cardiomegaly")  # classes of a second finding


@dataclass(frozen=True)
class Finding:
    """One finding; a factor that its class does not have is "" or None."""

    label: str  # a key of OF_A_CLASS
    side: str = ""  # of SIDES, or "bilateral"
    zone: str = ""  # of ZONES
    size: float | None = None  # in [0, 1]
    severity: float | None = None  # in [0, 1]

    def words(self) -> dict[str, str]:
        """The factors as words; "" for those that the class does not have."""
        return {
            "side": self.side,
            "zone": self.zone,
            "size": "" if self.size is None else third(self.size, SIZES),
            "severity": "" if self.severity is None else third(self.severity, SEVERITIES),
        }


@dataclass(frozen=True)
class Factors:
    """The factors of one image; without findings the image is normal."""

    age: int  # in years
    sex: str  # F or M
    view: str  # PA or AP
    findings: tuple[Finding, ...] = ()  # at most two; the first is the class of the image

    @property
    def label(self) -> str:
        """Class of the image."""
        return self.findings[0].label if self.findings else "Normal"

    def columns(self) -> dict[str, str]:
        """Columns of the manifest, as text; those of the second finding begin with ``second``."""
        first, second = (*(finding.words() for finding in self.findings), {}, {})[:2]
        names = ("side", "zone", "size", "severity")
        return {
            "age": str(self.age),
            "sex": self.sex,
            "view": self.view,
            **{name: first.get(name, "") for name in names},
            "second": self.findings[1].label if len(self.findings) > 1 else "",
            **{f"second_{name}": second.get(name, "") for name in names},
        }


def third(value: float, words: Sequence[str]) -> str:
    """The word for the third of [0, 1] that holds ``value``."""
    return words[min(int(3 * value), 2)]


def sample_factors(label: str, rng: np.random.Generator) -> Factors:
    """Factors of an image of a class, each independent of the others. Raises ValueError for a class without factors."""
    if label != "Normal" and label not in OF_A_CLASS:
        raise ValueError(f"no factors for class {label!r}; there are Normal, {', '.join(OF_A_CLASS)}")
    age, sex, view = int(rng.integers(AGES[0], AGES[1] + 1)), str(rng.choice(SEXES)), str(rng.choice(VIEWS))
    if label == "Normal":
        return Factors(age, sex, view)
    findings = [_sample_finding(label, rng)]
    second = str(rng.choice([name for name in SECONDS if name != label]))
    other = _sample_finding(second, rng)
    return Factors(age, sex, view, (*findings, *([other] if rng.random() < SECOND else [])))


def _sample_finding(label: str, rng: np.random.Generator) -> Finding:
    side, zone, size, severity = rng.choice(SIDES), rng.choice(ZONES), rng.random(), rng.random()
    drawn: dict[str, Any] = {"side": str(side), "zone": str(zone), "size": float(size), "severity": float(severity)}
    own = {name: drawn[name] for name in OF_A_CLASS[label]}
    return Finding(label, **({"side": "bilateral"} if label in BILATERAL else {}) | own)


def single_changes(factors: Factors) -> dict[str, Factors]:
    """The factors with one of them replaced, by its name: 20 years older (younger where that is too old), the other
    sex, the other view, the other side, the next zone from top to bottom, size or severity changed by a half, and
    without the second finding."""
    older = factors.age + (20 if factors.age + 20 <= AGES[1] else -20)
    changed = {
        "age": replace(factors, age=older),
        "sex": replace(factors, sex=_other(factors.sex, SEXES)),
        "view": replace(factors, view=_other(factors.view, VIEWS)),
    }
    if not factors.findings:
        return changed
    first, *rest = factors.findings
    values: dict[str, Any] = {
        "side": _other(first.side, SIDES) if first.side in SIDES else None,
        "zone": _other(first.zone, ZONES) if first.zone else None,
        "size": None if first.size is None else (first.size + 0.5) % 1,
        "severity": None if first.severity is None else (first.severity + 0.5) % 1,
    }
    changed |= {
        name: replace(factors, findings=(replace(first, **{name: value}), *rest))
        for name, value in values.items()
        if value is not None
    }
    if rest:
        changed["second"] = replace(factors, findings=(first,))
    return changed


def _other(value: str, among: Sequence[str]) -> str:
    return among[(among.index(value) + 1) % len(among)]


def with_factors(thorax: Thorax, factors: Factors) -> Thorax:
    """The anatomy of a patient of phantom v1, taken as 50 years old and imaged PA, at another age, sex and view."""
    decades = (factors.age - 50) / 10  # from -3 to 4
    female, frontal = factors.sex == "F", factors.view == "AP"
    # with age: less bone, a larger heart, an unfolded aorta, lower lungs
    bone = 1 - 0.10 * decades
    heart = 1 + 0.02 * decades
    aorta = 1 + 0.075 * decades
    height = 1 - 0.025 * decades
    # women: breast tissue over the lungs, lower lungs
    breast = 0.08 + 0.6 * thorax.breast if female else 0.15 * thorax.breast
    height *= 0.97 if female else 1.03
    # anterior-posterior: a magnified heart, less inspiration, higher clavicles, shoulder blades over the lungs
    if frontal:
        heart, height = heart * 1.12, height * 0.94
    right, left = (thorax.lung_apex + (base - thorax.lung_apex) * height for base in thorax.lung_base)
    lowered = left - thorax.lung_base[1]
    return replace(
        thorax,
        bone=bone,
        heart_size=heart,
        aorta=aorta,
        breast=breast,
        lung_base=(right, left),
        heart_centre=(thorax.heart_centre[0], thorax.heart_centre[1] + 0.8 * lowered),  # it lies on the diaphragm
        clavicle=thorax.clavicle - (0.07 if frontal else 0.0),
        scapula=0.10 if frontal else 0.0,
    )
