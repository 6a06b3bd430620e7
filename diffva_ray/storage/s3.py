"""``Store`` for a prefix of an S3 bucket, through s3fs: AWS, MinIO, Ceph, OpenStack Swift.

Credentials, region and endpoint come from the standard chain (``AWS_PROFILE``, ``AWS_ENDPOINT_URL``, instance roles
...), read again for every store that is opened. botocore uses path style for a custom endpoint unless the profile
configures another one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import Any
from urllib.parse import urlsplit

from diffva_ray.progress import one_line
from diffva_ray.provenance import missing
from diffva_ray.storage.object_store import ObjectStore
from diffva_ray.storage.store import Entry, Modified, UnknownScheme, checked

try:
    import aiobotocore.session
    import aiohttp
    import botocore.exceptions as botocore
    import s3fs
    from botocore.parsers import ResponseParserError
    from fsspec.asyn import sync_wrapper  # type: ignore[import-untyped]
except ModuleNotFoundError:
    raise UnknownScheme(missing("s3fs", "s3:// addresses", "s3")) from None

# botocore's adaptive mode slows the client down when the server answers SlowDown (503), and retries for about a minute.
# s3fs would retry around that, 5 times and 25 times for a read; `_open` turns that off.
CONFIG = {"retries": {"total_max_attempts": 11, "mode": "adaptive"}, "connect_timeout": 5, "read_timeout": 15}
UNANSWERED, TIMED_OUT = 4, 2  # attempts when the connection fails, and when every attempt times out
BROKEN_BODY = (
    botocore.ResponseStreamingError, botocore.IncompleteReadError, botocore.FlexibleChecksumError,
    aiohttp.ClientPayloadError,
)  # fmt: skip
READS = 3  # attempts to read a body that breaks off: botocore retries only until it has the headers

# Errors of one file: S3 error code to errno ("404" if the answer has no body).
MISSING = {"NoSuchKey": errno.ENOENT, "404": errno.ENOENT}
UNREADABLE = {
    **MISSING, "PreconditionFailed": errno.ESTALE, "412": errno.ESTALE, "AccessDenied": errno.EACCES,
    "InvalidObjectState": errno.EACCES, "KeyTooLongError": errno.ENAMETOOLONG,
}  # fmt: skip
# Answers to a conditional PUT. s3fs does not map Swift's 412 to FileExistsError, because its body lacks the condition.
CONDITIONAL = {
    "PreconditionFailed": errno.EEXIST, "412": errno.EEXIST, "NotImplemented": errno.ENOSYS, "501": errno.ENOSYS,
    "ConditionalRequestConflict": errno.EBUSY, "OperationAborted": errno.EBUSY, "409": errno.EBUSY,
}  # fmt: skip
# Errors of the whole store that a retry does not fix.
LASTING = {
    "NoSuchBucket": "the bucket does not exist; create it or fix the address",
    "InvalidBucketName": "no bucket can have that name; fix the address",
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


class _FileSystem(s3fs.S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """File system that is opened again when it is unpickled (Ray Train sends one to its workers); its session stays."""

    cat_file: Callable[..., bytes]

    def __reduce__(self) -> tuple[Callable[[], _FileSystem], tuple[()]]:
        return _open, ()

    async def _cat_unmodified(self, key: str, since: float, **part: str) -> bytes:
        bucket, name, _ = self.split_path(key)
        limit = datetime.fromtimestamp(since, timezone.utc)
        answer = await self._call_s3("get_object", Bucket=bucket, Key=name, IfUnmodifiedSince=limit, **part)
        async with answer["Body"] as body:
            content: bytes = await body.read()
            return content

    cat_unmodified = sync_wrapper(_cat_unmodified)


def _open() -> _FileSystem:
    session = aiobotocore.session.AioSession()
    session.register("needs-retry.s3", _limit_attempts)
    # A new client each time (70 ms), because a cached client would keep old credentials. No concurrency within a file,
    # because s3fs would then request the size before each read.
    fs = _FileSystem(
        session=session, config_kwargs=CONFIG, max_concurrency=1, use_listings_cache=False, skip_instance_cache=True
    )
    fs.retries = 1
    return fs


class S3Store(ObjectStore):
    """Files below ``s3://bucket/prefix``. A file is written by one PUT and therefore appears whole or not at all."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.root = self.uri.removeprefix("s3://")
        if self.uri == "s3:" or self.root.startswith("/"):
            raise UnknownScheme(f"{uri}: write the address as s3://bucket/folder")
        if "@" in self.root.split("/")[0]:  # the message leaves out the address, which contains a secret
            raise UnknownScheme(
                "an s3:// address must not hold credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        self.fs = _open()
        self.bucket, self.prefix, _ = self.fs.split_path(self.root)

    def read(self, path: str, unmodified_since: float | None = None) -> bytes:
        key = self._key(path)
        if unmodified_since is None:
            return self._read(path, lambda: self.fs.cat_file(key))
        return self._read_unmodified(path, unmodified_since)

    def read_range(self, path: str, start: int, stop: int, unmodified_since: float | None = None) -> bytes:
        key = self._key(path)
        if unmodified_since is None:
            return self._read(path, lambda: self.fs.cat_file(key, start=start, end=stop))
        return self._read_unmodified(path, unmodified_since, Range=f"bytes={start}-{stop - 1}")

    def _read_unmodified(self, path: str, since: float, **part: str) -> bytes:
        key = self._key(path)
        try:
            return self._read(path, lambda: self.fs.cat_unmodified(key, since, **part))
        except OSError as error:
            if error.errno == errno.ESTALE:
                raise Modified(f"{path} was written since") from error
            raise

    def _read(self, path: str, fetch: Callable[[], bytes]) -> bytes:
        with self._asking(path, UNREADABLE):
            for _ in range(READS - 1):
                with suppress(*BROKEN_BODY):
                    return fetch()
            return fetch()

    def exists(self, path: str) -> bool:
        _, key, _ = self.fs.split_path(self._key(path))
        with suppress(FileNotFoundError), self._asking(path, MISSING):
            self.fs.call_s3("head_object", Bucket=self.bucket, Key=key)  # fs.isfile returns False for any failure
            return True
        return False

    def list(self, prefix: str = "") -> list[Entry]:
        folder = "".join(f"{part}/" for part in (self.prefix, checked(prefix).strip("/")) if part)
        start, entries = len(f"{self.prefix}/") if self.prefix else 0, []
        page: dict[str, Any] = {"NextContinuationToken": None}
        while "NextContinuationToken" in page:
            after = {"ContinuationToken": token} if (token := page["NextContinuationToken"]) else {}
            with self._asking(prefix):
                page = self.fs.call_s3("list_objects_v2", Bucket=self.bucket, Prefix=folder, **after)
            entries += [Entry(item["Key"][start:], item["Size"]) for item in page.get("Contents", ())]
        # Leave out the empty objects named "folder/" that other tools write.
        return sorted(entry for entry in entries if entry.path and not entry.path.endswith("/"))

    def put(self, path: str, data: bytes) -> None:
        key = self._key(path)
        with self._asking(path):
            self.fs.pipe_file(key, data)

    def _create(self, path: str, data: bytes) -> None:
        with self._asking(path, CONDITIONAL):
            self.fs.pipe_file(self._key(path), data, mode="create")

    def delete(self, path: str) -> None:
        key = self._key(path)
        with suppress(FileNotFoundError), self._asking(path, MISSING):
            self.fs.rm_file(key)

    def _key(self, path: str) -> str:
        return f"{self.root}/{checked(path)}"

    @contextmanager
    def _asking(self, path: str, answers: Mapping[str, int] | None = None) -> Iterator[None]:
        """Translate the errors of one request: codes in ``answers`` become an OSError of the file with that errno, and
        any other failure becomes a StoreError."""
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


def _limit_attempts(attempts: int, caught_exception: Exception | None, **_: Any) -> None:
    """Stop retries early when the server does not answer; the 11 attempts are for SlowDown. botocore calls this before
    each retry, and only an exception prevents it."""
    if caught_exception is not None:
        waited = isinstance(caught_exception, botocore.ReadTimeoutError | botocore.ConnectTimeoutError)
        if attempts >= (TIMED_OUT if waited else UNANSWERED):
            raise caught_exception


def _code(error: BaseException | None) -> str:
    """S3 error code behind an exception of s3fs; empty without one."""
    while error is not None:
        if isinstance(error, botocore.ClientError):
            return str(error.response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def _reason(error: Exception, code: str) -> tuple[str, bool]:
    """Short description of a failure of the store, and whether it is lasting."""
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
    # Other botocore errors and ValueErrors are wrong settings: an unknown profile, a malformed endpoint ...
    return text, isinstance(error, (botocore.BotoCoreError, ValueError)) and not isinstance(error, BROKEN_BODY)
