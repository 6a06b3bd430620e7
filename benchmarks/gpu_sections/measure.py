"""Measuring tools: clocks, PyTorch's backend switches, operation counts, memory, and a description of the machine."""

from __future__ import annotations

import gc
import hashlib
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffva_ray.provenance import code_revision, version

Work = Callable[[], Any]
PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "numpy", "scipy", "scikit-image", "pillow")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: by events on the device on CUDA, by the host's clock elsewhere. ``host`` is the time
    until the call returned, which on CUDA is the time that the host needed to submit it, and to wait where it waits."""

    calls: list[float]
    host: list[float]

    def values(self) -> dict[str, Any]:
        return {
            "ms": round(statistics.median(self.calls), 4),
            "ms_least": round(min(self.calls), 4),
            "ms_most": round(max(self.calls), 4),
            "host_ms": round(statistics.median(self.host), 4),
            "calls": len(self.calls),
        }

    @property
    def seconds(self) -> float:
        return statistics.median(self.calls) / 1000


def timed(work: Work, device: torch.device, calls: int = 10, warm_up: int = 3, most_seconds: float = 20.0) -> Timing:
    """Time ``calls`` consecutive calls after a warm-up; fewer (at least 3) if they would take too long."""
    gpu = device.type == "cuda"
    for _ in range(warm_up):
        work()
    settle(device)
    began = time.perf_counter()
    measured, host = [], []
    events = []
    for n in range(calls):
        if n >= 3 and time.perf_counter() - began > most_seconds:
            break
        start, end = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) if gpu else (0, 0)
        if gpu:
            start.record()
        before = time.perf_counter()
        work()
        host.append((time.perf_counter() - before) * 1000)
        if gpu:
            end.record()
            events.append((start, end))
    settle(device)
    measured = [start.elapsed_time(end) for start, end in events] if gpu else list(host)
    return Timing(measured, host)


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    """Free the device's memory."""
    if not torch.cuda.is_available():
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:  # a failed kernel poisons the context; the next row says so
        return
    torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 3) if device.type == "cuda" else None


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


# PyTorch 2.9 has a second set of TF32 switches, and raises where the two are mixed; the first one, which 2.6 has too,
# sets both.
def switches() -> dict[str, Any]:
    """Return the switches that change numbers."""
    found: dict[str, Any] = {}
    for name, holder, key in _SWITCHES:
        try:
            found[name] = getattr(holder, key)
        except RuntimeError:
            found[name] = "mixed"
    found["CUBLAS_WORKSPACE_CONFIG"] = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    return found


_SWITCHES = (
    ("matmul_tf32", torch.backends.cuda.matmul, "allow_tf32"),
    ("cudnn_tf32", torch.backends.cudnn, "allow_tf32"),
    ("cudnn_benchmark", torch.backends.cudnn, "benchmark"),
    ("cudnn_deterministic", torch.backends.cudnn, "deterministic"),
)
DEFAULTS = {"matmul_tf32": False, "cudnn_tf32": True, "cudnn_benchmark": False, "cudnn_deterministic": False}


def switch(**wanted: bool) -> None:
    """Set switches by the names of ``switches``; others stay unchanged."""
    for name, holder, key in _SWITCHES:
        if name in wanted:
            setattr(holder, key, wanted[name])


@contextmanager
def switched(**wanted: bool) -> Iterator[None]:
    """Use PyTorch's defaults with these switches inside the block, then restore."""
    before = {name: value for name, value in switches().items() if isinstance(value, bool)}
    switch(**{**DEFAULTS, **wanted})
    try:
        yield
    finally:
        switch(**{**DEFAULTS, **before})


def tf32(on: bool) -> dict[str, bool]:
    return {"matmul_tf32": on, "cudnn_tf32": on}


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Return ||found - truth|| / ||truth|| in float64; NaN if either contains NaN."""
    a, b = found.detach().double().cpu(), truth.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def operations(work: Work) -> float:
    """Count TFLOP of a call at PyTorch's dispatcher: convolutions, matrix products, attention."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops() / 1e12


def launches(work: Work, device: torch.device) -> int | None:
    """Count kernels and copies that one call starts on the device, with PyTorch's profiler."""
    if device.type != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    work()
    settle(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        settle(device)
    return sum(event.device_type == DeviceType.CUDA for event in seen.events())


@dataclass
class Busy:
    """What NVML says of the device at 20 Hz: the share of time with a kernel on it, watts, clocks. Without NVML there
    are no values, and ``reason``."""

    reason: str = ""
    seen: list[tuple[float, float, float]] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        if not self.seen:
            return {"gpu_busy": None, "gpu_busy_reason": self.reason or "no samples"}
        busy, watts, clock = ([one[n] for one in self.seen] for n in range(3))
        return {
            "gpu_busy": round(statistics.mean(busy), 3),
            "gpu_watts": round(statistics.mean(watts), 1),
            "sm_clock_mhz": round(statistics.median(clock)),
        }


@contextmanager
def watched(device: torch.device) -> Iterator[Busy]:
    """Sample the device while the block runs."""
    found, stop = Busy(), threading.Event()
    if device.type != "cuda":
        found.reason = "no GPU"
        yield found
        return
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except Exception as error:  # no such package, no such library, a slice of a GPU
        found.reason = f"{type(error).__name__}: {error}"[:120]
        yield found
        return

    def sample() -> None:
        while not stop.wait(0.05):
            try:
                found.seen.append(
                    (
                        pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
                        pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                        pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
                    )
                )
            except pynvml.NVMLError as error:
                found.reason = str(error)
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join(timeout=2)


def machine(device: torch.device) -> dict[str, Any]:
    """Describe machine and versions as far as they change numbers. No host name, no user, no paths."""
    about: dict[str, Any] = {
        "device": "cpu",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "torch_cuda": torch.version.cuda,
        "code_revision": code_revision(),
        "code_digest": code_digest(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "device": properties.name,
            "device_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver(),
        }
    return about


def code_digest() -> str:
    """Return a digest of the package's and these scripts' source, because a copy of a checkout has no git."""
    root, found = Path(__file__).parents[2], hashlib.sha256()
    for folder in ("diffva_ray", "benchmarks/gpu_sections"):
        for file in sorted((root / folder).rglob("*.py")):
            found.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


def driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        found = pynvml.nvmlSystemGetDriverVersion()
        return found.decode() if isinstance(found, bytes) else str(found)
    except Exception as error:
        print(f"no driver version: {type(error).__name__}: {error}", file=sys.stderr)
        return None
