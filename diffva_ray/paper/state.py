"""Inputs of ``diffva paper`` and the runs and results that its tables and figures share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from diffva_ray.config.recipe import Recipe
from diffva_ray.evaluate.records import Lesions
from diffva_ray.generate.run import Run
from diffva_ray.paper.inputs import Sample
from diffva_ray.schema import Image
from diffva_ray.storage.store import Store
from diffva_ray.workflows.execution import Execution


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Options of ``diffva paper``."""

    radiography: str | None  # URI of the COVID-19 Radiography Database; None: phantoms
    chexpert: str | None  # URI of CheXpert, for table 4
    model: str  # URI of the model
    out: str  # URI of the output folder
    quick: bool = False  # few images; phantoms in place of missing data sets
    limit: int | None = None  # images per class
    weights: str | None = None  # Inception weights, for FID
    resize: Literal["clean", "legacy"] = "legacy"  # before the extractor; the paper's is pytorch-fid's own
    recipe: str | None = None  # None: the model's own
    overrides: tuple[str, ...] = ()  # of --set
    boxes: str | None = None  # CSV of lesion boxes
    brixia: str | None = None  # CSV of readers' Brixia scores
    carcinoma: str | None = None  # a real carcinoma, for figure 4
    base: str | None = None  # URI of the model before fine-tuning, for table 5
    sources: str | None = None  # CSV with the source of each image, for table S12
    execution: Execution = field(default_factory=Execution)


@dataclass
class PaperState:
    """The inputs in place, and everything computed from them so far."""

    store: Store  # the output folder
    base: Recipe  # the model's recipe
    card: dict[str, Any]  # the model's card
    radiography: str  # URI of the images
    options: Inputs
    samples: dict[str, Sample] = field(default_factory=dict)  # random samples, by their names in the sheet
    carcinoma: Image | None = None  # a real carcinoma, or with phantoms a mass
    lesions: Lesions = field(default_factory=dict)  # outlined lesions by image
    runs: dict[str, Run] = field(default_factory=dict)  # finished runs by name of the experiment
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each run, from reduce
    missing: list[tuple[str, str]] = field(default_factory=list)  # (table or figure, why it could not be made)
    notes: list[str] = field(default_factory=list)


def settings_of(run: Run, prompt: bool = True) -> str:
    """The sampling settings of a run for captions, with its prompt unless it sweeps prompts."""
    keys = run.keys
    return (
        f"{keys['method']}, {keys['scheduler']}, strength {keys['strength']:g}, guidance {keys['guidance_scale']:g}, "
        f"{keys['num_inference_steps']} steps"
    ) + (f", prompt “{keys['prompt']}”" if prompt else "")
