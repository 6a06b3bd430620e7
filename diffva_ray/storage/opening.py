"""Opens the store at an address."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache

from diffva_ray.storage import archives
from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.packaged import SCHEME, PackagedStore
from diffva_ray.storage.store import Store, UnknownScheme, is_local, join


def _s3(uri: str) -> Store:
    from diffva_ray.storage.s3 import S3Store  # loads clients that a local run does not need

    return S3Store(uri)


def _cloud(uri: str) -> Store:
    from diffva_ray.storage.cloud import CloudStore

    return CloudStore(uri)


def _archives(uri: str) -> Store:
    return archives.ArchiveStore(open_store(uri.removeprefix(f"{archives.SCHEME}://")))


STORES: dict[str, Callable[[str], Store]] = {  # by scheme; a store that loads a client has a function like _s3
    "": LocalStore,
    "s3": _s3,
    "gs": _cloud,
    "az": _cloud,
    SCHEME: PackagedStore,
    archives.SCHEME: _archives,
}


def open_store(uri: str | os.PathLike[str]) -> Store:
    """Open the store at an address. Nothing is created or read.

    Args:
        uri: A local folder, or an address of a scheme in STORES, such as ``s3://bucket/prefix``.

    Returns:
        The store.

    Raises:
        UnknownScheme: No store has this scheme, or the address is malformed.
    """
    text = os.fspath(uri)
    scheme = "" if is_local(text) else text.partition("://")[0]
    if scheme not in STORES:
        schemes = ", ".join(f"{name}://" for name in STORES if name not in ("", SCHEME, archives.SCHEME))
        raise UnknownScheme(f"{text}: unknown scheme {scheme!r}; use a local path or {schemes}")
    return STORES[scheme](text)


@lru_cache(maxsize=16)
def opened(uri: str) -> Store:
    """Cached ``open_store`` for loops over many files: creates the client of a store once. Raises UnknownScheme."""
    return open_store(uri)


def open_file(uri: str | os.PathLike[str]) -> tuple[Store, str]:
    """Open the store of the folder that contains the file at ``uri``, which may be a member of an archive.

    Returns:
        The store of the folder, and the file's name in it.

    Raises:
        UnknownScheme: As ``open_store``.
    """
    text = os.fspath(uri)
    for archive, member in archives.split(text):
        store, name = open_file(archive)
        if store.exists(name):
            return archives.ArchiveStore(store), join(name, member)
    folder, slash, name = text.rpartition("/")
    return open_store(folder or slash or "."), name
