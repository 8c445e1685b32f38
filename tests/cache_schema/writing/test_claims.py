"""Builders that share a cache each take pieces of their own, and what a dead one had is free."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cache_building import start, tree

from cache_schema.errors import CacheStorageError
from cache_schema.storage.local import LocalFolder
from cache_schema.writing.claims import Claims

HOLDER = """
import signal, sys
from cache_schema.storage.local import LocalFolder
from cache_schema.writing.claims import Claims
claims = Claims(LocalFolder(sys.argv[1]))
print([claims.take("features", shard) for shard in (0, 2)], flush=True)
signal.pause()
"""


def kill_once_awaited(process: subprocess.Popen) -> None:
    """Kill a process as soon as somebody waits for a lock; the kernel marks such a request with an arrow."""
    deadline = time.monotonic() + 10
    while "->" not in Path("/proc/locks").read_text() and time.monotonic() < deadline:
        pass
    process.kill()


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    return start(tmp_path / "cache").root


@pytest.fixture
def holder(begun: Path):
    """Another process, with claims on the feature shards 0 and 2."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(begun)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "[True, True]\n"
    yield process
    process.kill()
    process.communicate()


def test_a_piece_belongs_to_one_builder_at_a_time(begun: Path) -> None:
    with Claims(LocalFolder(begun)) as mine, Claims(LocalFolder(begun)) as theirs:
        assert mine.take("features", 3)
        assert not theirs.take("features", 3)
        assert theirs.take("images", 3)
        assert theirs.take("calibration")
        mine.drop("features", 3)
        assert theirs.take("features", 3)
    with Claims(LocalFolder(begun)) as later:
        assert later.take("features", 3)


def test_only_what_is_neither_committed_nor_claimed_is_missing(begun: Path, holder: subprocess.Popen) -> None:
    (begun / "journal/features-00001.json").touch()
    with Claims(LocalFolder(begun)) as claims:
        assert list(claims.missing("features", range(4))) == [3]


def test_who_waits_gets_what_a_dead_builder_had_and_not_what_it_had_committed(
    begun: Path, holder: subprocess.Popen
) -> None:
    (begun / "journal/features-00000.json").touch()
    with Claims(LocalFolder(begun)) as claims:
        waiting = claims.missing("features", range(3), wait=True)
        assert next(waiting) == 1
        threading.Thread(target=kill_once_awaited, args=[holder]).start()
        assert list(waiting) == [2]


def test_claims_leave_no_trace_in_the_cache(begun: Path) -> None:
    before, written = tree(begun), (begun / "journal/layout-00000.json").stat()
    with Claims(LocalFolder(begun)) as claims:
        assert list(claims.missing("features", range(3))) == [0, 1, 2]
        assert tree(begun) == before
    after = (begun / "journal/layout-00000.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


def test_claims_are_kept_when_the_same_file_is_read_meanwhile(begun: Path) -> None:
    with Claims(LocalFolder(begun)) as mine, Claims(LocalFolder(begun)) as theirs:
        assert mine.take("features", 0)
        (begun / "journal/layout-00000.json").read_bytes()
        assert not theirs.take("features", 0)


def test_without_locks_every_builder_may_compute_everything(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with Claims(LocalFolder(begun)) as mine, Claims(LocalFolder(begun)) as theirs:
        assert mine.take("features", 0)
        monkeypatch.setattr(fcntl, "fcntl", no_locks)
        assert list(theirs.missing("features", range(3), wait=True)) == [0, 1, 2]


def test_a_cache_that_was_not_begun_has_nothing_to_claim(tmp_path: Path) -> None:
    with pytest.raises(CacheStorageError, match="layout-00000"):
        Claims(LocalFolder(tmp_path))
