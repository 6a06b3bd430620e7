import os
import threading
from pathlib import Path

import pytest

from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import StoreError


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "store"))


def test_put_replaces_whole_and_leaves_nothing_behind(store: LocalStore) -> None:
    store.put("a/b.bin", b"one")
    store.put("a/b.bin", b"two")
    assert store.read("a/b.bin") == b"two"
    assert os.listdir(store.root / "a") == ["b.bin"]


def test_a_failed_put_leaves_the_old_file(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("a.bin", b"old")

    def broken(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StoreError, match="disk full"):
        store.put("a.bin", b"new")
    monkeypatch.undo()
    assert store.read("a.bin") == b"old"
    assert [entry.path for entry in store.list()] == ["a.bin"]
    assert os.listdir(store.root) == ["a.bin"]


def test_only_one_of_many_writers_creates_a_file(store: LocalStore) -> None:
    barrier = threading.Barrier(8)
    winners = []

    def write(n: int) -> None:
        barrier.wait()
        if store.put_if_absent("part", bytes([n]) * 1000):
            winners.append(n)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert store.read("part") == bytes([winners[0]]) * 1000


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "a\0b"])
def test_paths_stay_inside(store: LocalStore, path: str) -> None:
    for act in (store.read, store.exists, store.delete, lambda p: store.put(p, b"")):
        with pytest.raises(ValueError, match="leaves its folder"):
            act(path)


def test_listing_is_sorted_recursive_and_survives_link_loops(store: LocalStore) -> None:
    for path in ("b/2", "a/1", "a/10", "c"):
        store.put(path, b"xy")
    os.symlink(store.root, store.root / "a" / "loop")
    os.symlink(store.root / "nowhere", store.root / "a" / "dangling")
    assert store.list() == [("a/1", 2), ("a/10", 2), ("b/2", 2), ("c", 2)]
    assert store.list("a") == [("a/1", 2), ("a/10", 2)]
    assert store.list("none") == []


def test_linked_folders_are_followed(tmp_path: Path, store: LocalStore) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "image.png").write_bytes(b"x")
    store.put("own.png", b"x")
    os.symlink(tmp_path / "elsewhere", store.root / "Normal")
    assert [entry.path for entry in store.list()] == ["Normal/image.png", "own.png"]


def test_unknown_scheme_is_named() -> None:
    with pytest.raises(ValueError, match="gopher"):
        open_store("gopher://hole")


def test_sweep_and_list_tolerate_a_concurrent_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between listing a folder and reading a file's status, a writer may rename or remove the file."""
    store = LocalStore(str(tmp_path))
    (tmp_path / ".tmp-1").write_bytes(b"x")
    stat = Path.stat

    def vanishing(self: Path, **options: object) -> object:
        if self.name == ".tmp-1":
            self.unlink(missing_ok=True)
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", vanishing)
    assert store.sweep() == 0
    store.put("a", b"1")
    real_stat = os.stat
    gone = str(tmp_path / "a")
    monkeypatch.setattr(
        os, "stat", lambda file, **kwargs: (os.unlink(file) if file == gone else None, real_stat(file, **kwargs))[1]
    )
    assert store.list() == []
