"""A cache built into a place elsewhere: shards are written here, sent when they are committed, and then removed here.

What is at the place is the cache, and its journal is the one that counts: a build goes on from what is there, on any
machine. Only what is small, and the shard under way, is on this disk. Two builders never write the same piece: each
says at the place which part it does, and the calibration is that of whoever said first which it is.
"""

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from cache_schema.errors import CacheError, CacheMismatch, CacheNotFound
from cache_schema.format.journal import (
    JOURNAL_FOLDER,
    MAX_RECORD_BYTES,
    Record,
    is_committed,
    parse_record,
    record_name,
    render_record,
)
from cache_schema.format.manifest import Manifest
from cache_schema.format.manifest_file import MANIFEST_NAME, load_manifest
from cache_schema.sharing.transfer import in_parallel, receive, send
from cache_schema.storage.checksum import Bytes
from cache_schema.storage.files import FileDigest, digest
from cache_schema.storage.folder import Folder
from cache_schema.storage.local import LocalFolder, user_cache
from cache_schema.storage.places import folder_at
from cache_schema.storage.remote import RemoteFolder
from cache_schema.storage.retrying import patience

_MARK = "spool.json"  # says that a folder here is one of these, and whose
_BUILDER = re.compile(r"builder-(?P<index>\d+)-of-(?P<count>\d+)\.json")
_DECISION = "calibration.json"  # which calibration it will be, from before its files are there until the seal
_MOST = 1 << 20
_PAUSE = 1.0  # seconds between looks at what another builder does


class SpooledFolder(LocalFolder):
    """The folder of a cache at `remote` under construction, by way of `path` here."""

    def __init__(self, path: Path, remote: RemoteFolder, token: str) -> None:
        super().__init__(path)
        self.remote, self.token = remote, token
        self._here = LocalFolder(path)
        self._sizes: dict[str, int] = {}

    def __str__(self) -> str:
        return str(self.remote)

    @property
    def location(self) -> str:
        """The URL."""
        return self.remote.location

    def where(self, name: str) -> str:
        """Return the URL of a file."""
        return self.remote.where(name)

    def exists(self, name: str) -> bool:
        """Say whether there is a file of this name, here or there."""
        return super().exists(name) or self.remote.stat(name) is not None

    def size(self, name: str) -> int | None:
        """Return the size in bytes of a file, here or there."""
        found = super().size(name)
        if found is None and name not in self._sizes:
            self._sizes = self.remote.files()
        return self._sizes.get(name) if found is None else found

    def names(self, under: str = "") -> list[str]:
        """Return the names of what is there in a sub-folder, but for what only builders need."""
        found = self.remote.names(under)
        return [name for name in found if under or not (_BUILDER.fullmatch(name) or name == _DECISION)]

    def read_bounded(self, name: str, limit: int) -> bytes:
        """Return the whole of a small file; the manifest is always that of the place."""
        if name != MANIFEST_NAME and super().exists(name):
            return super().read_bounded(name, limit)
        data = self.remote.read_bounded(name, limit)
        if name != MANIFEST_NAME and not _is_of_a_shard(name):
            super().write(name, data)
        return data

    def write(self, name: str, data: Bytes) -> FileDigest:
        """Write a file here; a record of the journal commits its piece there, the manifest seals the cache there."""
        if name.startswith(f"{JOURNAL_FOLDER}/"):
            agreed = self._commit(parse_record(bytes(data), self.where(name)), name)
            return digest(data) if _is_of_a_shard(name) else super().write(name, agreed)
        if name == MANIFEST_NAME:
            self.remote.write(name, data)
            forget_builders(self.remote)
        return super().write(name, data)

    def write_new(self, name: str, data: Bytes) -> bool:
        """Write a whole file there, and here, unless there is one there."""
        written = self.remote.write_new(name, data)
        if written:
            super().write(name, data)
        return written

    def _commit(self, record: Record, name: str) -> bytes:
        """Bring the files of a piece there, read back, and then its record; returns the record that counts."""
        ours = render_record(record)
        if record.kind == "calibration" and (theirs := self._agreed(ours, name)) is not None:
            return theirs
        in_parallel(lambda file: send(self._here, self.remote, file, record.files[file]), list(record.files))
        self.remote.write(name, ours)
        if _is_of_a_shard(name):
            for file in record.files:
                self._here.delete(file)
        return ours

    def _agreed(self, ours: bytes, name: str) -> bytes | None:
        """Return the record of the calibration that another builder decided on, once it is there; None for ours."""
        decision, until = _render_decision(self.token, ours), time.monotonic() + patience(600.0)
        # One that was withdrawn, as its builder had ended, leaves it to whoever decides next.
        while not self.remote.write_new(_DECISION, decision) and _decision(self.remote)[1] != ours:
            if is_committed(self.remote, "calibration"):
                agreed = self.remote.read_bounded(name, MAX_RECORD_BYTES)
                for file, expected in parse_record(agreed, self.where(name)).files.items():
                    receive(self.remote, self._here, file, expected)
                return agreed
            if time.monotonic() > until:
                raise CacheError(
                    f"another builder of {self} has measured the calibration and not stored it; run that one again, "
                    "and this one then, or, if that was given up, take its place with --take-over"
                )
            time.sleep(_PAUSE)
        return None


def spooled_folder(url: str, path: Path, index: int = 0, count: int = 1, take_over: bool = False) -> SpooledFolder:
    """Return the folder in which part `index` of `count` of the cache at `url` is built, by way of `path` here.

    `take_over` takes the place of a builder of this part on another machine that was given up. Raises CacheMismatch
    where one is at work there, CacheError for a place or a folder that cannot be used.
    """
    folder, there = _spool(url, path, None)
    if there is not None and there.sealed:
        forget_builders(folder.remote)
    else:
        with folder.lock():  # else another process in this folder may be about to store what it decided on
            _withdraw(folder.remote, folder.token, *([None] if take_over else []))
        _announce(folder.remote, folder.token, index, count, take_over)
    return folder


