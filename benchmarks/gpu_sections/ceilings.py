"""Section 1, ceilings: the rates that this device reaches in one kernel, which everything else is held against."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_sections.book import Book
from gpu_sections.measure import relative_error, switched, tf32, timed
from gpu_sections.subject import Subject

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def section(book: Book, subject: Subject) -> None:
    sizes, device = subject.sizes, subject.device
    for dtype in ("bfloat16", "float16", "tf32", "float32"):
        book.row(f"matrix product, {dtype}", lambda dtype=dtype: product(subject, dtype))
    book.row("copy on the device", lambda: copying(subject))
    for batch, channels, side in sizes.convolutions:
        for dtype in ("bfloat16", "float16"):
            book.row(
                f"convolution 3x3 of {channels} channels at {side}x{side}, channels_last, {dtype}",
                lambda dtype=dtype, shape=(batch, channels, side): convolution(subject, dtype, *shape),
            )
    for dtype in ("bfloat16", "float16"):
        for name in ("as PyTorch chooses", *BACKENDS):
            for width in (sizes.attention[3], 64):
                if width != sizes.attention[3] and name in ("as PyTorch chooses", "math"):
                    continue
                padded = "" if width == sizes.attention[3] else f" padded to {width}"
                book.row(
                    f"attention {list(sizes.attention)}{padded}, {name}, {dtype}",
                    lambda dtype=dtype, name=name, width=width: attention(subject, dtype, name, width),
                )
    book.note(device=str(device))


def rate(values: dict[str, Any], tflop: float) -> dict[str, Any]:
    return {"tflop_per_second": round(tflop / values["ms"] * 1000, 2), **values}


def product(subject: Subject, dtype: str) -> dict[str, Any]:
    side = subject.sizes.matrix
    kind = "float32" if dtype == "tf32" else dtype
    a, b = (subject.random(side, side, dtype=kind, seed=seed) for seed in (0, 1))
    with switched(**tf32(dtype == "tf32")):
        return rate(timed(lambda: a @ b, subject.device, subject.sizes.calls).values(), 2 * side**3 / 1e12)


def copying(subject: Subject) -> dict[str, Any]:
    count = subject.sizes.copied_mib * 2**20
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=subject.device)
    target = torch.empty_like(source)
    values = timed(lambda: target.copy_(source), subject.device, subject.sizes.calls).values()
    return {"gigabytes_per_second_read_and_written": round(2 * count / values["ms"] / 1e6, 1), **values}


def convolution(subject: Subject, dtype: str, batch: int, channels: int, side: int) -> dict[str, Any]:
    x = subject.random(batch, channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = subject.random(channels, channels, 3, 3, dtype=dtype, seed=1).contiguous(memory_format=torch.channels_last)
    tflop = 2 * 9 * batch * channels**2 * side**2 / 1e12
    with switched():
        timing = timed(lambda: functional.conv2d(x, weight, padding=1), subject.device, subject.sizes.calls)
    return {"batch": batch, **rate(timing.values(), tflop)}


def attention(subject: Subject, dtype: str, name: str, width: int) -> dict[str, Any]:
    """One attention of the UNet's first level, credited with the operations of its own head width, and its error
    against float64."""
    batch, heads, length, own = subject.sizes.attention
    q, k, v = (subject.random(batch, heads, length, own, dtype=dtype, seed=seed) for seed in range(3))
    scale = own**-0.5
    scores = (q[:1, :1, :16].double() @ k[:1, :1].double().transpose(-1, -2)) * scale
    truth = scores.softmax(-1) @ v[:1, :1].double()
    q, k, v = (functional.pad(part, (0, width - own)) for part in (q, k, v))

    def work() -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, scale=scale)

    def measured() -> dict[str, Any]:
        error = relative_error(work()[:1, :1, :16, :own], truth)
        tflop = 4 * batch * heads * length**2 * own / 1e12
        return {"relative_error": error, **rate(timed(work, subject.device, subject.sizes.calls).values(), tflop)}

    with switched():
        if name not in BACKENDS:
            return measured()
        with sdpa_kernel(BACKENDS[name]):
            return measured()
