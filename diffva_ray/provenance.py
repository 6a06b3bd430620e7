"""Provenance of an output: code revision, package versions, machine, time. Imports no heavy package."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from diffva_ray._version import __version__

PACKAGES = ("torch", "diffusers", "transformers", "ray", "numpy", "scipy", "scikit-image", "pillow", "pyarrow")


def version(package: str) -> str:
    """Return the installed version of a package, or ``absent``, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def torch_version() -> str:
    """Return torch's version without the local build tag, which differs between package indexes; a fingerprint key."""
    return version("torch").split("+")[0]


def code_revision() -> str:
    """Return the git revision of the package's checkout (``-dirty`` with local changes), or the version without one."""
    folder = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        revision = subprocess.run(command, capture_output=True, text=True, timeout=10)
        tracked = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return __version__
    return revision.stdout.strip() if revision.returncode == 0 and tracked.returncode == 0 else __version__


def now() -> str:
    """Return the time in UTC, in whole seconds."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def provenance() -> dict[str, Any]:
    """Collect the provenance that every output of a run stores; host and user names are left out."""
    return {
        "diffva_ray": __version__,
        "code_revision": code_revision(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {"system": platform.platform(terse=True), "processor": platform.machine(), "cpus": os.cpu_count()},
        "started": now(),
    }


def publish(result: dict[str, Any], file: Path | None) -> None:
    """Print the result of a benchmark or a study as JSON, and write it to ``file`` if one is given."""
    text = json.dumps(result, indent=1)
    print(text)
    if file is not None:
        file.write_text(text + "\n")


def missing(package: str, what: str, extra: str) -> str:
    """Return the error message for a missing optional package: its purpose and how to install it (quoted, because some
    shells expand brackets)."""
    return f"{package} is needed for {what}: pip install 'diffva-ray[{extra}]'"
