"""A prefix of an S3 bucket as a ``Store``, through s3fs: AWS, MinIO, Ceph, OpenStack Swift.

Credentials, region and endpoint come from the standard chain (``AWS_PROFILE``, ``AWS_ENDPOINT_URL``, instance roles
...), looked up anew for every store that is opened. botocore speaks to a custom endpoint in path style unless the
profile says otherwise.
"""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiobotocore.session
import aiohttp
import botocore.exceptions as botocore
import s3fs
from botocore.parsers import ResponseParserError

from diffva_ray.progress import LOG, one_line
from diffva_ray.storage.store import Entry, StoreError, checked

# botocore's adaptive mode slows the client down when the server says SlowDown (503), and tries again for about a
# minute. s3fs would try again around that, five times and for a read five times five: it is told not to.
CONFIG = {"retries": {"total_max_attempts": 11, "mode": "adaptive"}, "connect_timeout": 5, "read_timeout": 15}
UNANSWERED, TIMED_OUT = 4, 2  # attempts when the connection fails, and when each of them waited for its timeout
BROKEN_OFF = (
    botocore.ResponseStreamingError, botocore.IncompleteReadError, botocore.FlexibleChecksumError,
    aiohttp.ClientPayloadError,
)  # fmt: skip
READS = 3  # attempts at a body that breaks off: botocore's end with the headers
CONFLICTS = 5  # attempts at a conditional PUT that collides with another request for the same key

# Answers about one file: an S3 error code and what it is on a disk ("404" where the answer has no body).
MISSING = {"NoSuchKey": errno.ENOENT, "404": errno.ENOENT}
UNREADABLE = {
    **MISSING, "AccessDenied": errno.EACCES, "InvalidObjectState": errno.EACCES, "KeyTooLongError": errno.ENAMETOOLONG,
}  # fmt: skip
# Answers to a conditional PUT. Swift's 412 reaches s3fs without the condition's name, so it is no FileExistsError yet.
CONDITIONAL = {
    "PreconditionFailed": errno.EEXIST, "412": errno.EEXIST, "NotImplemented": errno.ENOSYS, "501": errno.ENOSYS,
    "ConditionalRequestConflict": errno.EBUSY, "OperationAborted": errno.EBUSY, "409": errno.EBUSY,
}  # fmt: skip
# Answers about the whole store that the next attempt gets as well.
LASTING = {
    "NoSuchBucket": "the bucket does not exist; create it or mend the address",
    "InvalidBucketName": "no bucket can have that name; mend the address",
    "AccessDenied": "access denied; these credentials lack a permission there",
    "403": "access denied or credentials refused",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    **dict.fromkeys(("QuotaExceeded", "XMinioStorageFull"), "the store is full; free some space"),
    **dict.fromkeys(
        ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "301"),
        "the bucket is in another region; set AWS_DEFAULT_REGION",
    ),
    **dict.fromkeys(
        ("SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
         "InvalidSecurity", "InvalidClientTokenId", "NotSignedUp", "AccountProblem", "AllAccessDisabled"),
        "credentials refused; renew them, or set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
}  # fmt: skip
NO_CREDENTIALS = "no credentials found; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


class _FileSystem(s3fs.S3FileSystem):
    """Pickled, it is opened anew where it arrives (Ray Train sends one to its workers); its session is not sent."""

    def __reduce__(self) -> tuple[Callable[[], _FileSystem], tuple[()]]:
        return _open, ()


def _open() -> _FileSystem:
    session = aiobotocore.session.AioSession()
    session.register("needs-retry.s3", _stop_asking_the_dead)
    # A new client each time (70 ms): s3fs would hand out one with the credentials of an hour ago. No concurrency
    # within a file: for that it asks for the size before it reads.
    fs = _FileSystem(
        session=session, config_kwargs=CONFIG, max_concurrency=1, use_listings_cache=False, skip_instance_cache=True
    )
    fs.retries = 1
    return fs


