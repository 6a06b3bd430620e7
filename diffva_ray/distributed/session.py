"""Which Ray a command runs on: the cluster at ``RAY_ADDRESS``, or a private one on this machine that ends with it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from diffva_ray.progress import LOG, one_line

ANSWER = 5.0  # seconds in which a cluster has to accept a connection

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


class UnusableCluster(ValueError):
    """A Ray that cannot be joined, or that lacks what is asked for; the message is one line that says what to do."""


@contextmanager
def connect(cpus: int | None = None) -> Iterator[bool]:
    """Connect, and disconnect at the end; yields whether the cluster is a private one. Never a bare ``ray.init()``,
    which joins whatever happens to be running.

    A private cluster listens on loopback only and keeps its dashboard off; ``cpus`` are its logical CPUs. Raises
    UnusableCluster when there is no Ray at RAY_ADDRESS.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address is not None:
        check_address(address)
    with _environment(ENVIRONMENT if address else {**ENVIRONMENT, **ALONE}), _connected(address, cpus) as private:
        yield private


def check_address(address: str) -> None:
    """Raises UnusableCluster for a RAY_ADDRESS that is none, or where nothing answers; Ray itself would try for up to
    a quarter of an hour without a word."""
    unset = "unset it to run on this machine"
    if address in ("auto", "local", ""):
        return
    if "://" in address and not address.startswith("ray://"):
        raise UnusableCluster(
            f"RAY_ADDRESS={address} is no address of a Ray cluster but of its dashboard; {unset}, and give that "
            "address to ray job submit as RAY_API_SERVER_ADDRESS"
        )
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (host.strip() and colon and port.isdigit() and int(port) < 1 << 16):
        raise UnusableCluster(f"RAY_ADDRESS={address!r} is neither HOST:PORT nor ray://HOST:PORT nor auto; {unset}")
    LOG.info("joining Ray at %s (RAY_ADDRESS)", address)
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()
    except OSError as error:
        raise UnusableCluster(
            f"RAY_ADDRESS={address}: nothing answers there ({error.strerror or error}); start that cluster, correct "
            f"the address, or {unset}"
        ) from None


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
def _connected(address: str | None, cpus: int | None) -> Iterator[bool]:
    import ray

    if ray.is_initialized():  # somebody's notebook or test: theirs to end
        yield False
        return
    verbose = LOG.isEnabledFor(logging.DEBUG)  # diffva --verbose
    level = logging.INFO if verbose else logging.ERROR
    alone = not address or address == "local"
    where: dict[str, Any] = {"address": address}
    if alone:
        where = {"address": "local", "num_cpus": cpus, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    with nullcontext() if verbose else _without_stderr():
        try:
            with _own_sigterm():
                ray.init(**where, log_to_driver=verbose, logging_level=level)
        except (ValueError, ConnectionError, RuntimeError) as error:
            at = "a Ray on this machine cannot be started" if alone else f"RAY_ADDRESS={address}: cannot be joined"
            raise UnusableCluster(f"{at} ({one_line(error, 200)}); diffva -v shows what Ray says") from error
    quieten(level)
    try:
        yield alone
    finally:
        ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """What SIGTERM does stays as it was: ``ray.init`` puts a handler of its own there, which ends the process from
    C++ with a stack trace."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:  # None: it was not set from Python
            signal.signal(signal.SIGTERM, before)


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


def check_room(option: str, **needed: float) -> None:
    """Raises UnusableCluster when the connected cluster has less than ``needed`` (CPU, GPU) in all. For a private one,
    which never grows: Ray would wait for ever. A cluster that was joined may be about to start the node."""
    import ray

    there = ray.cluster_resources()
    for kind, amount in needed.items():
        if amount > there.get(kind, 0):
            has = f"{there.get(kind, 0):g}" if there.get(kind) else "no"
            raise UnusableCluster(
                f"{option}: needs {amount:g} {kind} on this machine, where Ray sees {has}; ask for less, or set "
                "RAY_ADDRESS to a cluster that has them"
            )


def gpus() -> int:
    """GPUs of the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def cpus() -> int:
    """CPUs of the connected cluster."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))
