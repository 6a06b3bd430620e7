"""The counterfactual methods, a line each: what a method runs with, needs and costs. A new one is a module of its name
in ``counterfactual/`` with a function ``generate``, and a line here.

The table stands apart from the modules so that drivers can check and price a run without loading torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Calls(NamedTuple):
    """Forwards of each network for one record. Every method has the image encoded; those in latent space
    decode counterfactual and reconstruction."""

    unet: int
    encode: int = 1
    decode: int = 2
    controlnet: int = 0


@dataclass(frozen=True)
class Method:
    """``calls``: of the sampler's steps, and of those of them that have both branches of guidance.

    ``scheduler``: the only one it runs with; empty: any. ``needs``: the network it needs beside the pipeline's own, a
    folder of the model trained by the stage of that name (``model/extras.py``). ``reads_prompt``: False for a method of
    one pass, without prompt or sampler. ``shortcuts``: ``generate.acceleration`` is for it.
    """

    calls: Callable[[int, int], Calls]
    scheduler: str = ""
    needs: str = ""
    reads_prompt: bool = True
    shortcuts: bool = False


METHODS: dict[str, Method] = {
    "sdedit": Method(lambda steps, guided: Calls(steps + guided), shortcuts=True),
    "ddim-inversion": Method(lambda steps, guided: Calls(steps + guided + steps - 1), "ddim", shortcuts=True),
    "cycle": Method(lambda steps, guided: Calls(steps + guided + steps), "ddim"),
    "masked": Method(lambda steps, guided: Calls(steps + guided + steps - 1), "ddim", shortcuts=True),
    "classifier-guided": Method(lambda steps, guided: Calls(2 * steps - 1), "ddim", needs="classifier"),
    "controlnet": Method(lambda steps, guided: Calls(steps + guided, controlnet=steps + guided), needs="controlnet"),
    "vant-gan": Method(lambda steps, guided: Calls(0, decode=0), needs="vant_gan", reads_prompt=False),
    "ant-gan": Method(lambda steps, guided: Calls(0, decode=0), needs="ant_gan", reads_prompt=False),
}
