"""Where the files of a cache are: the few things that are asked of a folder, be it on this machine or elsewhere."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from cache_schema.storage.checksum import Bytes
from cache_schema.storage.files import FileDigest

# Tells a file from another one of the same name: for a local file its inode, its size and the time of its last change.
Signature = tuple[int | str, ...]


class ReadableFile(Protocol):
    """A file open for reading at any place, by any number of threads. `path` says in messages where it is."""

    path: str
    size: int
    signature: Signature

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`; raises CacheCorrupt where the file does not have them."""

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of every (offset, size), in their order; raises CacheCorrupt as `read` does."""

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset`; raises CacheCorrupt where the file does not have them."""


class Folder(Protocol):
    """Files by their names: relative, parts joined by `/`. `str` of a folder says where it is.

    Whether files can be written is `writable`; where it is False, `write`, `write_new` and `delete` raise
    CacheStorageError. Every writable folder can be copied to, a file at a time, each wholly there or not at all. What
    building a cache needs besides (locks between builders, files that grow, files left by builders that died) only a
    `cache_schema.storage.local.LocalFolder` has.
    """

    @property
    def writable(self) -> bool:
        """Whether files can be written here at all; a permission may still be lacking."""

    @property
    def location(self) -> str:
        """The path or URL by which another process finds this folder."""

    def where(self, name: str) -> str:
        """Return what a message says of where a file is."""

    def open(self, name: str) -> ReadableFile:
        """Open a file for reading; raises CacheCorrupt where it is missing, no plain file, or cannot be opened."""

    def read_bounded(self, name: str, limit: int) -> bytes:
        """Return the whole of a file of at most `limit` bytes.

        Raises FileNotFoundError where there is none, CacheCorrupt for a larger one and for what is no plain file, and
        OSError where it cannot be read.
        """

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of every (offset, size) of a file; raises CacheCorrupt where it does not have them."""

    def digest(self, name: str) -> FileDigest:
        """Return size and checksum of a whole file; raises OSError where it cannot be read."""

    def exists(self, name: str) -> bool:
        """Say whether there is anything of this name."""

    def size(self, name: str) -> int | None:
        """Return the size in bytes of a plain file, None where there is none of this name."""

    def is_link(self, name: str) -> bool:
        """Say whether the contents of this name are really somewhere else, so that they may change unnoticed."""

    def names(self, under: str = "") -> list[str]:
        """Return the names, without those before them, of what is in a sub-folder; none where there is none.

        Raises OSError where it cannot be listed.
        """

    def walk(self) -> Iterator[str]:
        """Yield the names of all files at any depth, and of links to folders, which are not followed; sorted."""

    def write(self, name: str, data: Bytes) -> FileDigest:
        """Write a whole file, in place of the one of this name, so that a reader sees the old or the new one."""

    def write_new(self, name: str, data: Bytes) -> bool:
        """Write a whole file unless there is one of this name; say whether it was written."""

    def delete(self, name: str) -> None:
        """Remove a file for good; nothing happens where there is none."""
