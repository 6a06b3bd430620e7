"""The GPU: kernels and number formats that follow from the settings alone, its name, its errors."""

from __future__ import annotations

import os
import re
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


# How torch, cuDNN, cuBLAS and NCCL begin the message of an error of the GPU or of its driver; after most of them the
# process cannot use the GPU any more (tests/unit/counterfactual/test_device_errors.py has them, with sources).
DEVICE_ERRORS = re.compile(
    r"CUDA error|cuda runtime error|CUDA unknown error|CUDA driver|Cuda failure|No CUDA GPUs are available"
    r"|cuDNN error|CUDNN_STATUS|CUBLAS_STATUS|CUSOLVER_STATUS|CUFFT_|NCCL error|nccl\w+Error|NVML_ERROR|\bXid\b"
    r"|uncorrectable ECC|fallen off the bus"
)
INSTALLATION = re.compile(
    r"no kernel image|driver version is insufficient|not compiled with CUDA|driver on your system"
)


def is_device_error(error: BaseException) -> bool:
    """Whether a GPU failed. Neither too little memory, nor a torch that does not fit the GPU or its driver."""
    text = str(error)
    known = bool(DEVICE_ERRORS.search(text)) and not INSTALLATION.search(text)
    return isinstance(error, RuntimeError) and known and not is_out_of_memory(error)
