"""The engine under torch.compile, for real: minutes of compiling, then the same pictures to rounding."""

from __future__ import annotations

import numpy as np
import pytest

from diffva_ray.config.recipe import Recipe
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.phantoms import phantom
from diffva_ray.model.bundle import build


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_compiled_pictures_are_the_same_to_rounding(tiny: Recipe) -> None:
    made = []
    for compiled in (False, True):
        engine = CounterfactualEngine(build(tiny), tiny.generate.model_copy(update={"micro_batch": 2}), "cpu")
        if compiled:
            engine.compile()
        images = [phantom("COVID", number, 9, engine.size).image for number in range(2)]
        made.append(engine(images, [0, 1]).counterfactuals)
    assert np.abs(made[0] - made[1]).max() < 1e-5
