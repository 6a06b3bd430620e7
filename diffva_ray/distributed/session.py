"""Connects a command to Ray: to the cluster at ``RAY_ADDRESS``, or to a private one on this machine, which ends with
the command."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from diffva_ray.progress import LOG, one_line

WAIT_INTERVAL = 30.0  # seconds between messages about what is waited for
CONNECT_TIMEOUT = 5.0  # seconds in which a cluster has to accept a connection
KEEP_EVERY = 0.002  # seconds between repetitions of the handler of SIGTERM

# Environment of the driver, which a private cluster's processes inherit. Usage statistics are switched off.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray prints an ERROR about actors with arguments at every start (ray#53727)
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # with the default of 2 s, every checkpoint waits that long
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "GOMP_SPINCOUNT": "20000",  # with OpenMP's default, other processes make a step several times slower
}
PRIVATE_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # with 0, Ray on Linux listens on 127.0.0.1 only


class UnusableCluster(ValueError):
    """Ray cannot be joined or lacks requested resources; the message is one line that says what to do."""


@contextmanager
def connect(cpus: int | None = None) -> Iterator[bool]:
    """Connect to Ray for the duration of the block.

    Joins the cluster at ``RAY_ADDRESS`` if that is set, otherwise starts a private cluster that listens on loopback
    only and has no dashboard. (A plain ``ray.init()`` would join any cluster that happens to run on this machine.)
    Within a process that is already connected, nothing is started or ended.

    Args:
        cpus: Logical CPUs of a private cluster; by default those that this process may use.

    Returns:
        A context manager whose value tells whether the cluster is a private one, which never grows.

    Raises:
        UnusableCluster: No Ray answers at ``RAY_ADDRESS``, or a private one cannot be started.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address is not None:
        check_address(address)
    variables = ENVIRONMENT if address else {**ENVIRONMENT, **PRIVATE_ENVIRONMENT}
    with _environment(variables), _connected(address, cpus) as private:
        yield private


def check_address(address: str) -> None:
    """Check that ``address`` is valid and accepts connections; Ray itself would retry silently for up to 15 minutes.
    Raises UnusableCluster."""
    # Check the form.
    unset = "unset it to run on this machine"
    if address in ("auto", "local", ""):
        return
    if "://" in address and not address.startswith("ray://"):
        raise UnusableCluster(
            f"RAY_ADDRESS={address} is the address of a Ray dashboard, not of a cluster; {unset}, and pass this "
            "address to ray job submit as RAY_API_SERVER_ADDRESS"
        )
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (host.strip() and colon and port.isdigit() and int(port) < 1 << 16):
        raise UnusableCluster(f"RAY_ADDRESS={address!r} is neither HOST:PORT nor ray://HOST:PORT nor auto; {unset}")

    # Try to connect.
    LOG.info("joining Ray at %s (RAY_ADDRESS)", address)
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT).close()
    except OSError as error:
        raise UnusableCluster(
            f"RAY_ADDRESS={address}: nothing answers there ({error.strerror or error}); start that cluster, correct "
            f"the address, or {unset}"
        ) from None


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set those environment variables that are not set yet; remove them again at the end."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _connected(address: str | None, cpus: int | None) -> Iterator[bool]:
    """Call ``ray.init`` and, at the end, ``ray.shutdown``; yields whether the cluster is private."""
    import ray

    if ray.is_initialized():  # by a notebook or a test, which also ends it
        yield False
        return
    verbose = LOG.isEnabledFor(logging.DEBUG)  # diffva --verbose
    level = logging.INFO if verbose else logging.ERROR

    # Join or start a cluster.
    private = not address or address == "local"
    options: dict[str, Any] = {"address": address}
    if private:
        options = {"address": "local", "num_cpus": cpus or _limited_cpus(), "include_dashboard": False,
                   "_node_ip_address": "127.0.0.1"}  # fmt: skip
    with nullcontext() if verbose else _without_stderr():
        try:
            with _keep_sigterm(), _loopback_only() if private else nullcontext():
                ray.init(**options, log_to_driver=verbose, logging_level=level)
        except (ValueError, ConnectionError, RuntimeError) as error:
            problem = "Ray cannot be started on this machine" if private else f"RAY_ADDRESS={address}: cannot be joined"
            raise UnusableCluster(f"{problem} ({one_line(error, 200)}); diffva -v shows Ray's messages") from error
    set_log_level(level)
    _protect_token()

    # Disconnect at the end.
    try:
        yield private
    finally:
        with _sigterm_deferred(), _keep_sigterm():
            ray.shutdown()


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Make ``ray.init`` listen on loopback only where Ray was imported before ``connect`` set PRIVATE_ENVIRONMENT, for
    example by a notebook: the driver reads that variable into this constant when it is imported."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _limited_cpus() -> int | None:
    """The number of cores that this process may use if that is a part of the machine (``taskset``, Slurm); otherwise
    None, for Ray's own count, which respects the quota of a container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return allowed if allowed != os.cpu_count() else None


def _protect_token() -> None:
    """Make Ray's token, which Ray writes with the modes of the umask, readable by its owner only."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with suppress(OSError):  # there is none, or it is another user's
        if token.stat().st_mode & 0o077:
            token.chmod(0o600)


