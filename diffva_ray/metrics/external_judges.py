"""Judges from outside the run's model, which decide whether an image and its counterfactual are healthy.

``torchxrayvision=WEIGHTS`` is one of that package's DenseNets; ``judge=MODEL`` is the judge of another model folder,
for example of another training seed. Weights are given by path; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffva_ray.metrics.extractors import densenet, features2
from diffva_ray.metrics.validity import load_judge
from diffva_ray.storage.opening import open_store

# Findings that make a lung opaque, by torchxrayvision's names; the abnormal classes of the data sets are made of them.
OPACITIES = ("Lung Opacity", "Pneumonia", "Consolidation", "Infiltration")


@dataclass(frozen=True)
class ExternalJudge:
    """A judge and its probability of "no finding"; above 0.5 it calls an image healthy."""

    name: str  # in tables
    sha256: str  # of the weights
    says: str  # how the probability is computed, for the caption of a table
    healthy: Callable[[NDArray[np.float32]], NDArray[np.float64]]  # grey images [n, H, W] in [0, 1] -> probability [n]


def torchxrayvision_judge(weights: str | Path) -> ExternalJudge:
    """1 - the largest of torchxrayvision's outputs for OPACITIES, each scaled by the package's ``op_norm``, so that 0.5
    is its operating point. The package looks up findings and operating points by the file's name.

    Raises ValueError for another file, and without the package.
    """
    network, sha256 = densenet(weights)
    from torchxrayvision.models import model_urls, op_norm

    # Findings and operating points of these weights.
    file = Path(weights).name
    entry = next((entry for entry in model_urls.values() if entry["weights_url"].endswith(f"/{file}")), None)
    if entry is None or "op_threshs" not in entry:
        raise ValueError(
            f"{weights}: torchxrayvision has no operating points for a file of this name; keep the name it was "
            "downloaded under"
        )
    points = torch.tensor(entry["op_threshs"], dtype=torch.float32)
    labels = entry["labels"]
    opacities = [n for n, label in enumerate(labels) if label in OPACITIES and not torch.isnan(points[n])]
    if not opacities or network.classifier.out_features != len(labels):
        raise ValueError(
            f"{weights}: its outputs are not the {len(labels)} findings of {file}, with an opacity in them"
        )

    @torch.inference_mode()
    def healthy(images: NDArray[np.float32]) -> NDArray[np.float64]:
        features = features2(network, torch.from_numpy(images)[:, None])
        scaled: torch.Tensor = op_norm(network.classifier(features).sigmoid(), points)
        return 1 - scaled[:, opacities].amax(dim=1).double().numpy()

    says = f"1 - the largest of {', '.join(labels[n] for n in opacities)}, at their operating points"
    return ExternalJudge("torchxrayvision", sha256, says, healthy)


def judge_of(model: str) -> ExternalJudge:
    """The judge of the model folder ``model``. Raises ValueError for a model without one."""
    store = open_store(model)
    judge = load_judge(store)
    if judge is None:
        raise ValueError(f"judge={model}: no judge there; name a model folder that has one")
    sha256 = hashlib.sha256(store.read("judge/model.safetensors")).hexdigest()
    says = f"its calibrated probability of {judge.healthy}"
    return ExternalJudge(f"judge of {Path(model).name}", sha256, says, judge.healthy_probability)


JUDGES: dict[str, Callable[[str], ExternalJudge]] = {"torchxrayvision": torchxrayvision_judge, "judge": judge_of}


def open_judge(option: str) -> ExternalJudge:
    """The judge of an option ``NAME=PATH``. Raises ValueError that names the option, the file and the fault."""
    name, _, path = option.partition("=")
    if name not in JUDGES or not path:
        raise ValueError(f"--judge {option}: write one of {', '.join(f'{each}=PATH' for each in JUDGES)}")
    try:
        return JUDGES[name](path)
    except ValueError as error:
        raise ValueError(f"--judge {error}") from None


def open_judges(options: Sequence[str]) -> list[ExternalJudge]:
    """The judges of several options ``NAME=PATH``, under unique names, because tables refer to them by name: judges of
    one name (model folders of one name) get the first digits of their sha256. Raises ValueError as ``open_judge``, and
    for the same weights twice."""
    judges = [open_judge(option) for option in options]
    first = dict[str, str]()
    for option, judge in zip(options, judges):
        if judge.sha256 in first:
            same = first[judge.sha256]
            raise ValueError(f"--judge {option}: the same weights as --judge {same}; give each judge once")
        first[judge.sha256] = option
    names = [judge.name for judge in judges]
    return [
        replace(judge, name=f"{judge.name} ({judge.sha256[:8]})") if names.count(judge.name) > 1 else judge
        for judge in judges
    ]
