"""The counterfactual methods, one line each: cost, scheduler and extra network.

A new method is a module in ``counterfactual/`` with a function ``generate``, a line in the ``methods.py`` there and
one here. This table is separate so that drivers check and price a run without loading torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Calls(NamedTuple):
    """Forward passes of each network for one record."""

    unet: int
    encode: int = 1  # of the autoencoder; every method encodes the image
    decode: int = 2  # of the autoencoder; methods in latent space decode counterfactual and reconstruction
    controlnet: int = 0


@dataclass(frozen=True)
class Method:
    """Requirements and cost of a counterfactual method."""

    calls: Callable[[int, int], Calls]
    """Calls by the number of sampler steps, and by the number of those that run both branches of guidance."""

    scheduler: str = ""
    """The only scheduler that the method runs with; empty: any."""

    needs: str = ""
    """Network that the method needs in addition to the pipeline: a folder of the model, written by the training stage
    of that name (``model/extras.py``)."""

    reads_prompt: bool = True
    """False for methods that neither a prompt nor a source prompt reaches."""

    shortcuts: bool = False
    """Whether ``generate.acceleration`` applies."""

    composes: bool = False
    """Whether prompts may be composed with AND and NOT (``config/prompts.py``)."""

    keeps_image: bool = False
    """Whether the reconstruction is the image itself, so that the map owes nothing to the autoencoder."""


METHODS: dict[str, Method] = {
    "sdedit": Method(lambda steps, guided: Calls(steps + guided), shortcuts=True, composes=True),
    "ddim-inversion": Method(
        lambda steps, guided: Calls(steps + guided + steps), "ddim", shortcuts=True, composes=True
    ),
    "cycle": Method(lambda steps, guided: Calls(steps + guided + steps), "ddim", composes=True),
    "masked": Method(lambda steps, guided: Calls(steps + guided + steps), "ddim", shortcuts=True, composes=True),
    "instruct-pix2pix": Method(lambda steps, guided: Calls(2 * steps + guided), "ddim", keeps_image=True),
    "classifier-guided": Method(lambda steps, guided: Calls(2 * steps), "ddim", needs="classifier"),
    "controlnet": Method(lambda steps, guided: Calls(steps + guided, controlnet=steps + guided), needs="controlnet"),
    "text-to-image": Method(lambda steps, guided: Calls(steps + guided), shortcuts=True, composes=True),
    **{  # in one pass, by the network of that name
        name: Method(
            lambda steps, guided: Calls(0, decode=0),
            needs=name.replace("-", "_"),
            reads_prompt=False,
            keeps_image=True,
        )
        for name in ("va-gan", "vant-gan", "ant-gan")
    },
    **{  # every step calls the healthy-only network instead of the UNet
        name: Method(lambda steps, guided: Calls(0), "ddim", needs="healthy_unet", reads_prompt=False)
        for name in ("anoddpm", "autoddpm")
    },
    "what-is-healthy": Method(lambda steps, guided: Calls(steps + guided + steps), "ddim"),
    **{
        name: Method(lambda steps, guided: Calls(2 * steps), "ddim", needs="classifier", reads_prompt=False)
        for name in ("wolleb", "diff-scm", "swiss-army-knife")
    },
    "time": Method(lambda steps, guided: Calls(steps + guided + steps), "ddim", shortcuts=True),
    "textual-inversion": Method(
        lambda steps, guided: Calls(steps + guided + steps), "ddim", needs="textual_inversion", reads_prompt=False
    ),
    "singla": Method(lambda steps, guided: Calls(0, decode=0), needs="singla", reads_prompt=False, keeps_image=True),
    "steex": Method(
        lambda steps, guided: Calls(0, decode=steps + 2), "ddim", needs="image_classifier", reads_prompt=False
    ),
    "charachon": Method(lambda steps, guided: Calls(0, decode=0), needs="charachon", reads_prompt=False),
}
