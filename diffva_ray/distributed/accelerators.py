"""The type of GPU that the workers of a run get: one type, because GPU models round differently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import ray

from diffva_ray.distributed.session import UnusableCluster
from diffva_ray.progress import LOG

RESOURCE = "accelerator_type:"  # prefix of the resource by which Ray names the accelerator of a node


def gpus_by_type(nodes: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """GPUs by type, as Ray names it ("A100"; "" where it names none), of those of ``ray.nodes()`` that are alive: the
    most numerous type first, types of equal number by name."""
    counts = Counter[str]()
    for node in nodes:
        resources = node["Resources"]
        if node["Alive"] and resources.get("GPU"):
            names = [key.removeprefix(RESOURCE) for key in resources if key.startswith(RESOURCE)]
            counts[min(names, default="")] += resources["GPU"]
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def choose(counts: Mapping[str, float], asked: str | None = None) -> tuple[str | None, float]:
    """Choose one type of GPU.

    Args:
        counts: As of ``gpus_by_type``.
        asked: The type that the user wants, of any case; None: any.

    Returns:
        The type, None where all GPUs are of one type or none is there, and its number of GPUs. A type that is asked for
        may be absent: the cluster may still grow.
    """
    if asked is not None:
        name = next((name for name in counts if name.lower() == asked.lower()), asked)
        return name, counts.get(name, 0)
    if len(counts) < 2:
        return None, sum(counts.values())
    name = next(name for name in counts if name)  # GPUs without a name cannot be asked for
    return name, counts[name]


def check_type(asked: str) -> None:
    """Raises UnusableCluster unless the connected cluster, a private one, which never grows, has GPUs of that type."""
    counts = gpus_by_type(ray.nodes())
    if not choose(counts, asked)[1]:
        raise UnusableCluster(f"--accelerator-type {asked}: this machine has {_listed(counts)}; leave the option out")


def one_type(asked: str | None = None) -> tuple[str | None, int]:
    """Choose one type of GPU of the connected cluster, as ``choose`` does, and say so where there are several."""
    counts = gpus_by_type(ray.nodes())
    name, number = choose(counts, asked)
    if name is not None and asked is None:
        LOG.info(
            "GPUs of different types round differently, so of %s this command uses %s only; --accelerator-type of "
            "generate takes another one", _listed(counts), name,
        )  # fmt: skip
    return name, int(number)


def _listed(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{count:g} {name or 'GPU without a name'}" for name, count in counts.items()) or "no GPU"
