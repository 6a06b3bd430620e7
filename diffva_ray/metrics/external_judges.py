"""Judges that this project did not train: whether somebody else's network calls an image and its counterfactual
healthy.

By name: ``torchxrayvision=WEIGHTS``, one of that package's DenseNets, and ``judge=MODEL``, the judge of another model
folder (another training seed, say). Weights come by path and nothing is downloaded.
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
from diffva_ray.storage.store import open_store

# Findings that make a lung opaque, as torchxrayvision calls them: what the classes generated here are made of.
OPACITIES = ("Lung Opacity", "Pneumonia", "Consolidation", "Infiltration")


@dataclass(frozen=True)
class ExternalJudge:
    """``healthy``: from grey images [n, H, W] in [0, 1] to the probability [n] of "nothing wrong"; above 0.5 is a
    verdict of healthy. ``says`` is what that probability is made of, for the caption of a table."""

    name: str
    sha256: str
    says: str
    healthy: Callable[[NDArray[np.float32]], NDArray[np.float64]]


def torchxrayvision_judge(weights: str | Path) -> ExternalJudge:
    """1 - the largest of torchxrayvision's outputs for OPACITIES, each scaled as there so that 0.5 is its operating
    point (``op_norm``). Findings and operating points are those that the package has for a file of this name.

    Raises ValueError, one line, for another file and when the package is missing.
    """
    network, sha256 = densenet(weights)
    from torchxrayvision.models import model_urls, op_norm

    file = Path(weights).name
    known = next((about for about in model_urls.values() if about["weights_url"].endswith(f"/{file}")), None)
    if known is None or "op_threshs" not in known:
        raise ValueError(
            f"{weights}: torchxrayvision has no operating points for a file of this name; keep the name it was "
            "downloaded under"
        )
    points = torch.tensor(known["op_threshs"], dtype=torch.float32)
    labels = known["labels"]
    told = [n for n, label in enumerate(labels) if label in OPACITIES and not torch.isnan(points[n])]
    if not told or network.classifier.out_features != len(labels):
        raise ValueError(
            f"{weights}: its outputs are not the {len(labels)} findings of {file}, with an opacity in them"
        )

    @torch.inference_mode()
    def healthy(images: NDArray[np.float32]) -> NDArray[np.float64]:
        features = features2(network, torch.from_numpy(images)[:, None])
        scaled = op_norm(network.classifier(features).sigmoid(), points)
        return 1 - scaled[:, told].amax(dim=1).double().numpy()

    says = f"1 - the largest of {', '.join(labels[n] for n in told)}, at their operating points"
    return ExternalJudge("torchxrayvision", sha256, says, healthy)


def judge_of(model: str) -> ExternalJudge:
    """The judge of the model folder ``model``. Raises ValueError, one line, for a model without one."""
    store = open_store(model)
    judge = load_judge(store)
    if judge is None:
        raise ValueError(f"judge={model}: no judge there; name a model folder that has one")
    sha256 = hashlib.sha256(store.read("judge/model.safetensors")).hexdigest()
    says = f"its calibrated probability of {judge.healthy}"
    return ExternalJudge(f"judge of {Path(model).name}", sha256, says, judge.healthy_probability)


JUDGES: dict[str, Callable[[str], ExternalJudge]] = {"torchxrayvision": torchxrayvision_judge, "judge": judge_of}


def open_judge(asked: str) -> ExternalJudge:
    """``NAME=PATH``. Raises ValueError, one line that names the option, the file and what is wrong with it."""
    name, _, path = asked.partition("=")
    if name not in JUDGES or not path:
        raise ValueError(f"--judge {asked}: write one of {', '.join(f'{known}=PATH' for known in JUDGES)}")
    try:
        return JUDGES[name](path)
    except ValueError as error:
        raise ValueError(f"--judge {error}") from None


def open_judges(asked: Sequence[str]) -> list[ExternalJudge]:
    """The judges of several ``NAME=PATH``, each under a name of its own, since tables tell them apart by it: where two
    would be called the same (model folders of one name), the first digits of their sha256 follow. Raises ValueError as
    ``open_judge``, and for the same weights twice."""
    judges = [open_judge(text) for text in asked]
    first = dict[str, str]()
    for text, judge in zip(asked, judges):
        if judge.sha256 in first:
            raise ValueError(f"--judge {text}: the same weights as --judge {first[judge.sha256]}; give each judge once")
        first[judge.sha256] = text
    names = [judge.name for judge in judges]
    return [
        replace(judge, name=f"{judge.name} ({judge.sha256[:8]})") if names.count(judge.name) > 1 else judge
        for judge in judges
    ]
