"""The bounded local copy of what was read from a distance: blocks of files, shared by processes, never believed."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema import CacheError
from cache_schema.storage import blocks as stored
from cache_schema.storage.blocks import BLOCK, BlockStore
from cache_schema.storage.remote import RemoteFolder, Stat
from cache_schema.storage.streamed import StreamedFolder, parse_size


class _Memory:
    """Files in memory as a place, which counts what it sends."""

    writable = False

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self._sent = files, [0]

    @property
    def sent(self) -> int:
        return sum(self._sent)

    def stat(self, name: str) -> Stat | None:
        return Stat(len(self.files[name]), "1") if name in self.files else None

    def get(self, name: str, start: int, stop: int, tag: str) -> bytes:
        self._sent.append(stop - start)
        return self.files[name][start:stop]


def _used(store: BlockStore) -> int:
    # Each file has a table besides, of less than a page for these.
    return sum(max(0, path.stat().st_blocks * 512 - 8192) for path in store.files())


def _one_block(store: BlockStore, name: str) -> stored.BlockFile:
    file = store.file(name, "1", BLOCK)
    with file.lease():
        file.put({0: name.encode() * (BLOCK // len(name))})
    return file


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(0, 6 * BLOCK),
    ranges=st.lists(st.tuples(st.integers(0, 6 * BLOCK), st.integers(0, 2 * BLOCK)), max_size=6),
    bound=st.integers(0, 4),
)
def test_ranges_by_way_of_blocks_are_slices_and_no_byte_is_fetched_twice(
    tmp_path_factory: pytest.TempPathFactory, size: int, ranges: list[tuple[int, int]], bound: int
) -> None:
    data = bytes(i * 31 % 251 for i in range(997)) * (size // 997 + 1)
    place = _Memory({"a": data[:size]})
    store = BlockStore(tmp_path_factory.mktemp("blocks"), bound * BLOCK, least=0)
    file = StreamedFolder(RemoteFolder("s3://x/y", place), store).open("a")
    inside = [(offset, length) for offset, length in ranges if offset + length <= size]
    expected = [data[offset : offset + length] for offset, length in inside]
    assert file.read_ranges(inside) == expected
    assert place.sent <= size
    fetched = place.sent
    assert file.read_ranges(inside) == expected
    if bound == 4 and fetched <= 3 * BLOCK:
        assert place.sent == fetched
    assert _used(store) <= store.bound


def test_the_longest_unused_files_make_room_but_none_that_is_being_read(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "blocks", 3 * BLOCK + 40_000, least=0)
    old, read, _ = (_one_block(store, name) for name in ("aa", "bb", "cc"))
    for age, path in enumerate(sorted(store.files(), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, (1000 + age, 1000 + age))
    with read.lease():
        for name in ("dd", "ee", "ff"):
            _one_block(store, name)
        assert read.has(0)
    assert len(list(store.files())) <= 3
    with old.lease():
        assert not old.has(0)


def test_a_killed_reader_keeps_nothing_from_being_removed(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "blocks", BLOCK + 20_000, least=0)
    _one_block(store, "aa")
    path = next(store.files())
    program = (
        "import fcntl,os,sys,time\nfcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_SH)\n"
        "print(1, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        _one_block(store, "bb")
        assert path.exists()
        reader.kill()
    _one_block(store, "cc")
    assert not path.exists()


def test_a_block_that_a_crash_left_torn_is_fetched_again(tmp_path: Path) -> None:
    place = _Memory({"a": b"x" * (2 * BLOCK)})
    for _ in range(2):
        store = BlockStore(tmp_path / "blocks", 8 * BLOCK, least=0)
        file = StreamedFolder(RemoteFolder("s3://x/y", place), store).open("a")
        assert file.read(BLOCK - 5, 10) == b"x" * 10
        path = next(store.files())
        with path.open("r+b") as torn:
            torn.seek(-BLOCK, os.SEEK_END)
            torn.write(bytes(1000))
        (store.root / "used").write_bytes(b"")
    assert place.sent == 3 * BLOCK


def test_a_block_that_is_removed_while_it_is_read_is_read_to_the_end(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "blocks", 8 * BLOCK, least=0)
    file = _one_block(store, "aa")
    found = bytearray(BLOCK)
    with file.lease():
        next(store.files()).unlink()
        assert file.read_seen(memoryview(found), 0)
    assert found == b"a" * BLOCK
    with file.lease():  # and whoever comes next finds that it is gone
        assert not file.has(0)
        assert not file.read_seen(memoryview(found), 0)


def test_many_threads_and_a_small_bound_end_and_read_what_is_there(tmp_path: Path) -> None:
    data = {str(i): bytes([i]) * BLOCK for i in range(8)}
    folder = StreamedFolder(
        RemoteFolder("s3://x/y", _Memory(data)), BlockStore(tmp_path / "blocks", 2 * BLOCK, least=0)
    )
    wrong: list[str] = []

    def read(first: int) -> None:
        for i in range(first, first + 24):
            name = str(i % 8)
            if folder.open(name).read(100, 1000) != data[name][:1000]:
                wrong.append(name)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_several_threads_ask_for_at_once_is_fetched_once(tmp_path: Path) -> None:
    data = bytes(range(256)) * (8 * BLOCK // 256)
    place = _Memory({"a": data})
    file = StreamedFolder(RemoteFolder("s3://x/y", place), BlockStore(tmp_path / "blocks", 8 * BLOCK, least=0)).open(
        "a"
    )
    wanted = [(start, 3 * BLOCK // 2) for start in range(0, len(data) - 2 * BLOCK, BLOCK // 2)]
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(file.read_ranges, [wanted, *([[each] for each in wanted])]))
    assert found[0] == [data[start : start + size] for start, size in wanted] == [each[0] for each in found[1:]]
    assert place.sent == max(start + size for start, size in wanted)


def test_a_bound_below_what_is_in_flight_and_a_folder_that_is_not_ours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="allow more"):
        BlockStore(tmp_path / "blocks", 1000)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="holds other things"):
        BlockStore(tmp_path / "mine", 1 << 30)
    assert [parse_size(text) for text in ("50GB", "1.5 mb", "0", "12")] == [50_000_000_000, 1_500_000, 0, 12]
    with pytest.raises(CacheError, match="no size"):
        parse_size("lots")


def test_processes_that_use_a_folder_for_the_first_time_at_once_and_one_that_died_then_are_no_hindrance(
    tmp_path: Path,
) -> None:
    with ThreadPoolExecutor(8) as threads:
        for number in range(4):
            root = tmp_path / f"blocks-{number}"
            root.mkdir()
            (root / "dit-distill-blocks.tmp-host-1-ab-0").write_bytes(b"1")
            assert len(list(threads.map(lambda _, root=root: BlockStore(root, 1 << 30), range(8)))) == 8


def test_only_our_own_files_in_the_folder_are_ever_removed(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "blocks", BLOCK + 20_000, least=0)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ("a" * 40)).write_bytes(b"x" * BLOCK)
    (store.root / "ab").symlink_to(tmp_path / "elsewhere")
    (store.root / "keep").write_text("mine")
    for name in ("aa", "bb", "cc"):
        _one_block(store, name)
    assert (tmp_path / "elsewhere" / ("a" * 40)).exists()
    assert (store.root / "keep").exists()
