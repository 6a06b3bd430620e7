"""DeepCache (Ma et al. 2024): neighbouring steps share what the UNet computes in its depth; only its outermost layers
see every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def deep_features_kept(unet: Any, every: int) -> Iterator[None]:
    """While the UNet follows one path of timesteps: in every ``every``-th call all of it works, in the calls between,
    its first convolution, the last residual block and what comes after; all other layers give what they gave in the
    last whole call (DeepCache's branch 0). A call with another number of images is a whole one. 1: nothing is kept."""
    if every == 1:
        yield
        return
    kept = _Kept(every)
    deep = _deep(unet)
    watch = unet.register_forward_pre_hook(lambda _, args: kept.begin(len(args[0])))
    for layer in deep:
        layer.forward = kept.of(layer.forward)
    try:
        yield
    finally:
        watch.remove()
        for layer in deep:
            del layer.forward  # the class's own is there again


def _deep(unet: Any) -> list[nn.Module]:
    last = unet.up_blocks[-1]
    inner = [*last.resnets[:-1], *getattr(last, "attentions", [])[:-1]]
    return [*unet.down_blocks, *filter(None, [unet.mid_block]), *unet.up_blocks[:-1], *inner]


class _Kept:
    def __init__(self, every: int) -> None:
        self.every, self.images, self.age = every, 0, 0
        self.whole = True

    def begin(self, images: int) -> None:
        """A call of the UNet begins."""
        self.age += 1
        self.whole = images != self.images or self.age >= self.every
        if self.whole:
            self.images, self.age = images, 0

    def of(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        last: list[Any] = [None]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.whole:
                last[0] = compute(*args, **kwargs)
            return last[0]

        return forward
