"""Names for the arrays that most functions on films take."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]  # grey in [0, 1], or a signed map in [-1, 1]; [H, W] unless it is said otherwise
Mask = NDArray[np.bool_]  # [H, W] likewise
