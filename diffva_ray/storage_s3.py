"""A prefix of an S3 bucket as a ``Store``, through s3fs: AWS, MinIO, Ceph, OpenStack Swift.

Credentials and endpoint come from the standard chain (``AWS_PROFILE``, ``AWS_ENDPOINT_URL``, instance roles ...).
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import botocore.exceptions as botocore
import s3fs

from diffva_ray.observe import LOG
from diffva_ray.storage import Entry, StoreError, checked

# botocore's adaptive mode slows the client down when the server says SlowDown (503), and tries again.
CONFIG = {"retries": {"max_attempts": 10, "mode": "adaptive"}}
NO_CREDENTIALS = (
    "NoCredentials", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch",
    "TokenRefreshRequired", "RequestTimeTooSkewed",
)  # fmt: skip


class S3Store:
    """Files below ``s3://bucket/prefix``. A file is one PUT, so it appears whole or not at all."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.root = self.uri.removeprefix("s3://")
        self.fs = s3fs.S3FileSystem(use_listings_cache=False, config_kwargs=CONFIG)
        self.conditional = True  # until the server says that it has no conditional PUT

    def read(self, path: str) -> bytes:
        with self._asking(path):
            return self.fs.cat_file(self._key(path))

    def exists(self, path: str) -> bool:
        with self._asking(path):
            return self.fs.isfile(self._key(path))

    def list(self, prefix: str = "") -> list[Entry]:
        try:
            with self._asking(prefix):
                found = self.fs.find(self._key(prefix), detail=True)
        except FileNotFoundError:
            return []
        start = len(self.root) + 1
        return sorted(Entry(key[start:], info["size"]) for key, info in found.items() if len(key) > start)

    def put(self, path: str, data: bytes) -> None:
        with self._writing(path):
            self.fs.pipe_file(self._key(path), data)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        # The look first also serves object stores that ignore If-None-Match or check it without a lock (Swift); what is
        # written follows from the plan, so a lost race writes equal bytes.
        if self.exists(path):
            return False
        if not self.conditional:
            self.put(path, data)
            return True
        try:
            with self._writing(path):
                self.fs.pipe_file(self._key(path), data, mode="create")
        except FileExistsError:
            return False
        except _NoConditionalPut:
            self.conditional = False
            LOG.info("%s: the server has no conditional PUT; looking before each commit instead", self.uri)
            self.put(path, data)
        return True

    def delete(self, path: str) -> None:
        with self._writing(path):
            if self.fs.isfile(self._key(path)):
                self.fs.rm_file(self._key(path))

    def sweep(self) -> int:
        return 0

    def local_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="diffva-"))
        for entry in self.list():
            target = folder / checked(entry.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.read(entry.path))
        return folder

    def _key(self, path: str) -> str:
        return f"{self.root}/{checked(path)}" if path else self.root

    @contextmanager
    def _asking(self, path: str) -> Iterator[None]:
        """Failures of one file stay OSErrors; those of the whole store become a StoreError."""
        try:
            yield
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise self._failed("the bucket does not exist; create it or mend the address", True) from error
            raise
        except PermissionError as error:
            if _code(error) in NO_CREDENTIALS:
                raise self._failed(f"credentials refused ({_code(error)})", True) from error
            raise
        except (
            botocore.NoCredentialsError,
            botocore.PartialCredentialsError,
            botocore.CredentialRetrievalError,
        ) as error:
            raise self._failed("no credentials found; set AWS_PROFILE, AWS_ACCESS_KEY_ID ...", True) from error
        except (botocore.BotoCoreError, botocore.ClientError, aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = _code(error) or " ".join(str(error).split())[:200] or type(error).__name__
            raise self._failed(f"{'/'.join([self.uri, path])}: {reason}") from error

    @contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        """Besides: the two answers of a conditional PUT, and a refusal, which is of the store when writing."""
        try:
            yield
        except FileExistsError:
            raise
        except OSError as error:
            if _code(error) in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                raise FileExistsError(path) from error  # Swift's 412 reaches s3fs without the condition's name
            if error.errno == errno.ENOSYS or _code(error) in ("NotImplemented", "501"):
                raise _NoConditionalPut(path) from error
            if isinstance(error, PermissionError) and _code(error) not in NO_CREDENTIALS:
                raise self._failed("no permission to write there (AccessDenied)", True) from error
            with self._asking(path):
                raise
        except (botocore.BotoCoreError, botocore.ClientError, aiohttp.ClientError):
            with self._asking(path):
                raise

    def _failed(self, reason: str, lasting: bool = False) -> StoreError:
        return StoreError(reason if reason.startswith("s3://") else f"{self.uri}: {reason}", lasting)


class _NoConditionalPut(Exception):
    """The server answered NotImplemented to If-None-Match."""


def _code(error: BaseException | None) -> str:
    """The S3 error code behind an exception of s3fs, if there is one."""
    while error is not None:
        if isinstance(error, botocore.ClientError):
            return str(error.response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""
