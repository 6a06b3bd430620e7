"""DeepCache (Ma et al. 2024): neighbouring steps share the deep features of the UNet; only its outermost layers run in
every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def deep_features_kept(unet: Any, every: int) -> Iterator[None]:
    """Reuse deep features while the UNet follows one path of timesteps.

    Every ``every``-th call runs the whole network. The calls between run only the first convolution, the last residual
    block and what follows it; all other layers return their output of the last whole call (DeepCache's branch 0). A
    call with another number of images is a whole one. ``every`` = 1 keeps nothing.
    """
    if every == 1:
        yield
        return
    cache = _Cache(every)
    deep = _deep_layers(unet)
    hook = unet.register_forward_pre_hook(lambda _, args: cache.begin(len(args[0])))
    for layer in deep:
        layer.forward = cache.wrap(layer.forward)
    try:
        yield
    finally:
        hook.remove()
        for layer in deep:
            del layer.forward  # uncovers the method of the class


def _deep_layers(unet: Any) -> list[nn.Module]:
    last = unet.up_blocks[-1]
    inner = [*last.resnets[:-1], *getattr(last, "attentions", [])[:-1]]
    return [*unet.down_blocks, *filter(None, [unet.mid_block]), *unet.up_blocks[:-1], *inner]


class _Cache:
    def __init__(self, every: int) -> None:
        self.every = every
        self.images = 0  # batch size of the last whole call
        self.age = 0  # calls since then
        self.whole = True  # whether the current call is a whole one

    def begin(self, images: int) -> None:
        """Start a call of the UNet on ``images`` images."""
        self.age += 1
        self.whole = images != self.images or self.age >= self.every
        if self.whole:
            self.images, self.age = images, 0

    def wrap(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """``compute`` that runs in whole calls and repeats its last output in the others."""
        last: Any = None

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal last
            if self.whole:
                last = compute(*args, **kwargs)
            return last

        return forward