@contextmanager
def _keep_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM: ``ray.init`` installs its own, which ends the process from C++ with a stack trace,
    and ``ray.shutdown`` the default one, more than a second before it returns. A timer therefore repeats ours."""
    before = signal.getsignal(signal.SIGTERM)
    main_thread = threading.current_thread() is threading.main_thread()  # no other may set handlers
    if not main_thread or before is None:  # None: not set from Python
        yield
        return
    timer = signal.getsignal(signal.SIGALRM) == signal.SIG_DFL  # else another part of the process uses it
    if timer:
        signal.signal(signal.SIGALRM, lambda number, frame: signal.signal(signal.SIGTERM, before))
        signal.setitimer(signal.ITIMER_REAL, KEEP_EVERY, KEEP_EVERY)
    try:
        yield
    finally:
        if timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _sigterm_deferred() -> Iterator[None]:
    """Act on SIGTERM at the end only: Ray repeats an interrupted ``ray.shutdown`` at the exit of the process, with the
    default handler."""
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if received:
            before(signal.SIGTERM, None)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard stderr: Ray's C++ side reports there that its log level is set. A failed start still raises an error."""
    sys.stderr.flush()
    stderr = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(null)
        os.close(stderr)


def set_log_level(level: int = logging.ERROR) -> None:
    """Set the level of Ray's loggers. Call it after the import of Ray Data, which configures its own logger."""
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(level)


def check_resources(option: str, **required: float) -> None:
    """Check that the connected cluster has the ``required`` resources (CPU, GPU) in total; raises UnusableCluster,
    which names ``option``. Only for a private cluster, which never grows, so that Ray would wait forever; a cluster
    that was joined may still start the node."""
    import ray

    available = ray.cluster_resources()
    for kind, amount in required.items():
        if amount > available.get(kind, 0):
            has = f"{available.get(kind, 0):g}" if available.get(kind) else "no"
            raise UnusableCluster(
                f"{option}: needs {amount:g} {kind} on this machine, where Ray sees {has}; request less, or set "
                "RAY_ADDRESS to a cluster that has them"
            )


@contextmanager
def waiting(
    what: str, needed: Mapping[str, float], arrived: Callable[[], bool], interval: float = WAIT_INTERVAL
) -> Iterator[None]:
    """On a joined cluster, which may be full or still grow, log every ``interval`` seconds what is waited for and which
    resources a worker needs, until ``arrived()``."""
    stop = threading.Event()

    def watch() -> None:
        import ray

        while not stop.wait(interval) and not arrived():
            total, free = ray.cluster_resources(), ray.available_resources()
            need = ", ".join(
                f"{amount:g} {kind} ({free.get(kind, 0):g} of the cluster's {total.get(kind, 0):g} are free)"
                for kind, amount in needed.items()
            )
            LOG.info("waiting for %s: a worker needs %s", what, need)

    watcher = threading.Thread(target=watch, daemon=True)
    if os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
        watcher.start()
    try:
        yield
    finally:
        stop.set()
        if watcher.is_alive():
            watcher.join(timeout=5)


def gpus() -> int:
    """Number of GPUs of the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def cpus() -> int:
    """Number of CPUs of the connected cluster, at least 1."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))
