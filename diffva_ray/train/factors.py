"""Stage ``factors``: trains the classifier that says what an edit changed and what it kept. It is stored beside the
model and is not part of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from diffva_ray.config.captions import CaptionConfig
from diffva_ray.config.recipe import RecipeError
from diffva_ray.data.captions import Captions
from diffva_ray.data.dataset import LabelledImage
from diffva_ray.data.places import SIDES
from diffva_ray.metrics.factors import Factor, FactorClassifier, measured, save_factors
from diffva_ray.progress import LOG
from diffva_ray.storage.store import Store
from diffva_ray.train.judge import ImageClassifierStage

LEAST = 20  # images with each answer, without which a factor is left out


class FactorsStage(ImageClassifierStage):
    """Trains one classifier of all factors that the data set knows."""

    network: FactorClassifier

    def build(self) -> FactorClassifier:
        data, images = self.context.bundle.recipe.data, self.context.images
        captions = Captions(CaptionConfig(findings=8), data, images.store, images.images, images.shapes)
        members = sorted({*self.held_out, *(index for group in self.order.members.values() for index in group)})
        findings = {index: captions.findings(images.images[index]) for index in members}
        ages = [int(age) for index in members if (age := images.images[index].columns.get("age", "")).isdigit()]
        labels = sorted(set(self.order.members) - {data.healthy_class})
        candidates = [Factor("finding", side, label) for label in labels for side in SIDES]
        candidates += [Factor("sex", "F"), Factor("view", "AP")]
        candidates += [Factor("age", str(int(np.median(ages))))] if ages else []
        answers = np.array(
            [[answer(of, images.images[index], findings[index]) for of in candidates] for index in members]
        )
        counts = [(np.nansum(column), np.nansum(1 - column)) for column in answers.T]
        used = [n for n, (yes, no) in enumerate(counts) if min(yes, no) >= LEAST]
        if not used:
            raise RecipeError(
                f"stage {self.config.name}: no side, sex, view or age is known for {LEAST} images with and {LEAST} "
                "without; give the data set such columns, lesion masks or boxes"
            )
        self._answers = dict(zip(members, answers[:, used], strict=True))
        return FactorClassifier([candidates[n] for n in used])

    def targets(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the answers [n, factors]: 1 for yes, 0 for no, nan where it is unknown."""
        return torch.from_numpy(self._known(indices)).float()

    def error(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of the known answers."""
        known = ~targets.isnan()
        return functional.binary_cross_entropy_with_logits(logits[known], targets[known])

    def export(self, store: Store) -> None:
        if self.held_out:
            answers = np.tile(self._known(self.held_out), (2, 1))
            self.network.factors = measured(self.network.factors, self.held_out_logits(), answers)
            for factor in self.network.factors:
                if factor.accuracy is not None and factor.chance is not None:
                    LOG.info(
                        "%s: right in %.0f %% of %d held-out images (chance %.0f %%)",
                        factor.name, 100 * factor.accuracy, factor.images, 100 * factor.chance,
                    )  # fmt: skip
        save_factors(self.network, store)

    def _known(self, indices: Sequence[int]) -> NDArray[np.float64]:
        return np.stack([self._answers[index] for index in indices])


def answer(factor: Factor, image: LabelledImage, findings: Sequence[tuple[str, str]]) -> float:
    """1 for yes, 0 for no, nan for unknown; ``findings``: label and side ("" for unknown) of each."""
    if factor.kind == "finding":
        sides = [side for label, side in findings if label == factor.label]
        if "" in sides:
            return float("nan")
        return float(bool({factor.value, "bilateral"} & set(sides)))
    told = image.columns.get(factor.kind, "").strip()
    if factor.kind == "age":
        return float(int(told) >= int(factor.value)) if told.isdigit() else float("nan")
    known = {"sex": ("F", "M"), "view": ("AP", "PA")}[factor.kind]
    return float(told.upper() == factor.value) if told.upper() in known else float("nan")
