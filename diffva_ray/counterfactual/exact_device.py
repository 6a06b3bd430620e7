"""Makes a GPU compute the same pixels each time: kernels and number formats follow from the settings alone."""

from __future__ import annotations

import os

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
    cuda, cudnn = torch.version.cuda, torch.backends.cudnn.version()
    return f"{torch.cuda.get_device_name(device)}, CUDA {cuda}, cuDNN {cudnn}"
