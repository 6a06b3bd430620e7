"""The engine under torch.compile, for real: minutes of compiling, then the same pictures to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffva_ray.config.recipe import Recipe
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.phantoms import phantom
from diffva_ray.generate.compilation import compile_networks
from diffva_ray.model.bundle import build

TOLERANCE = 1e-5  # of grey values in [0, 1], in float32: docs/throughput.md states it


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_compiled_pictures_are_the_same_to_rounding(tiny: Recipe) -> None:
    """Each network as one graph, and the UNet as two: for the guess, which reads one prompt, and for both branches of
    guidance, which share their start."""
    assert tiny.generate.source_prompt == "<guess>"
    config = tiny.generate.model_copy(update={"micro_batch": 2})
    images = [phantom("COVID", number, 9, 32).image for number in range(2)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = []
    for compiled in (False, True):
        engine = CounterfactualEngine(build(tiny), config, "cpu")
        if compiled:
            compile_networks(engine)
        batch = engine(images, [0, 1])
        made.append((batch.counterfactuals, batch.reconstructions))
    for eager, ours in zip(*made, strict=True):
        assert np.abs(eager - ours).max() < TOLERANCE
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert not torch._dynamo.utils.counters["graph_break"]
