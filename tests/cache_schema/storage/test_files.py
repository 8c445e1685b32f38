"""A file is wholly there or not there at all, whatever the operating system answers and whoever died before."""

import errno
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from cache_building import many_examples
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import CacheCorrupt, CacheStorageError
from cache_schema.storage import files
from cache_schema.storage.checksum import combine_crc32c, crc32c
from cache_schema.storage.files import (
    AsideFile,
    digest,
    digest_file,
    directory_lock,
    is_aside,
    read_bounded,
    sweep_aside_files,
    write_file,
    write_new_file,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_written_file_has_the_digest_that_was_returned(tmp_path: Path) -> None:
    written = write_file(tmp_path / "deep" / "folder" / "file", b"123456789")
    # The check value of CRC-32C in RFC 3720 and every table of CRCs.
    assert (written.bytes, written.crc32c) == (9, "e3069283")
    assert written == digest_file(tmp_path / "deep" / "folder" / "file") == digest(b"123456789")
    assert names(tmp_path / "deep" / "folder") == ["file"]


@many_examples
@given(st.lists(st.binary(max_size=300), max_size=6))
def test_the_checksum_of_pieces_put_together_follows_from_theirs(pieces: list[bytes]) -> None:
    together = 0
    for piece in pieces:
        together = combine_crc32c(together, crc32c(piece), len(piece))
    assert together == crc32c(b"".join(pieces))


@many_examples
@given(st.lists(st.sampled_from([0, 1, 7, 65_535, 65_536, 65_537, 200_000]), max_size=6), st.booleans())
def test_a_file_is_its_pieces_in_blocks_of_64_kb_whatever_their_sizes(sizes: list[int], interrupted: bool) -> None:
    pieces = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    writes: list[tuple[int, int]] = []

    def spy(fd: int, buffers: list[memoryview]) -> int:
        place = os.lseek(fd, 0, os.SEEK_CUR)
        if interrupted and len(writes) % 2 == 0:
            buffers = [buffers[0][: max(1, buffers[0].nbytes // 2)]]
        written = real(fd, buffers)
        writes.append((place, written))
        return written

    real = os.writev
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "writev", spy)
        with AsideFile(Path(folder, "a")) as aside:
            for number, piece in enumerate(pieces):
                aside.write(piece, crc32c(piece) if number % 2 else None)
            written = aside.finish()
            aside.publish()
        assert Path(folder, "a").read_bytes() == b"".join(pieces)
        assert written == digest_file(Path(folder, "a"))
    if not interrupted:
        assert [place for place, _ in writes] == list(range(0, sum(sizes), 1 << 16))


def test_the_disk_begins_with_a_large_file_before_its_end_where_that_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def spy(fd: int, place: int, size: int, advice: int) -> None:
        asked.append((place, size))
        if len(asked) == 2:
            raise OSError(errno.EINVAL, "not on this file system")

    monkeypatch.setattr(files.os, "posix_fadvise", spy, raising=False)
    with AsideFile(tmp_path / "a") as aside:
        for number in range(27):
            aside.write(bytes([number]) * 1_000_000)
        aside.finish()
        aside.publish()
    assert [place for place, _ in asked] == [0, *(sum(pair) for pair in asked[:-1])], "one after the other"
    assert len(asked) == 3
    assert (tmp_path / "a").stat().st_size == 27_000_000


def test_a_file_written_with_known_checksums_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    with AsideFile(tmp_path / "a") as aside:
        aside.write(b"head")
        for piece in (b"x" * 5000, b"y" * 5000):
            aside.write(piece, crc32c(piece))
        aside.write(b"tail")
        written = aside.finish()
        aside.publish()
    assert written == digest_file(tmp_path / "a")


def test_a_file_that_is_not_published_leaves_nothing(tmp_path: Path) -> None:
    with AsideFile(tmp_path / "file") as aside:
        aside.write(b"half of it")
        assert is_aside(names(tmp_path)[0])
    assert names(tmp_path) == []


def test_an_interrupt_between_two_steps_of_a_write_leaves_nothing(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from cache_schema.storage.files import AsideFile
AsideFile(Path(sys.argv[1])).__enter__()  # and interrupted before the context that would undo it
if os.fork() == 0:
    sys.exit()  # a forked process leaves what is its parent's
os.wait()
print(len(os.listdir(os.path.dirname(sys.argv[1]))))
raise KeyboardInterrupt
"""
    command = [sys.executable, "-c", script, str(tmp_path / "file")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.stdout, "KeyboardInterrupt" in ended.stderr) == ("1\n", True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "writable"), (errno.EIO, "mend that")]
)
def test_a_failing_disk_gives_one_clear_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str
) -> None:
    def fail(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "file").write_bytes(b"before")
    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(CacheStorageError, match=advice) as caught:
        write_file(tmp_path / "file", b"after")
    assert str(tmp_path / "file") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


def test_a_write_cut_short_by_the_kernel_leaves_nothing(tmp_path: Path) -> None:
    """A real refusal: the process may not write files larger than 64 KiB."""
    script = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "from cache_schema.storage.files import write_file\n"
        "from cache_schema.errors import CacheStorageError\n"
        "try:\n    write_file(Path(sys.argv[1]), bytes(1 << 20))\n"
        "except CacheStorageError as error:\n    print(error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "file")], capture_output=True, text=True, check=True
    )
    assert "raise the file size limit" in ran.stdout
    assert names(tmp_path) == []


def test_of_two_new_files_the_first_stays(tmp_path: Path) -> None:
    assert write_new_file(tmp_path / "file", b"first")
    assert not write_new_file(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert names(tmp_path) == ["file"]


def test_a_new_file_is_written_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(files.os, "link", unsupported)
    assert write_new_file(tmp_path / "file", b"first")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert names(tmp_path) == ["file"]


def test_only_what_dead_writers_left_is_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, mine = files._HOST, files._TOKEN
    left = {
        "dead": f"a.tmp-{host}-{dead.pid}-0123abcd-0",
        "same number": f"b.tmp-{host}-{os.getpid()}-0123abcd-0",
        "alive": f"c.tmp-{host}-{os.getppid()}-0123abcd-0",
        "mine": f"d.tmp-{host}-{os.getpid()}-{mine}-0",
        "elsewhere": "e.tmp-elsewhere-1-0123abcd-0",
        "elsewhere, old": "f.tmp-elsewhere-1-0123abcd-0",
        "no process": f"g.tmp-{host}-{10**18}-0123abcd-0",
        "not ours": "h.tmp-notes",
    }
    (tmp_path / "folder").mkdir()
    for name in left.values():
        (tmp_path / "folder" / name).write_bytes(b"")
    os.utime(tmp_path / "folder" / left["elsewhere, old"], (0, 0))
    swept = {path.name for path in sweep_aside_files(tmp_path)}
    assert swept == {left[key] for key in ("dead", "same number", "elsewhere, old", "no process")}
    assert set(names(tmp_path / "folder")) == set(left.values()) - swept


def test_the_lock_of_a_directory_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(50):
            with directory_lock(tmp_path):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert names(tmp_path) == []


def test_a_file_beyond_the_limit_and_a_pipe_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(CacheCorrupt, match="larger than the 10 bytes"):
        read_bounded(tmp_path / "large", 10)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CacheCorrupt, match="not a plain file"):
        read_bounded(tmp_path / "pipe", 10)
    with pytest.raises(CacheCorrupt, match="not a plain file"):
        read_bounded(Path("/dev/zero"), 10)
