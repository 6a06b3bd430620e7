"""Images as a notebook has them: paths, PIL images, numpy arrays, torch tensors."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from diffva_ray.counterfactual.engine import check_image
from diffva_ray.data.images import decode
from diffva_ray.explain.image import open_image


@dataclass(frozen=True)
class Input:
    """An image as given."""

    name: str
    data: bytes  # of the file, or of the array
    pixels: NDArray[np.float32]  # [H, W] in [0, 1]
    columns: dict[str, str]  # of a DICOM header
    file: bool  # whether ``name`` is a path, beside which masks may lie


def is_image(value: Any) -> bool:
    """Whether a value is one image, and not several."""
    return isinstance(value, (str, os.PathLike, Image.Image)) or hasattr(value, "shape")


def no_image(value: Any) -> str:
    """The message about a value that is no image."""
    return f"an image is a path, a PIL image, a numpy array or a torch tensor, got {type(value).__name__}"


def read_input(image: Any, name: str, min_side: int, bits: int) -> Input:
    """Read an image; ``name`` is for one without a path. Raises TypeError, and ValueError (UnusableData, BadImage)."""
    if not is_image(image):
        raise TypeError(f"{name}: {no_image(image)}")
    if isinstance(image, (str, os.PathLike)):
        return Input(os.fspath(image), *open_image(os.fspath(image), min_side, bits), True)
    if not isinstance(image, Image.Image):
        array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image).squeeze()
        if not np.issubdtype(array.dtype, np.integer):
            check_image(array, name)
            return Input(name, array.tobytes(), array.astype(np.float32), {}, False)
        try:
            image = Image.fromarray(array)
        except TypeError:
            raise TypeError(
                f"{name}: {array.dtype} {list(array.shape)} is no image; integers are 8 or 16 bits, [H, W] or [H, W, 3]"
            ) from None
    buffer = io.BytesIO()
    ImageOps.exif_transpose(image).save(buffer, "TIFF")
    return Input(name, buffer.getvalue(), decode(buffer.getvalue(), min_side, bits), {}, False)
