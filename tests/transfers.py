"""Counts what makes the CPU wait for a GPU, on a machine without one.

PyTorch's ``meta`` device is the GPU here: it computes shapes alone, and every copy from or to it is seen and counted. A
copy of pageable memory makes the CPU wait until the GPU has done all earlier work.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("meta")
aten = torch.ops.aten


class Transfers(TorchDispatchMode):
    """Counts copies between CPU and GPU, and values that the CPU reads."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()
        self.factories = _Factories(self.counts)

    def __enter__(self) -> Transfers:
        self.factories.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.factories.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, leaves = function.overloadpacket, tree_leaves((args, kwargs))
        devices = [leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if name in (aten._to_copy, aten.to):  # the second is not split up in inference mode
            named = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
            target = [*devices, *named][-1]
            if devices[0] != target:
                waits = "" if target != GPU or not kwargs.get("non_blocking") else ", without a wait"
                self.counts[("to the GPU" if target == GPU else "to the CPU") + waits] += 1
            if devices[0] == GPU != target:
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        elif name is aten.copy_ and devices[0] != devices[1]:
            self.counts["to the GPU" if devices[0] == GPU else "to the CPU"] += 1
            return args[0]
        elif name in (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero) and GPU in devices:
            self.counts["to the CPU"] += 1
            return 0
        elif name in (aten.index, aten.index_put_) and len({*devices}) > 1:
            self.counts["to the GPU"] += 1  # indices that lie on the CPU
        return function(*args, **kwargs)


class _Factories(TorchFunctionMode):
    """Counts tensors that are made of Python's numbers on the GPU, and lists made of a tensor; dispatch does not see
    them."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        if made and torch.device(kwargs.get("device") or "cpu") == GPU:
            self.counts["to the GPU"] += 1
        if function is torch.Tensor.tolist and args[0].device == GPU:
            self.counts["to the CPU"] += 1
            return torch.zeros(args[0].shape, dtype=args[0].dtype).tolist()
        return function(*args, **kwargs)
