"""``diffva reduce``: the tables of a run, computed here or on a cluster."""

from __future__ import annotations

from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.reduction import Reduced, reduce_run
from diffva_ray.generate.data_identity import moved
from diffva_ray.generate.run import (
    Run,
)
from diffva_ray.workflows.execution import Executor


def reduce(run: Run, options: Options, executor: Executor = "ray", data: str | None = None) -> Reduced:
    """Verify the run and write its tables; scoring is spread over the cluster unless ``executor`` is ``inline``.

    ``data``: where the data set is now, if it has moved; the run remembers it. Raises Incomplete, StoreError where the
    images are not there, UnusableData where they are others.
    """
    run = run if data is None else moved(run, data)
    data = run.about["data"]
    if executor == "inline" or run.shards == 1:
        return reduce_run(run, data, options)
    from diffva_ray.distributed import session

    with session.connect():
        from diffva_ray.distributed.reduce import RayExecutor

        return reduce_run(run, data, options, RayExecutor())
