"""The moving average of weights: diffusers' numbers, without a second copy of the parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffva_ray.train.training_step import Average


class Made(TorchDispatchMode):
    """Remembers the new tensors of the operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0  # numbers in the results of one operation

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        in_place = any(argument.alias_info and argument.alias_info.is_write for argument in function._schema.arguments)
        if not in_place:
            results = output if isinstance(output, (list, tuple)) else [output]
            self.most = max(self.most, sum(value.numel() for value in results if isinstance(value, torch.Tensor)))
        return output


@pytest.mark.parametrize("foreach", [True, False])
def test_the_average_is_that_of_diffusers_bit_for_bit_and_in_place(foreach: bool) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((5,), (3, 7), (1000,), (33, 9, 3))]
    largest = max(parameter.numel() for parameter in parameters)
    theirs, ours = (kind(parameters, decay=0.995, foreach=foreach) for kind in (EMAModel, Average))
    for _ in range(40):  # the decay grows with the steps
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        theirs.step(parameters)
        with Made() as made:
            ours.step(parameters)
        assert made.most <= largest
        assert all(map(torch.equal, theirs.shadow_params, ours.shadow_params))
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert made.most == (0 if foreach else largest)
