"""What every folder keeps to, wherever its files are: one line in FOLDERS puts another kind of them to these tests."""

import os
import pwd
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

import cache_servers as servers
import pytest
from cache_building import many_examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_schema import CacheCorrupt, CacheError, CacheStorageError
from cache_schema.storage.checksum import Bytes
from cache_schema.storage.files import FileDigest, digest, is_aside
from cache_schema.storage.folder import Folder
from cache_schema.storage.http import HttpPlace
from cache_schema.storage.local import LocalFolder, local_folder
from cache_schema.storage.places import folder_at, inside
from cache_schema.storage.remote import RemoteFolder
from cache_schema.storage.sftp import _connection, _open_session


def _on_s3(place: Path) -> Folder:
    servers.use_s3()
    return folder_at(f"s3://team/{place.as_posix().strip('/')}/{next(_serial)}")


def _over_ssh(place: Path) -> Folder:
    url, home = servers.ssh_host()
    os.environ["HOME"] = str(home)
    return folder_at(f"{url}{place}/folder")


def _on_the_hub(place: Path) -> Folder:
    os.environ.update(servers.hub_environment())
    return folder_at(f"hf://datasets/team/folders/{next(_serial)}")


class _Served(RemoteFolder):
    """A folder that is read from a web server; what is written is put where the server finds it."""

    writable = True

    def __init__(self, url: str, path: Path) -> None:
        super().__init__(url, HttpPlace(url))
        self.files = LocalFolder(path)  # type: ignore[assignment]

    def write(self, name: str, data: Bytes) -> FileDigest:
        path = self.files.path / name  # type: ignore[attr-defined]
        before = path.stat().st_mtime if path.exists() else 0
        written = self.files.write(name, data)  # type: ignore[attr-defined]
        # Web servers tell files of one size apart by whole seconds.
        os.utime(path, (before + 2, before + 2))
        return written

    def write_new(self, name: str, data: Bytes) -> bool:
        return self.files.write_new(name, data)  # type: ignore[attr-defined]

    def delete(self, name: str) -> None:
        self.files.delete(name)  # type: ignore[attr-defined]

    def walk(self) -> Iterator[str]:
        yield from sorted(self.place.list_files())


def _on_the_web(place: Path) -> Folder:
    url, files = servers.nginx()
    path = place.as_posix().strip("/") + f"/{next(_serial)}"
    return _Served(f"{url}/{path}", files / path)