class S3Store:
    """Files below ``s3://bucket/prefix``. A file is one PUT, so it appears whole or not at all."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.root = self.uri.removeprefix("s3://")
        if self.uri == "s3:" or self.root.startswith("/"):
            raise OSError(f"{uri}: an address is s3://bucket/folder")
        if "@" in self.root.split("/")[0]:  # not shown: there is a secret in it
            raise OSError("an s3:// address must not hold credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        self.fs = _open()
        self.bucket, self.prefix, _ = self.fs.split_path(self.root)
        self.conditional = True  # until the server says that it has no conditional PUT

    def read(self, path: str) -> bytes:
        return self._read(path)

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        return self._read(path, start=start, end=stop)

    def _read(self, path: str, **limits: int) -> bytes:
        key = self._key(path)
        with self._asking(path, UNREADABLE):
            for _ in range(READS - 1):
                with suppress(*BROKEN_OFF):
                    return self.fs.cat_file(key, **limits)
            return self.fs.cat_file(key, **limits)

    def exists(self, path: str) -> bool:
        _, key, _ = self.fs.split_path(self._key(path))
        with suppress(FileNotFoundError), self._asking(path, MISSING):
            self.fs.call_s3("head_object", Bucket=self.bucket, Key=key)  # fs.isfile takes any failure for a no
            return True
        return False

    def list(self, prefix: str = "") -> list[Entry]:
        folder = "".join(f"{part}/" for part in (self.prefix, checked(prefix).strip("/")) if part)
        start, found = len(f"{self.prefix}/") if self.prefix else 0, []
        page: dict[str, Any] = {"NextContinuationToken": None}
        while "NextContinuationToken" in page:
            after = {"ContinuationToken": token} if (token := page["NextContinuationToken"]) else {}
            with self._asking(prefix):
                page = self.fs.call_s3("list_objects_v2", Bucket=self.bucket, Prefix=folder, **after)
            found += [Entry(item["Key"][start:], item["Size"]) for item in page.get("Contents", ())]
        # Other tools leave empty files named "folder/"; the one of this folder itself has no name left.
        return sorted(entry for entry in found if entry.path and not entry.path.endswith("/"))

    def put(self, path: str, data: bytes) -> None:
        key = self._key(path)
        with self._asking(path):
            self.fs.pipe_file(key, data)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        # The look first also serves object stores that ignore If-None-Match or check it without a lock (Swift); what is
        # written follows from the plan, so a lost race writes equal bytes.
        key = self._key(path)
        for attempt in range(CONFLICTS):
            if self.exists(path):
                return False
            if not self.conditional:
                self.put(path, data)
                return True
            try:
                with self._asking(path, CONDITIONAL):
                    self.fs.pipe_file(key, data, mode="create")
                return True
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno == errno.ENOSYS:
                    self.conditional = False
                    LOG.info("%s: the server has no conditional PUT; looking before each commit instead", self.uri)
                else:  # a collision says nothing about whose bytes are there, if any: look again
                    time.sleep(0.1 * 2**attempt)
        raise self._failed(f"{path} was in use at each of {CONFLICTS} attempts to write it")

    def delete(self, path: str) -> None:
        key = self._key(path)
        with suppress(FileNotFoundError), self._asking(path, MISSING):
            self.fs.rm_file(key)

    def sweep(self) -> int:
        return 0

    def local_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="diffva-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for entry in self.list():
            target = folder / checked(entry.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.read(entry.path))
        return folder

    def _key(self, path: str) -> str:
        return f"{self.root}/{checked(path)}"

    @contextmanager
    def _asking(self, path: str, answers: Mapping[str, int] | None = None) -> Iterator[None]:
        """One request. The error codes in ``answers`` are of this file and become an OSError of that number; every
        other failure is of the store."""
        try:
            yield
        except (
            OSError, ValueError, botocore.ClientError, botocore.BotoCoreError, aiohttp.ClientError, ResponseParserError
        ) as error:  # fmt: skip
            code = _code(error)
            if number := (answers or {}).get(code):
                reason = f"{os.strerror(number)} ({code})" if number not in MISSING.values() else os.strerror(number)
                raise OSError(number, reason, f"{self.uri}/{path}") from error
            if code in LASTING:
                raise self._failed(f"{LASTING[code]} ({code})", True) from error
            raise self._failed(*_reason(error, code)) from error

    def _failed(self, reason: str, lasting: bool = False) -> StoreError:
        return StoreError(f"{self.uri}: {reason}", lasting)


def _stop_asking_the_dead(attempts: int, caught_exception: Exception | None, **_: Any) -> None:
    """Eleven attempts are for a server that says SlowDown. botocore asks this before each further one; raising is the
    only way to say no."""
    if caught_exception is not None:
        waited = isinstance(caught_exception, botocore.ReadTimeoutError | botocore.ConnectTimeoutError)
        if attempts >= (TIMED_OUT if waited else UNANSWERED):
            raise caught_exception


def _code(error: BaseException | None) -> str:
    """The S3 error code behind an exception of s3fs, if there is one."""
    while error is not None:
        if isinstance(error, botocore.ClientError):
            return str(error.response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def _reason(error: Exception, code: str) -> tuple[str, bool]:
    """A failure of the store in a few words, and whether it lasts."""
    if isinstance(error, botocore.NoCredentialsError | botocore.PartialCredentialsError):
        return NO_CREDENTIALS, True
    if code:
        return f"the server answers {code}", False
    text = one_line(error, 200)
    if isinstance(error, botocore.SSLError):
        return text, True
    if isinstance(error, botocore.ConnectionError | botocore.HTTPClientError):
        url = urlsplit(str(error.kwargs.get("endpoint_url", "")))
        where = f"{url.scheme}://{url.netloc.rpartition('@')[2]}"  # without the request, and without credentials
        return (f"no answer from {where} ({type(error).__name__})" if url.netloc else text), False
    # What is left of botocore's and of ValueErrors is a wrong setting: an unknown profile, a malformed endpoint ...
    return text, isinstance(error, (botocore.BotoCoreError, ValueError)) and not isinstance(error, BROKEN_OFF)