def shared_folder(url: str, path: Path, token: str) -> SpooledFolder:
    """Return the folder in which a helper of the builder with this token works, by way of a `path` of its own.

    Raises CacheError as `spooled_folder`.
    """
    return _spool(url, path, token)[0]


@contextlib.contextmanager
def passing_folder(url: str) -> Iterator[SpooledFolder]:
    """Yield the folder of a cache being built at `url`, for what needs no builder: its spool does not stay."""
    with tempfile.TemporaryDirectory(prefix="spool-") as path:
        yield shared_folder(url, Path(path), uuid.uuid4().hex)


def default_spool(what: str) -> Path:
    """Return where on this machine is kept what is under way of a build, which `what` tells from every other."""
    return user_cache("builds") / hashlib.sha256(what.encode()).hexdigest()[:16]


def _spool(url: str, path: Path, token: str | None) -> tuple[SpooledFolder, Manifest | None]:
    """Return a spool, with what is here of the same build, and the manifest there. token: by default one of its own."""
    remote = folder_at(url)
    if not isinstance(remote, RemoteFolder) or not remote.writable or remote.committing is not None:
        raise CacheError(f"{url}: a cache is built into s3, gs, az or sftp, or into a folder; push it elsewhere after")
    mark = path / _MARK
    if not mark.exists() and path.exists() and any(path.iterdir()):
        raise CacheError(f"{path} is not empty and no spool of a build; name another folder with --spool")
    try:
        there = load_manifest(remote)
    except CacheNotFound:
        there = None
    known = _read(mark)
    same_place = known is not None and known.get("url") == remote.url
    if known is not None and not (same_place and _is_beginning_of(LocalFolder(path), remote, there)):
        shutil.rmtree(path)  # of another cache, or of one that is done, gone or begun anew
    # The builder is the same one as before it was stopped, whatever had come of it.
    token = token or (str(known["token"]) if known and same_place else uuid.uuid4().hex)
    LocalFolder(path).write(_MARK, json.dumps({"url": remote.url, "token": token}).encode())
    return SpooledFolder(path, remote, token), there


def _is_beginning_of(here: LocalFolder, remote: RemoteFolder, there: Manifest | None) -> bool:
    """Say whether what is here was begun as the unfinished cache there: with its arrays and its calibration."""
    beginning = (record_name("layout"), record_name("calibration"))
    sealed = there is not None and there.sealed
    return not sealed and all(_contents(here, name) == _contents(remote, name) for name in beginning)


def _contents(folder: Folder, name: str) -> bytes | None:
    try:
        return folder.read_bounded(name, MAX_RECORD_BYTES)
    except FileNotFoundError:
        return None


def forget_builders(remote: RemoteFolder) -> None:
    """Remove what builders said of themselves at a place whose cache is sealed."""
    for name in remote.names():
        if _BUILDER.fullmatch(name) or name == _DECISION:
            remote.delete(name)


def _announce(remote: RemoteFolder, token: str, index: int, count: int, take_over: bool) -> None:
    for found in filter(None, map(_BUILDER.fullmatch, remote.names())):
        if int(found["count"]) == count:
            continue
        if not take_over:
            raise CacheMismatch(
                f"{remote} is being built in {found['count']} parts, not {count}; give --shard-slice "
                f"I/{found['count']}, or, if that was given up, take its place with --take-over"
            )
        _withdraw(remote, _token(_contents(remote, found[0])))
        remote.delete(found[0])
    name, ours = f"builder-{index}-of-{count}.json", json.dumps({"token": token}).encode()
    if remote.write_new(name, ours) or (theirs := remote.read_bounded(name, _MOST)) == ours:
        return
    if not take_over:
        raise CacheMismatch(
            f"{remote} is being built on another machine; give each machine a part with --shard-slice, or, if that "
            "build was given up, take its place with --take-over"
        )
    _withdraw(remote, _token(theirs))
    remote.write(name, ours)


def _withdraw(remote: RemoteFolder, *tokens: str | None) -> None:
    """Take back a calibration that one of these builders decided on and, as it ended, did not store.

    None: one that did not say who it is.
    """
    by, record = _decision(remote)
    if record is not None and by in tokens and not is_committed(remote, "calibration"):
        remote.delete(_DECISION)


def _render_decision(token: str, record: bytes) -> bytes:
    return json.dumps({"token": token, "record": record.decode("ascii")}).encode()


def _decision(remote: RemoteFolder) -> tuple[str | None, bytes | None]:
    """Return whose the decision there is and the record that it is for; None for a builder that did not say."""
    data = _contents(remote, _DECISION)
    try:
        document = json.loads(data or b"")
        return str(document["token"]), document["record"].encode("ascii")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, data  # the record itself, as earlier releases wrote it


def _token(builder: bytes | None) -> str | None:
    try:
        return str(json.loads(builder or b"")["token"])
    except (ValueError, KeyError, TypeError):
        return None


def _read(mark: Path) -> dict | None:
    try:
        found = json.loads(mark.read_bytes()[:_MOST])
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    return found if isinstance(found, dict) and isinstance(found.get("token"), str) else {"token": uuid.uuid4().hex}


def _is_of_a_shard(name: str) -> bool:
    return name.startswith((f"{JOURNAL_FOLDER}/features-", f"{JOURNAL_FOLDER}/images-"))
