"""Moving the pieces of a cache: several at once, every file checked against our own checksums at both ends."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from cache_schema.errors import CacheCorrupt
from cache_schema.format.journal import FileRecord
from cache_schema.sharing.signing import Hashed
from cache_schema.storage.checksum import Bytes
from cache_schema.storage.files import FileDigest
from cache_schema.storage.folder import Folder
from cache_schema.storage.local import LocalFolder
from cache_schema.storage.remote import CommittingPlace, RemoteFolder

T = TypeVar("T")

AT_ONCE = 6  # pieces
Advance = Callable[[int], None]
_COPY_BLOCK = 8 << 20


def in_parallel(work: Callable[[T], None], items: Sequence[T]) -> None:
    """Do `work(item)` for every item, several at once; at the first failure what has not begun is left."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="transfer") as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            for future in futures:
                future.cancel()


def sizes_of(folder: Folder) -> dict[str, int]:
    """Return the names and sizes of all files of a folder, of a remote one by one listing."""
    if isinstance(folder, RemoteFolder):
        return folder.files()
    return {name: size for name in folder.walk() if (size := folder.size(name)) is not None}


def committing_place(folder: Folder) -> CommittingPlace | None:
    """Return the place of a folder where every change is a commit; None of any other."""
    return folder.committing if isinstance(folder, RemoteFolder) else None


def delete_all(folder: Folder, names: Sequence[str]) -> None:
    """Remove files in this order, where every change is a commit as many at once as one may remove."""
    place = committing_place(folder)
    if place is None:
        for name in names:
            folder.delete(name)
        return
    assert isinstance(folder, RemoteFolder)
    for start in range(0, len(names), place.files_per_commit):
        folder.commit({}, remove=names[start : start + place.files_per_commit])


def matches(found: FileDigest, expected: FileRecord) -> bool:
    """Say whether a file is what a record says."""
    return (found.bytes, found.crc32c) == (expected.bytes, expected.crc32c)


def send(source: LocalFolder, target: Folder, name: str, expected: FileRecord) -> None:
    """Copy a file to a folder and read it back; raises CacheCorrupt where either end is not what the record says."""
    if not matches(source.digest(name), expected):
        raise CacheCorrupt(
            f"{source.where(name)} does not match its checksum", remedy="verify lists all damage",
            cache=str(source), copied=True,
        )  # fmt: skip
    for _ in range(2):
        if isinstance(target, LocalFolder):
            _copy(source, target, name)
        else:
            assert isinstance(target, RemoteFolder)
            target.upload(name, source.path / name)
        # What a place says that it has stored is not taken for what it has stored.
        if matches(target.digest(name), expected):
            return
    raise CacheCorrupt(f"{target.where(name)} is not what was written there, twice; do not trust that place")


def receive(source: Folder, target: LocalFolder, name: str, expected: FileRecord, sha256: str | None = None) -> None:
    """Copy a file from a folder, so that it is here whole and right or not at all; raises CacheCorrupt.

    `sha256` is what was signed, where that is asked for.
    """
    found = None
    for _ in range(2):
        with target.aside(name) as aside:
            blocks = blocks_of(source, name, expected.bytes)
            hashed = Hashed(blocks) if sha256 else None
            for block in hashed or blocks:
                aside.write(block)
            found = aside.finish()
            if hashed is not None and hashed.hexdigest() != sha256:
                continue
            if matches(found, expected):
                aside.publish()
                return
    assert found is not None
    wrong = "truncated" if found.bytes < expected.bytes else "not what its checksum says"
    raise CacheCorrupt(
        f"{source.where(name)} is {wrong}, twice; have the cache removed there (dit-cache rm) and pushed again"
    )


def blocks_of(folder: Folder, name: str, limit: int) -> Iterator[Bytes]:
    """Yield the contents of a file of at most `limit` bytes; raises CacheCorrupt for a larger or missing one."""
    file = folder.open(name)
    if file.size > limit:
        raise CacheCorrupt(f"{file.path} has {file.size} bytes instead of {limit}")
    if isinstance(folder, RemoteFolder):
        stat = folder.stat(name)
        if stat is None or stat.size > limit:
            raise CacheCorrupt(f"{file.path} was changed while it was read")
        yield from folder.blocks(name, stat)
        return
    for start in range(0, file.size, _COPY_BLOCK):
        yield file.read(start, min(_COPY_BLOCK, file.size - start))


def _copy(source: LocalFolder, target: LocalFolder, name: str) -> None:
    with target.aside(name) as aside:
        for block in blocks_of(source, name, Path(source.path, name).stat().st_size):
            aside.write(block)
        aside.finish()
        aside.publish()
