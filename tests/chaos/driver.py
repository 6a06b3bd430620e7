"""One driver of a history on the cluster, as its own process, so that it can be killed.

RAY_ADDRESS=... python driver.py RUN DATA MODEL SEED RECIPE.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

SLOWNESS = 0.25  # additional seconds of each network call, so that kills hit running work


def prepare_worker() -> None:
    """Prepare a worker process: fake GPUs are CPUs, and storage is slow and fails."""
    from faults import Faults, FaultyStore

    from diffva_ray.counterfactual import engine
    from diffva_ray.storage import opening
    from diffva_ray.storage import store as storage

    engine.device_kind = lambda name=None: "cpu"
    call = engine.CounterfactualEngine.__call__

    def slow(self, *arguments):
        time.sleep(SLOWNESS)
        return call(self, *arguments)

    engine.CounterfactualEngine.__call__ = slow
    seed = int(os.environ["DIFFVA_CHAOS_SEED"])
    if seed >= 0:
        faults = Faults(seed + os.getpid(), stop=0.0, tear=0.0, fail=0.004, delay=0.02, life=1)
        run = os.environ["DIFFVA_CHAOS_RUN"]
        plain = opening.STORES[""]
        opening.STORES[""] = lambda uri: FaultyStore(uri, faults) if uri.startswith(run) else plain(uri)
        storage.PAUSES = (0.1, 0.2, 0.4, 0.8)


def main() -> None:
    out, data, model, seed, recipe = sys.argv[1:]
    import ray

    from diffva_ray.config.recipe import make_recipe
    from diffva_ray.distributed import session
    from diffva_ray.generate.plan import Request
    from diffva_ray.workflows.execution import Execution
    from diffva_ray.workflows.generate import generate_run

    for name, value in session.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    here = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "DIFFVA_CHAOS_SEED": seed, "DIFFVA_CHAOS_RUN": out, "PYTHONPATH": os.pathsep.join(here), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ray.init(
        address=os.environ["RAY_ADDRESS"],
        runtime_env={"env_vars": environment, "worker_process_setup_hook": "driver.prepare_worker"},
        log_to_driver=False,
        logging_level="ERROR",
    )
    values = make_recipe(json.loads(Path(recipe).read_text()))
    generate_run(values, data, model, out, Request(), Execution(executor="ray", actors=2))


if __name__ == "__main__":
    main()
