"""What the parts of the paper's page share: the inputs, and what was made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diffva_ray.config.recipe import Recipe
from diffva_ray.data.dataset import Dataset
from diffva_ray.evaluate.records import Boxes
from diffva_ray.generate.run import Run
from diffva_ray.storage.store import Store
from diffva_ray.workflows.execution import Execution


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is asked for; see ``diffva paper --help``."""

    radiography: str | None
    chexpert: str | None
    model: str
    out: str
    quick: bool = False
    limit: int | None = None
    weights: str | None = None
    resize: Literal["clean", "legacy"] = "clean"
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    boxes: str | None = None
    brixia: str | None = None
    execution: Execution = field(default_factory=Execution)


@dataclass
class Made:
    """The runs that exist now, their metrics, and what could not be made (what, why)."""

    store: Store
    base: Recipe
    card: dict[str, Any]
    radiography: str
    chexpert: str | None
    options: Inputs
    boxes: Boxes = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def settings_of(run: Run, prompt: bool = True) -> str:
    """The settings of a run for captions, with its prompt unless it sweeps prompts."""
    keys = run.keys
    return (
        f"{keys['method']}, {keys['scheduler']}, strength {keys['strength']:g}, guidance {keys['guidance_scale']:g}, "
        f"{keys['num_inference_steps']} steps"
    ) + (f", prompt “{keys['prompt']}”" if prompt else "")


def abnormal_classes(dataset: Dataset, healthy: str) -> Sequence[str]:
    """The classes to generate, those of the paper first."""
    from diffva_ray.paper.published import CLASSES

    there = [label for label in dataset.classes if label != healthy]
    return [*(label for label in CLASSES if label in there), *(label for label in there if label not in CLASSES)]
