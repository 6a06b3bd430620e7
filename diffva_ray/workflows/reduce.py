"""``diffva reduce``: compute the tables of a run, in this process or on a cluster."""

from __future__ import annotations

from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.reduction import Reduced, reduce_run
from diffva_ray.generate.data_identity import moved
from diffva_ray.generate.run import Run
from diffva_ray.workflows.execution import Executor


def reduce(run: Run, options: Options, executor: Executor = "ray", data: str | None = None) -> Reduced:
    """Verify a run and write its tables.

    Args:
        run: The run.
        options: What to compute.
        executor: ``ray`` spreads the scoring over the cluster, ``inline`` scores in this process.
        data: Address of the data set, if it has moved; the run stores it.

    Returns:
        The tables' rows and what was left out.

    Raises:
        Incomplete: Shards are pending.
        StoreError: The images cannot be found.
        UnusableData: The images are not those of the run.
    """
    # Use and store the new address of the images, if any.
    run = run if data is None else moved(run, data)
    data = run.about["data"]

    # Compute here, or spread the shards over a cluster. A single shard is not worth the start of Ray.
    if executor == "inline" or run.shards == 1:
        return reduce_run(run, data, options)
    from diffva_ray.distributed import session

    with session.connect():
        from diffva_ray.distributed.reduce import RayExecutor

        return reduce_run(run, data, options, RayExecutor())
