"""The GPU: kernels and number formats that follow from the settings alone, its name, its errors."""

from __future__ import annotations

import os
from typing import Any, cast

import torch


def exact_device() -> None:
    """Set torch's switches for this process. Call it before the first computation on the GPU."""
    # cuBLAS reads this when it starts; without it, two streams may sum in different orders.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    # No kernels by timing, none that add in the order in which threads finish.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True

    # float32 is float32: TF32, torch's default in convolutions, has the mantissa of float16.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False

    # cuDNN's attention chooses its kernel by the memory that is free; flash and memory-efficient attention do not.
    torch.backends.cuda.enable_cudnn_sdp(False)


def gpu_name(device: torch.device) -> str:
    """GPU model with the versions of CUDA and cuDNN: all three decide how results are rounded."""
    cuda, cudnn = torch.version.cuda, cast("Any", torch.backends.cudnn).version()
    return f"{torch.cuda.get_device_name(device)}, CUDA {cuda}, cuDNN {cudnn}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU has too little memory, which cuBLAS and cuDNN report as errors of their own."""
    allocations = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(name in str(error) for name in allocations)
