"""``Store`` of a folder that comes with the package: ``package://small``."""

from __future__ import annotations

from importlib.resources import files

from diffva_ray.storage.local import LocalStore

SCHEME = "package"


class PackagedStore(LocalStore):
    """A folder below ``diffva_ray/weights``. Its address is the same on every machine that has the package."""

    def __init__(self, uri: str) -> None:
        name = uri.removeprefix(f"{SCHEME}://").strip("/")
        super().__init__(str(files("diffva_ray") / "weights" / name))
        self.uri = uri.rstrip("/")
