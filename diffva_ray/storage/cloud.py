"""``Store`` for a prefix of a Google Cloud Storage bucket or of an Azure Blob Storage container, through obstore.

Credentials and endpoint come from the environment and the provider's own tools: Google's application default
credentials or ``GOOGLE_*``, and ``AZURE_STORAGE_*``, managed and workload identities. They are read again for every
store that is opened, also by a worker.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import Any

from diffva_ray.progress import one_line
from diffva_ray.provenance import missing
from diffva_ray.storage.object_store import ObjectStore
from diffva_ray.storage.store import Entry, Modified, UnknownScheme, checked

try:
    import obstore
    from obstore.exceptions import (
        AlreadyExistsError,
        BaseError,
        InvalidPathError,
        PermissionDeniedError,
        PreconditionError,
        UnauthenticatedError,
    )
    from obstore.fsspec import FsspecStore
    from obstore.store import AzureStore, GCSStore
except ModuleNotFoundError:
    raise UnknownScheme(missing("obstore", "gs:// and az:// addresses", "cloud")) from None

# A request is repeated for at most a minute, ever more slowly. A large file may take longer than that to arrive, so its
# body has a limit for each read, and hardly one as a whole.
RETRIES: Any = {"max_retries": 10, "retry_timeout": timedelta(minutes=1)}
CLIENT: Any = {
    "connect_timeout": timedelta(seconds=5), "read_timeout": timedelta(seconds=15), "timeout": timedelta(hours=1),
}  # fmt: skip
STORES: dict[str, Any] = {"gs": GCSStore, "az": AzureStore}
ENDPOINTS = {"gs": ("GOOGLE_BASE_URL",), "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")}
CREDENTIALS = {
    "gs": "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or those of a managed identity",
}

# Errors of one file, by the type of obstore's exception.
GONE: Mapping[type[Exception], int] = {FileNotFoundError: errno.ENOENT}
UNREADABLE = {
    **GONE, PreconditionError: errno.ESTALE, PermissionDeniedError: errno.EACCES, InvalidPathError: errno.EINVAL,
}  # fmt: skip
EXISTS = ("BlobAlreadyExists", "ConditionNotMet", "UnauthorizedBlobOverwrite", "PreconditionFailed", "")  # error codes
STATUS = re.compile(r"status code: (\d{3})")
CODE = re.compile(r"<Code>(\w+)</Code>")
ADDRESS = re.compile(r"\w+://[^/\s?]+")
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "BucketNotFound")
NO_CREDENTIALS = ("token request", "Account must be specified")


class CloudStore(ObjectStore):
    """Files below ``gs://bucket/prefix`` or ``az://container/prefix``."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.scheme, _, self.root = self.uri.partition("://")
        self.bucket, _, self.prefix = self.root.partition("/")
        if not self.bucket:
            raise UnknownScheme(f"{uri}: write the address as {self.scheme.rstrip(':')}://bucket/folder")
        if "@" in self.bucket:  # the message leaves out the address, which contains a secret
            raise UnknownScheme(f"an {self.scheme}:// address must not hold credentials; {CREDENTIALS[self.scheme]}")

    def __reduce__(self) -> tuple[type[CloudStore], tuple[str], dict[str, Any]]:
        return CloudStore, (self.uri,), {"conditional": self.conditional}  # no client, whose credentials would travel

    @cached_property
    def client(self) -> Any:
        """The client, made at the first request."""
        options = {"client_options": _client_options(self.scheme), "retry_config": RETRIES}
        return STORES[self.scheme](self.bucket, prefix=self.prefix or None, **options)

    @property
    def fs(self) -> Any:
        """An fsspec file system of the whole scheme, for Ray Train's checkpoints."""
        file_system: Any = FsspecStore  # its types need the scheme as a literal
        return file_system(self.scheme, client_options=_client_options(self.scheme), retry_config=RETRIES)

    def read(self, path: str, unmodified_since: float | None = None) -> bytes:
        return self._read(path, unmodified_since)

    def read_range(self, path: str, start: int, stop: int, unmodified_since: float | None = None) -> bytes:
        if start >= stop:
            return b""
        return self._read(path, unmodified_since, range=(start, stop))

    def _read(self, path: str, since: float | None, **part: tuple[int, int]) -> bytes:
        options: Any = part
        if since is not None:
            options["if_unmodified_since"] = datetime.fromtimestamp(since, timezone.utc)
        try:
            with self._asking(path, UNREADABLE):
                return bytes(obstore.get(self.client, checked(path), options=options).bytes())
        except OSError as error:
            if error.errno == errno.ESTALE:
                raise Modified(f"{path} was written since") from error
            raise

    def exists(self, path: str) -> bool:
        with suppress(FileNotFoundError), self._asking(path, GONE):
            obstore.head(self.client, checked(path))
            return True
        return False

    def list(self, prefix: str = "") -> list[Entry]:
        with self._asking(prefix):
            found = obstore.list(self.client, checked(prefix).strip("/") or None).collect()
        entries = [Entry(item["path"], item["size"]) for item in found]
        # Leave out the empty objects named "folder/" that other tools write; obstore lists them without the slash.
        folders = {path.rpartition("/")[0] for path, _ in entries} | {""}
        return sorted(entry for entry in entries if entry.size or entry.path not in folders)

    def put(self, path: str, data: bytes) -> None:
        with self._asking(path):
            obstore.put(self.client, checked(path), data)

    def _create(self, path: str, data: bytes) -> None:
        try:
            with self._asking(path, {AlreadyExistsError: errno.EEXIST}):
                obstore.put(self.client, checked(path), data, mode="create")
        except FileExistsError as error:  # Azure answers 409 to other collisions, too
            if _code(error.__cause__) in EXISTS:
                raise
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), f"{self.uri}/{path}") from error

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError), self._asking(path, GONE):
            obstore.delete(self.client, checked(path))

    @contextmanager
    def _asking(self, path: str, answers: Mapping[type[Exception], int] | None = None) -> Iterator[None]:
        """Translate the errors of one request: those in ``answers`` become an OSError of the file with that errno, and
        any other failure becomes a StoreError."""
        try:
            yield
        except (OSError, BaseError) as error:
            code = _code(error)
            if code in NO_BUCKET:
                reason = f"the bucket does not exist; create it or fix the address ({code})"
                raise self._failed(reason, True) from error
            for kind, number in (answers or {}).items():
                if isinstance(error, kind):
                    raise OSError(number, os.strerror(number), f"{self.uri}/{path}") from error
            raise self._failed(*_reason(error, self.scheme)) from error


def _client_options(scheme: str) -> dict[str, Any]:
    """Options of the HTTP client. Without TLS only where the environment names such an endpoint."""
    endpoint = next((os.environ[name] for name in ENDPOINTS[scheme] if os.environ.get(name)), "")
    return {**CLIENT, "allow_http": endpoint.startswith("http://")}


def _code(error: BaseException | None) -> str:
    """The server's own name of an error; empty without one."""
    found = CODE.search(str(error))
    return found[1] if found else ""


def _reason(error: Exception, scheme: str) -> tuple[str, bool]:
    """Short description of a failure of the store, and whether it is lasting."""
    text = str(error).partition("Debug source")[0]
    status, where = STATUS.search(text), ADDRESS.search(text)
    if any(sign in text for sign in NO_CREDENTIALS):
        return f"no credentials found; {CREDENTIALS[scheme]}", True
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or (status and status[1] in ("401", "403")):
        return f"access denied or credentials refused ({_code(error) or 'status 403'}); {CREDENTIALS[scheme]}", True
    if status:
        return f"the server answers {_code(error) or status[1]}", status[1] == "400"
    if where:
        return f"no answer from {where[0]}", False
    return one_line(text, 200), "HTTP error" not in text  # a body that broke off, or a wrong setting
