"""Options that several commands share: how a run is executed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Executor = Literal["ray", "inline"]  # on Ray, or in a plain loop in this process


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is executed; no field but the type of GPU changes a pixel."""

    executor: Executor = "ray"  # ``inline``: one plain loop in this process
    actors: int | None = None  # None: one for each GPU, or for each CPU if there is no GPU
    gpus_per_actor: float | None = None  # None: 1 if the cluster has GPUs, otherwise 0
    accelerator_type: str | None = None  # of the GPUs, as Ray names it; None: the most numerous type of the cluster
    allow_environment_change: bool = False  # continue a run with another torch version or kind of device
