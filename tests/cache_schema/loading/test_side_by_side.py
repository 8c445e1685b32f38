"""Batches are made several at once while a cache has to be waited for, and one by one while it is in memory here."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import cache_servers as servers
import pytest

from cache_schema import Cache, open_cache
from cache_schema.loading.side_by_side import AT_ONCE, reading_ahead
from cache_schema.reading.waiting import DiskPace

CacheOf = Callable[..., Path]


def test_of_a_cache_that_has_to_be_fetched_several_batches_are_made_at_once(
    cache_of: CacheOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIT_CACHE_LOCAL", str(tmp_path / "blocks"))
    url, files = servers.nginx()
    (files / "at-once").symlink_to(cache_of(kind="int8"))
    cache = open_cache(f"{url}/at-once")
    together = threading.Barrier(AT_ONCE, timeout=60)

    def make(item: int) -> int:
        together.wait()
        return item

    with reading_ahead(make, [cache], workers=0) as ahead:
        assert list(ahead.over(range(2 * AT_ONCE))) == list(range(2 * AT_ONCE))


def test_of_a_cache_in_memory_one_batch_is_made_at_a_time_and_no_more_ahead_than_wanted(cache_of: CacheOf) -> None:
    cache: Cache = open_cache(cache_of(kind="int8"))
    busy, most, drawn = threading.Semaphore(1), 0, 0

    def make(item: int) -> int:
        assert busy.acquire(blocking=False)
        cache.read([item])
        busy.release()
        return item

    with reading_ahead(make, [cache], workers=0, calm=2) as ahead:

        def items() -> object:
            nonlocal drawn
            while drawn < 5:
                drawn += 1
                yield drawn

        for item in ahead.over(items()):
            most = max(most, drawn - item)
    assert (item, most) == (5, 2)


def test_what_comes_from_a_disk_is_told_from_what_the_page_cache_holds(tmp_path: Path) -> None:
    path, size = tmp_path / "large", 16 << 20
    path.write_bytes(os.urandom(1 << 20) * 16)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        pace, found = DiskPace(), []
        for _ in range(2):
            with pace.over(size, 1):
                assert len(os.pread(fd, size, 0)) == size
            found.append(pace.from_disk)
    finally:
        os.close(fd)
    if not found[0]:
        pytest.skip("this file system keeps what it is asked to drop, or its reads are not counted")
    assert found == [True, False]
