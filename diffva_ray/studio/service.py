"""The HTTP service as an engine: the networks run there, and everything else of a record is made here."""

from __future__ import annotations

import base64
import copy
import io
import os
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from diffva_ray.config.recipe import Recipe
from diffva_ray.counterfactual.engine import CounterfactualBatch
from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.encoding import encode_mask
from diffva_ray.generate.measures import unit
from diffva_ray.model.card import ModelFolder
from diffva_ray.progress import Stopwatch, one_line
from diffva_ray.provenance import torch_version
from diffva_ray.schema import ENGINE, Mask

TOKEN = "DIFFVA_SERVE_TOKEN"  # environment variable with the service's token
TIMEOUT = httpx.Timeout(600, connect=10)  # seconds; a service that has given its GPUs back starts one first


class ServiceEngine:
    """Takes the place of a CounterfactualEngine for one image: ``ask`` sends the file, a call returns the answer.

    ``model`` is the service's model; its card and vocabulary are read and its weights are not loaded. Raises
    UnusableData for a service without an answer, with another model or version, or with a recipe of its own, because
    records would not say how they were made."""

    def __init__(self, uri: str, model: str, recipe: Recipe) -> None:
        self.uri, self.watch, self.size = uri, Stopwatch(), recipe.model.resolution
        token = {"Authorization": f"Bearer {os.environ.get(TOKEN, '')}"}
        try:
            self._client = httpx.Client(base_url=uri, headers=token, timeout=TIMEOUT)
        except (httpx.InvalidURL, ValueError) as error:
            raise UnusableData(f"--service {uri}: {error}") from None
        about = self._answer("GET", "/v1/model")
        own = {"model_digest": ModelFolder(model).digest, "torch": torch_version(), "engine": ENGINE}
        for key, value in own.items():
            if about[key] != value:
                raise UnusableData(
                    f"--service {uri}: its {key} is {about[key]}, here (--model {model}) it is {value}; give its "
                    "model, or install its versions"
                )
        # The service's micro-batch decides rounding, so it belongs to the settings of the records.
        self.fixed = tuple(f"generate.{name}={about['generate'][name]}" for name in ("micro_batch", "dtype"))
        changed = recipe.generate.model_copy(
            update={name: about["generate"][name] for name in ("micro_batch", "dtype")}
        )
        here = changed.model_dump(mode="json")
        if different := [key for key in here if here[key] != about["generate"].get(key)]:
            raise UnusableData(f"--service {uri}: overrides generate.{different[0]} of the model's recipe")
        self.bundle, self.device = SimpleNamespace(digest=about["model_digest"]), SimpleNamespace(type=about["device"])
        self.device_name, self._made = "", dict[str, Any]()

    def condition_columns(self, settings: Any = None) -> list[str]:
        """None: the service takes no condition images."""
        return []

    def fits(self, prompt: str) -> bool:
        """True: plans are checked by the model's vocabulary, and the service checks again."""
        return True

    def ask(self, name: str, data: bytes, region: Mask | None, prompt: str, recipe: Recipe) -> ServiceEngine:
        """An engine that has the service's answer for an image file. Raises UnusableData."""
        files = {"image": (name, data)} | ({} if region is None else {"mask": ("region.png", encode_mask(region))})
        fields = {
            "prompt": prompt,
            "seed": recipe.seed,
            "reconstruction": True,
            **recipe.generate.sampling.model_dump(),
        }
        answered = copy.copy(self)
        answered._made = self._answer("POST", "/v1/counterfactuals", files=files, data=fields)
        answered.device_name = answered._made["device"]
        return answered

    def __call__(self, *_: Any, **__: Any) -> CounterfactualBatch:
        """The answer, as the engine of a run's worker returns it."""
        made = self._made
        counterfactual, reconstruction = (_pixels(made[name])[None] for name in ("counterfactual", "reconstruction"))
        return CounterfactualBatch(counterfactual, reconstruction, [made["source_prompt"]], [made["in_float32"]])

    def _answer(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, **content)
            body: dict[str, Any] = answer.json()
        except httpx.HTTPError as error:
            raise UnusableData(f"--service {self.uri}: {one_line(error) or type(error).__name__}") from None
        except ValueError:
            raise UnusableData(f"--service {self.uri}: HTTP {answer.status_code}; ask again") from None
        if answer.status_code == 401:
            raise UnusableData(f"--service {self.uri}: another token; set {TOKEN} to the service's")
        if answer.status_code != 200:
            raise UnusableData(f"--service {self.uri}: {body.get('detail', answer.status_code)}")
        return body


def _pixels(encoded: str) -> NDArray[np.float32]:
    return unit(np.asarray(Pillow.open(io.BytesIO(base64.b64decode(encoded)))))
