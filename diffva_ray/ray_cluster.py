"""Which Ray a command runs on: the cluster at ``RAY_ADDRESS``, or a private one on this machine that ends with it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from diffva_ray.observe import LOG

# What a private cluster's processes inherit. Usage statistics are off by choice.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # an ERROR about actors with arguments is printed at every start (ray#53727)
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the default of 2 s makes every checkpoint wait
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "GOMP_SPINCOUNT": "20000",  # OpenMP's long spins make a step several times slower beside any other process
}
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # with it, Ray on Linux keeps to 127.0.0.1


@contextmanager
def session(cpus: int | None = None) -> Iterator[None]:
    """Connect, and disconnect at the end. Never a bare ``ray.init()``, which joins whatever happens to be running.

    A private cluster listens on loopback only and keeps its dashboard off; ``cpus`` are its logical CPUs.
    """
    address = os.environ.get("RAY_ADDRESS")
    with _environment(ENVIRONMENT if address else {**ENVIRONMENT, **ALONE}), _connected(address, cpus):
        yield


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """With these variables where they are not set; a process that goes on afterwards has its own environment again."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _connected(address: str | None, cpus: int | None) -> Iterator[None]:
    import ray

    if ray.is_initialized():  # somebody's notebook or test: theirs to end
        yield
        return
    verbose = LOG.isEnabledFor(logging.DEBUG)  # diffva --verbose
    level = logging.INFO if verbose else logging.ERROR
    with nullcontext() if verbose else _without_stderr():
        if address:
            ray.init(address=address, log_to_driver=verbose, logging_level=level)
        else:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=verbose,
                logging_level=level,
                _node_ip_address="127.0.0.1",
            )
    quieten(level)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Ray's C++ side says on stderr that it was told to say nothing; a failure to start is raised all the same."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def quieten(level: int = logging.ERROR) -> None:
    """Ray's loggers at ``level``. Ray Data configures its own when it is imported, so call this after."""
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(level)


def gpus() -> int:
    """GPUs of the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def cpus() -> int:
    """CPUs of the connected cluster."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))
