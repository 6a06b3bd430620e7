"""What every object store promises: the same tests on S3, Google Cloud Storage and Azure Blob Storage."""

from __future__ import annotations

import gc
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from on_stores import in_threads, upload

from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.s3 import S3Store
from diffva_ray.storage.store import Modified

if TYPE_CHECKING:
    from conftest import Server

everywhere = pytest.mark.parametrize("server", ["moto", "swift", "google", "azurite"], indirect=True)
with_locks = pytest.mark.parametrize("server", ["moto", "google", "azurite"], indirect=True)  # Swift looks, then writes
ODD = (
    "a b.png",
    "ü/Röntgen 胸.png",
    "a+b.png",
    "50%.png",
    "a%20b.png",
    "q?x=1&y.png",
    "#1.png",
    "'\"<&>.png",
    "~(!)*.png",
)


@everywhere
def test_store_keeps_its_promises(bucket: str) -> None:
    store = open_store(f"{bucket}/promises")
    assert store.list() == []
    store.put("a/b", b"one")
    store.put("a/b", b"two")
    assert not store.put_if_absent("a/b", b"three")
    assert store.put_if_absent("a/c", b"four")
    assert store.put_if_absent("a/empty", b"")
    assert store.read("a/b") == b"two"
    assert store.read("a/empty") == b""
    assert store.exists("a/empty")
    assert not store.exists("a")
    assert store.list("a") == [("a/b", 3), ("a/c", 4), ("a/empty", 0)]
    assert store.list("a/b") == []  # a file is no folder, as on a disk
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b")
    with pytest.raises(FileNotFoundError, match="promises/a/b"):
        store.read("a/b")
    with pytest.raises(ValueError, match="leaves its folder"):
        store.read("../other")


@everywhere
def test_a_store_can_be_sent_to_a_worker(bucket: str) -> None:
    """Pickled, as Ray Train sends its file system: small, without the session, and it works where it arrives."""
    store = open_store(f"{bucket}/sent")
    store.put("a", b"1")
    sent = pickle.dumps((store, store.fs))
    assert len(sent) < 2000
    there, fs = pickle.loads(sent)
    assert there.read("a") == b"1"
    assert fs.cat_file(f"{there.root}/a") == b"1"


@everywhere
def test_a_bucket_itself_is_a_store(bucket: str) -> None:
    store = open_store(f"{bucket}/")
    store.put("image.png", b"x")
    store.put("folder/image.png", b"xy")
    assert store.list() == [("folder/image.png", 2), ("image.png", 1)]
    assert store.list("folder") == [("folder/image.png", 2)]


@everywhere
def test_odd_names_come_back_as_they_are(bucket: str) -> None:
    store = open_store(f"{bucket}/odd names")
    for name in ODD:
        store.put(name, name.encode())
    assert [entry.path for entry in store.list()] == sorted(ODD)
    for name in ODD:
        assert store.read(name) == name.encode()
        assert not store.put_if_absent(name, b"other")
        store.delete(name)
        assert not store.exists(name)


@everywhere
def test_a_folder_is_not_its_sibling(bucket: str) -> None:
    store = open_store(f"{bucket}/run")
    store.put("records/1", b"")
    store.put("records-old/1", b"")
    store.put("recordsx", b"")
    open_store(f"{bucket}/run-2").put("records/2", b"")
    assert [entry.path for entry in store.list("records")] == ["records/1"]
    assert [entry.path for entry in store.list()] == ["records-old/1", "records/1", "recordsx"]


@pytest.mark.parametrize("server", ["moto", "swift", "google"], indirect=True)
def test_marks_of_folders_are_no_files(bucket: str, credentials: Server) -> None:
    with credentials.as_s3():
        plain = S3Store(bucket.replace("gs://", "s3://"))
        for key in ("data/", "data/Normal/"):  # what consoles and pyarrow leave
            plain.fs.call_s3("put_object", Bucket=plain.bucket, Key=key, Body=b"")
    store = open_store(f"{bucket}/data")
    store.put("Normal/1.png", b"x")
    assert store.list() == [("Normal/1.png", 1)]


@everywhere
def test_listing_goes_past_a_thousand_keys(bucket: str) -> None:
    store = open_store(f"{bucket}/many")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.put(f"records/part-{n:05d}.parquet", b""), range(1005)))
    assert [entry.path for entry in store.list("records")] == [f"records/part-{n:05d}.parquet" for n in range(1005)]


@everywhere
def test_a_file_of_many_parts(bucket: str) -> None:
    store, data = open_store(f"{bucket}/model"), os.urandom(1 << 20) * 101  # s3fs sends 100 MiB and more in parts
    store.put("unet.safetensors", data)
    assert store.read("unet.safetensors") == data
    assert not store.put_if_absent("unet.safetensors", b"other")


@with_locks
def test_of_many_writers_one_creates(bucket: str) -> None:
    for n in range(5):
        store = open_store(f"{bucket}/race-{n}")
        won = in_threads(lambda n, store=store: store.put_if_absent("part", bytes([n]) * 1000))
        assert won.count(True) == 1
        assert store.read("part") == bytes([won.index(True)]) * 1000


@everywhere
def test_equal_bytes_from_many_writers_are_there_once(bucket: str) -> None:
    for n in range(5):
        store = open_store(f"{bucket}/race-{n}")
        assert any(in_threads(lambda _, store=store: store.put_if_absent("part", b"same" * 1000)))
        assert store.list() == [("part", 4000)]
        assert store.read("part") == b"same" * 1000


@everywhere
def test_a_private_copy_is_whole(bucket: str, images: Path) -> None:
    upload(images, f"{bucket}/data")
    copy = open_store(f"{bucket}/data").local_folder()
    assert LocalStore(str(copy)).list() == LocalStore(str(images)).list()
    for entry in LocalStore(str(images)).list():
        assert (copy / entry.path).read_bytes() == (images / entry.path).read_bytes()


@everywhere
def test_stores_leave_no_connections_behind(bucket: str) -> None:
    def descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    open_store(bucket).exists("image")
    before = descriptors()
    for _ in range(8):
        open_store(bucket).exists("image")
    assert descriptors() < before + 5


@everywhere
def test_a_file_that_was_written_since_is_noticed(bucket: str) -> None:
    store = open_store(bucket)
    store.put("a", b"one")
    assert store.read("a", time.time() + 60) == b"one"
    with pytest.raises(Modified, match="a was written since"):
        store.read("a", time.time() - 3600)
    with pytest.raises(FileNotFoundError):
        store.read("b", time.time())


@everywhere
def test_a_known_server_is_not_asked_before_each_conditional_write(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(bucket)
    assert store.put_if_absent("a", b"one")
    monkeypatch.setattr(type(store), "exists", lambda *arguments: pytest.fail("an additional request"))
    assert store.put_if_absent("b", b"two")
    assert not store.put_if_absent("b", b"three")
    assert store.read("b") == b"two"
