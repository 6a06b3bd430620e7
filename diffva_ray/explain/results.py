"""What ``Model.generate`` returns: counterfactual, attribution map and metrics of one image, or of several."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from diffva_ray.evaluate.drawing import png
from diffva_ray.explain.image import Explanation
from diffva_ray.explain.sheet import describe, sheet, write_sheet
from diffva_ray.generate.measures import unit


class Result:
    """Counterfactual, attribution map and metrics of one image. A notebook shows it as a sheet.

    Attributes:
        image: The image as the model sees it, float [size, size] in [0, 1].
        counterfactual: float32 [size, size] in [0, 1], rounded to 8 bits as in the files of a run.
        attribution: Signed attribution map [size, size] in [-1, 1]; positive where the image is brighter.
        metrics: Numbers by name, as in the columns of a run's records.
    """

    def __init__(self, explanation: Explanation) -> None:
        (answer,), self._explanation = explanation.answers, explanation
        self.image, self.counterfactual = explanation.image, unit(answer.counterfactual)
        self.attribution, self.metrics = answer.signed_map, {"image": explanation.about["image"], **answer.numbers}

    def __repr__(self) -> str:
        return describe(self._explanation)

    def _repr_png_(self) -> bytes:
        return png(sheet(self._explanation))

    def show(self) -> None:
        """Open the sheet in the image viewer of the system. A notebook shows the result itself, without this."""
        Image.open(io.BytesIO(self._repr_png_())).show()

    def save(self, path: str) -> None:
        """Write the sheet.

        Args:
            path: A ``.png``, ``.pdf`` or ``.svg``, local or ``s3://``.

        Raises:
            UnusableData: If the name has another ending.
            StoreError: If the sheet cannot be written.
        """
        write_sheet(self._explanation, path)


class Results(Sequence[Result]):
    """The results of several images, in their order: a sequence with ``counterfactuals``, ``attributions`` and
    ``metrics`` of all."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._results = tuple(results)

    def __getitem__(self, index: Any) -> Any:
        return Results(self._results[index]) if isinstance(index, slice) else self._results[index]

    def __len__(self) -> int:
        return len(self._results)

    @property
    def counterfactuals(self) -> NDArray[np.float32]:
        """The counterfactuals [n, size, size]."""
        return np.stack([result.counterfactual for result in self])

    @property
    def attributions(self) -> NDArray[np.float32]:
        """The attribution maps [n, size, size]."""
        return np.stack([result.attribution for result in self])

    @property
    def metrics(self) -> pd.DataFrame:
        """The metrics, a row for each image."""
        return pd.DataFrame([result.metrics for result in self])

    def __repr__(self) -> str:
        return f"{len(self)} results; results[0] is the first, results.metrics the table"