_serial = count()
# From an empty directory of the test to a folder, empty and writable, whose files are there or where else it likes.
FOLDERS: dict[str, Callable[[Path], Folder]] = {
    "local": lambda place: LocalFolder(place / "folder"),
    "file url": lambda place: folder_at(f"file://{place}/folder"),
    "s3": _on_s3,
    "sftp": _over_ssh,
    "http": _on_the_web,
    "hub": _on_the_hub,
}
# Of the thousands of requests that a test may make, those to a server are a sample.
_FEWER = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    for name in ("HOME", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_DISABLE_XET"):
        monkeypatch.setenv(name, os.environ.get(name, "/"))  # given back after the test
    return FOLDERS[request.param](tmp_path)


def test_a_folder_in_which_nothing_was_written_is_empty(folder: Folder) -> None:
    assert folder.writable
    assert folder.names() == folder.names("journal") == list(folder.walk()) == []
    assert not folder.exists("a")
    assert folder.size("a") is None
    folder.delete("journal/a")


def test_what_was_written_is_there_with_its_size_and_its_checksum(folder: Folder) -> None:
    assert folder.write("journal/features-00001.json", b"contents") == digest(b"contents")
    assert folder.write("empty", b"") == digest(b"")
    assert folder.exists("journal/features-00001.json")
    assert folder.exists("journal")
    assert [folder.size(name) for name in ("journal/features-00001.json", "empty", "journal")] == [8, 0, None]
    assert folder.digest("journal/features-00001.json") == digest(b"contents")
    assert not folder.is_link("journal/features-00001.json")


def test_writing_again_replaces_a_file_and_writing_a_new_one_does_not(folder: Folder) -> None:
    assert folder.write_new("a", b"first")
    assert not folder.write_new("a", b"second")
    assert folder.read_bounded("a", 10) == b"first"
    folder.write("a", b"third, longer")
    assert folder.read_bounded("a", 13) == b"third, longer"


def test_of_many_who_write_a_new_file_one_does(folder: Folder) -> None:
    won: list[bytes] = []

    def write(data: bytes) -> None:
        if folder.write_new("a", data):
            won.append(data)

    writers = [threading.Thread(target=write, args=(bytes([i]) * 1000,)) for i in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [folder.read_bounded("a", 1000)] == won


def test_a_deleted_file_is_gone_and_the_others_stay(folder: Folder) -> None:
    folder.write("x/a", b"a")
    folder.write("x/b", b"b")
    folder.delete("x/a")
    assert not folder.exists("x/a")
    assert folder.read_bounded("x/b", 1) == b"b"
    folder.delete("x/a")


def test_names_are_those_of_one_level_and_a_walk_finds_all_in_order(folder: Folder) -> None:
    for name in ("b/c/d", "b/a", "a", "b.txt"):
        folder.write(name, b"")
    assert sorted(folder.names()) == ["a", "b", "b.txt"]
    assert sorted(folder.names("b")) == ["a", "c"]
    assert list(folder.walk()) == ["a", "b.txt", "b/a", "b/c/d"]


def test_no_more_than_allowed_is_read_whole(folder: Folder) -> None:
    folder.write("a", b"12345")
    assert folder.read_bounded("a", 5) == b"12345"
    with pytest.raises(CacheCorrupt, match="larger than the 4 bytes"):
        folder.read_bounded("a", 4)
    with pytest.raises(FileNotFoundError):
        folder.read_bounded("b", 4)


def test_a_file_that_is_not_there_cannot_be_opened(folder: Folder) -> None:
    folder.write("x/a", b"a")
    with pytest.raises(CacheCorrupt, match="missing"):
        folder.open("b")
    with pytest.raises(CacheCorrupt):
        folder.open("x")
    with pytest.raises(CacheCorrupt):
        folder.read_ranges("b", [(0, 1)])


def test_messages_say_where_a_file_is(folder: Folder) -> None:
    folder.write("x/a", b"a")
    assert folder.where("x/a").startswith(str(folder))
    assert folder.where("x/a").endswith("x/a")
    assert folder.open("x/a").path == folder.where("x/a")
    with pytest.raises(CacheCorrupt, match="x/b is missing"):
        folder.open("x/b")


def test_a_file_that_was_replaced_is_told_from_the_one_before(folder: Folder) -> None:
    folder.write("a", b"first")
    before = folder.open("a")
    folder.write("a", b"other")
    assert folder.open("a").signature != before.signature
    assert folder.open("a").signature == folder.open("a").signature


_CONTENTS = st.binary(max_size=300)
_RANGES = st.lists(st.tuples(st.integers(-2, 310), st.integers(-2, 310)), max_size=8)


def test_a_remote_file_that_was_replaced_while_it_was_open_is_refused_and_named(folder: Folder) -> None:
    folder.write("a", b"first")
    file = folder.open("a")
    folder.write("a", b"other")
    if isinstance(folder, RemoteFolder):
        with pytest.raises(CacheCorrupt, match="a was changed while it was read"):
            file.read(0, 5)
    else:
        assert file.read(0, 5) == b"first"


@pytest.mark.parametrize("kind", [kind for kind in FOLDERS if kind in ("local", "file url")])
@many_examples
@given(data=_CONTENTS, ranges=_RANGES)
def test_ranges_are_slices_of_the_file_and_others_are_refused(
    kind: str, data: bytes, ranges: list[tuple[int, int]]
) -> None:
    _check_ranges(kind, data, ranges)


@pytest.mark.parametrize("kind", [kind for kind in FOLDERS if kind not in ("local", "file url")])
@_FEWER
@given(data=_CONTENTS, ranges=_RANGES)
def test_ranges_of_a_remote_file_are_its_slices_and_others_are_refused(
    kind: str, data: bytes, ranges: list[tuple[int, int]]
) -> None:
    with mock.patch.dict(os.environ):
        _check_ranges(kind, data, ranges)


def _check_ranges(kind: str, data: bytes, ranges: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = FOLDERS[kind](Path(place))
        folder.write("a", data)
        file = folder.open("a")
        assert file.size == len(data)
        inside = [(offset, size) for offset, size in ranges if offset >= 0 <= size and offset + size <= len(data)]
        expected = [data[offset : offset + size] for offset, size in inside]
        assert folder.read_ranges("a", inside) == file.read_ranges(inside) == expected
        for (offset, size), part in zip(inside, expected, strict=True):
            buffer = bytearray(size)
            file.read_into(memoryview(buffer), offset)
            assert buffer == part == file.read(offset, size)
        if len(inside) < len(ranges):
            with pytest.raises(CacheCorrupt, match="truncated"):
                folder.read_ranges("a", ranges)
        with pytest.raises(CacheCorrupt, match="truncated"):
            file.read_into(memoryview(bytearray(1)), len(data))


def test_one_open_file_is_read_by_many_threads(folder: Folder) -> None:
    folder.write("a", bytes(range(256)) * 64)
    file = folder.open("a")
    wrong: list[int] = []
    step = 97 if isinstance(folder, LocalFolder) else 1500

    def read(start: int) -> None:
        for offset in range(start, file.size - 256, step):
            if file.read(offset, 3) != bytes((offset + i) % 256 for i in range(3)):
                wrong.append(offset)

    readers = [threading.Thread(target=read, args=(start,)) for start in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert wrong == []


def test_a_local_folder_names_links_and_does_not_follow_them(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a").write_bytes(b"a")
    folder = LocalFolder(tmp_path / "folder")
    folder.create()
    (folder.path / "folder").symlink_to(tmp_path / "elsewhere")
    (folder.path / "file").symlink_to(tmp_path / "elsewhere/a")
    assert list(folder.walk()) == ["file", "folder"]
    assert folder.is_link("file")
    assert folder.is_link("folder")
    with pytest.raises(CacheCorrupt, match="is a link"):
        folder.refuse_links()


def test_a_file_that_grows_in_a_local_folder_is_not_there_before_it_is_published(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path)
    with folder.aside("x/a") as aside:
        aside.write(b"first")
        aside.write(b"second")
        aside.finish()
        assert not folder.exists("x/a")
        assert [is_aside(name) for name in folder.walk()] == [True]
        aside.publish()
    assert list(folder.walk()) == ["x/a"]
    assert folder.read_bounded("x/a", 20) == b"firstsecond"


def test_a_local_folder_is_found_by_another_process_wherever_that_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(LocalFolder("folder")) == "folder"
    assert LocalFolder("folder").location == os.fspath(tmp_path / "folder")


def test_a_path_or_a_file_url_is_a_local_folder_and_another_url_is_none(tmp_path: Path) -> None:
    assert local_folder(tmp_path).path == local_folder(f"file://{tmp_path}").path == tmp_path
    with pytest.raises(CacheError, match="not a local directory"):
        local_folder("https://example.org/cache")


def test_urls_are_read_as_other_programs_read_them(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    for url in (f"file://localhost{tmp_path}/a%20b", f"FILE://{tmp_path}/a b"):
        assert folder_at(url).location == str(tmp_path / "a b")
    assert folder_at("S3://team/x").location == "s3://team/x"
    assert folder_at(inside("hf://datasets/team/a", "50%25")).place._root == "50%25"  # type: ignore[attr-defined]
    assert inside(tmp_path, "50%25") == f"{tmp_path}/50%25"


def test_a_host_is_reached_as_the_ssh_config_says_by_way_of_others_and_from_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, home = servers.ssh_host()
    shutil.copytree(home / ".ssh", tmp_path / ".ssh")
    gate = urlsplit(url)
    (tmp_path / ".ssh/config").write_text(
        f"Host GPUbox\n ProxyJump Gate\nHost *\n HostName 127.0.0.1\n Port {gate.port}\n User {gate.username}\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    theirs = {path.name for path in Path(pwd.getpwuid(os.getuid()).pw_dir).iterdir()}
    for place in ("~", "~/", "~/."):
        assert set(folder_at(f"sftp://GPUbox/{place}").names()) == theirs
    connection = _connection(("GPUbox", None, None), os.getpid())
    assert len(connection._clients) == 2
    with pytest.raises(CacheStorageError, match="the host answers '"):
        folder_at(f"sftp://GPUbox{tmp_path}").write("n" * 255, b"")
    assert connection.is_alive()
    connection.drop()


def test_a_session_that_a_host_does_not_open_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_CACHE_TIMEOUT", "0.1")
    closed = threading.Event()
    silent = mock.Mock(close=closed.set, open_sftp=lambda: "closed" if closed.wait(30) else "open")
    assert _open_session(silent) == "closed"
