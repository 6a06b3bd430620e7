"""A run on pretended GPUs, with ``--actors`` left to its default: a driver of its own process.

RAY_ADDRESS=... python growing.py RECIPE DATA MODEL RUN
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

SECONDS = 4.0  # minimum for each call of the networks: a cluster grows while its GPUs are busy


def prepare_worker() -> None:
    """Prepare a worker process: a pretended GPU is a slow CPU."""
    from diffva_ray.counterfactual import engine

    engine.device_kind = lambda name=None: "cpu"
    call = engine.CounterfactualEngine.__call__

    def slow(self, *arguments):
        time.sleep(SECONDS)
        return call(self, *arguments)

    engine.CounterfactualEngine.__call__ = slow


def main() -> None:
    recipe, data, model, run = sys.argv[1:]
    import ray

    from diffva_ray.config.recipe import load_recipe
    from diffva_ray.distributed import session
    from diffva_ray.generate.plan import Request
    from diffva_ray.workflows.generate import generate_run

    ray.init(
        address=os.environ["RAY_ADDRESS"],
        runtime_env={
            "env_vars": {"PYTHONPATH": str(Path(__file__).parent)},
            "worker_process_setup_hook": "growing.prepare_worker",
        },
        log_to_driver=False,
        logging_level="ERROR",
    )
    while not session.gpus():  # min_workers: 1
        time.sleep(0.5)
    print(session.gpus(), "GPUs at the start")
    generate_run(load_recipe(recipe), data, model, run, Request())
    print(len([node for node in ray.nodes() if node["Resources"].get("GPU")]), "GPUs in the end")


if __name__ == "__main__":
    main()
