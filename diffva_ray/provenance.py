"""Where an output comes from: code, versions, machine, time; found without importing anything heavy."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from diffva_ray._version import __version__

PACKAGES = ("torch", "diffusers", "transformers", "ray", "numpy", "scipy", "scikit-image", "pillow", "pyarrow")


def version(package: str) -> str:
    """The installed version, without importing the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def torch_version() -> str:
    """torch's version as a fingerprint key: without the local build tag, which differs between index and mirror."""
    return version("torch").split("+")[0]


def code_revision() -> str:
    """git revision of the checkout this package runs from (``-dirty`` when it was edited); the version elsewhere."""
    folder = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
        tracked = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return __version__
    return found.stdout.strip() if found.returncode == 0 and tracked.returncode == 0 else __version__


def provenance() -> dict[str, Any]:
    """What every output of a run says about its making. The host's name and user stay out of it."""
    return {
        "diffva_ray": __version__,
        "code_revision": code_revision(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {"system": platform.platform(terse=True), "processor": platform.machine(), "cpus": os.cpu_count()},
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def missing(package: str, what: str, extra: str) -> str:
    """The line that says what ``package`` is needed for and how it is installed, for the exception of the caller."""
    return f"{package} is needed for {what}: pip install diffva-ray[{extra}]"
