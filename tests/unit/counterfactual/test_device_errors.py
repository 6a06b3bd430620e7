"""Errors of a GPU are told by their messages, as people have reported them."""

from __future__ import annotations

import pytest
import torch

from diffva_ray.counterfactual.exact_device import is_device_error, is_out_of_memory

GPU = {  # message: where it was reported, on github.com
    "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported": (
        "huggingface/accelerate#1192, vllm-project/vllm#5222"
    ),
    "cuda runtime error (39) : uncorrectable ECC error encountered at THCCachingHostAllocator.cpp:265": (
        "NVIDIA/semantic-segmentation#33"
    ),
    "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress'": "pytorch/helion#867",
    "CUDA error: unspecified launch failure": "pytorch/pytorch#74235",
    "cuda runtime error (4) : unspecified launch failure at THCTensorCopy.cu:85": "pytorch/pytorch#2567",
    "CUDA error: an illegal instruction was encountered": "index-tts/index-tts#336",
    "CUDA error: device-side assert triggered": "huggingface/trl#4131",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED": "jianweif/OptimalGradCheckpointing#5",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n, k, &falpha": (
        "isl-org/DPT#4"
    ),
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, unhandled cuda error, NCCL version 2.20.5\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.": "NVIDIA/nccl#1410",
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 999 'unknown error'": (
        "pytorch/pytorch#170045"
    ),
    "No CUDA GPUs are available": "yuangh-x/2022-NIPS-Tenrec#29",
    "CUDA unknown error - this may be due to an incorrectly set up environment": "pytorch/pytorch#115340",
    "CUDA driver initialization failed, you might not have a CUDA gpu.": "ErlerPhilipp/points2surf#17",
}
OTHERS = (
    "The size of tensor a (4) must match the size of tensor b (8) at non-singleton dimension 1",
    "Torch not compiled with CUDA enabled",
    "CUDA error: no kernel image is available for execution on the device",
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
    "DataLoader worker (pid 4711) is killed by signal: Killed.",
)
MEMORY = (
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


@pytest.mark.parametrize("message", GPU)
def test_an_error_of_the_gpu_blames_it(message: str) -> None:
    assert is_device_error(RuntimeError(message)), GPU[message]
    assert not is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize("message", OTHERS)
def test_other_errors_do_not(message: str) -> None:
    assert not is_device_error(RuntimeError(message))


@pytest.mark.parametrize("error", [*map(RuntimeError, MEMORY), torch.OutOfMemoryError("CUDA out of memory.")])
def test_too_little_memory_is_none(error: RuntimeError) -> None:
    assert is_out_of_memory(error)
    assert not is_device_error(error)


def test_a_file_that_names_cuda_does_not() -> None:
    assert not is_device_error(FileNotFoundError("/data/CUDA error.png"))
