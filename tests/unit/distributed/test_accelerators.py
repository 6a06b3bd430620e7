"""The workers of a run get GPUs of one type; the nodes are what ``ray.nodes()`` returns."""

from __future__ import annotations

import pytest

from diffva_ray.distributed.accelerators import choose, gpus_by_type


def node(gpus: float, *types: str, alive: bool = True) -> dict[str, object]:
    """As Ray 2.60 describes a node."""
    resources = {"CPU": 8.0, "memory": 1e9, "node:10.0.0.1": 1.0, **{f"accelerator_type:{name}": 1.0 for name in types}}
    return {"NodeID": "a" * 56, "Alive": alive, "Resources": {**resources, **({"GPU": gpus} if gpus else {})}}


@pytest.mark.parametrize(
    ("nodes", "asked", "chosen"),
    [
        ([], None, (None, 0)),
        ([node(0)], None, (None, 0)),
        ([node(0), node(8, "A100"), node(8, "A100")], None, (None, 16)),  # one type needs no choice
        ([node(2)], None, (None, 2)),
        ([node(4, "H100"), node(8, "A100"), node(2, "A100")], None, ("A100", 10)),
        ([node(8, "A100", alive=False), node(4, "H100"), node(2, "A100")], None, ("H100", 4)),  # a dead node is none
        ([node(4, "H100"), node(4, "A100")], None, ("A100", 4)),  # of equal number: the first by name, on every call
        ([node(8), node(4, "A100")], None, ("A100", 4)),  # what Ray does not name cannot be asked for
        ([node(4, "H100"), node(8, "A100")], "h100", ("H100", 4)),
        ([node(8, "A100")], "A100", ("A100", 8)),
        ([node(8, "A100")], "H100", ("H100", 0)),  # the cluster may still grow
    ],
)
def test_one_type_is_chosen(
    nodes: list[dict[str, object]], asked: str | None, chosen: tuple[str | None, float]
) -> None:
    assert choose(gpus_by_type(nodes), asked) == chosen
    assert choose(gpus_by_type(nodes[::-1]), asked) == chosen
