"""diffva-ray: counterfactual attribution for chest X-rays, at cluster scale.

Packages, in the order in which data flows: ``data`` (data sets, images, phantoms), ``model`` (the diffusers folder),
``train`` (fine-tuning), ``counterfactual`` (counterfactuals and attribution maps), ``generate`` (plan and shards),
``metrics``, ``evaluate`` (tables and report), ``explain`` (one image). ``distributed`` runs them on Ray, ``workflows``
and ``commands`` are the command line, ``config`` holds the recipes and ``storage`` the files. ARCHITECTURE.md has one
line per module.

The public API is ``__all__``. Each name is imported on first use, so that ``import diffva_ray`` loads neither torch nor
Ray. Metrics are in ``diffva_ray.metrics.*``. Names, arguments and return values change only with a major version.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffva_ray._version import __version__ as __version__

if TYPE_CHECKING:
    from diffva_ray.config.recipe import Recipe as Recipe
    from diffva_ray.config.recipe import load_recipe as load_recipe
    from diffva_ray.counterfactual.attribution import attribution as attribution
    from diffva_ray.counterfactual.engine import CounterfactualEngine as CounterfactualEngine
    from diffva_ray.data.datasets import open_dataset as open_dataset
    from diffva_ray.data.images import read_image as read_image
    from diffva_ray.data.images import read_map as read_map
    from diffva_ray.data.images import to_square as to_square
    from diffva_ray.data.phantoms import phantom as phantom
    from diffva_ray.evaluate.opened import open_run as open_run
    from diffva_ray.evaluate.records import read_images as read_images
    from diffva_ray.evaluate.records import read_records as read_records
    from diffva_ray.explain.model import load as load
    from diffva_ray.generate.run import Run as Run

_MODULES = {
    "CounterfactualEngine": "counterfactual.engine",
    "Recipe": "config.recipe",
    "Run": "generate.run",
    "attribution": "counterfactual.attribution",
    "load": "explain.model",
    "load_recipe": "config.recipe",
    "open_dataset": "data.datasets",
    "open_run": "evaluate.opened",
    "phantom": "data.phantoms",
    "read_image": "data.images",
    "read_images": "evaluate.records",
    "read_map": "data.images",
    "read_records": "evaluate.records",
    "to_square": "data.images",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'diffva_ray' has no attribute {name!r}; there are {', '.join(_MODULES)}")
    return getattr(import_module(f"diffva_ray.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
