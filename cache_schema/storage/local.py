"""A folder on this machine, or on what is mounted here: the one in which a cache can be built."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from cache_schema.errors import CacheError
from cache_schema.storage import files
from cache_schema.storage.checksum import Bytes
from cache_schema.storage.files import AsideFile, FileDigest
from cache_schema.storage.open_file import OpenFile


def user_cache(name: str) -> Path:
    """Return the folder of the user's cache directory that we keep one kind of thing in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-distill" / name


class LocalFolder:
    """A directory, `path`; see `cache_schema.storage.folder.Folder`. What a builder needs besides begins at `lock`."""

    writable = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"LocalFolder({str(self.path)!r})"

    @property
    def location(self) -> str:
        """The absolute path."""
        return str(self.path.absolute())

    def where(self, name: str) -> str:
        """Return the path of a file."""
        return str(self.path / name)

    def open(self, name: str) -> OpenFile:
        """Open a file for reading; raises CacheCorrupt where it is missing, no plain file, or cannot be opened."""
        return OpenFile(str(self.path / name))

    def read_bounded(self, name: str, limit: int) -> bytes:
        """Return the whole of a file of at most `limit` bytes; raises OSError, CacheCorrupt."""
        return files.read_bounded(self.path / name, limit)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of every (offset, size) of a file; raises CacheCorrupt where it does not have them."""
        return self.open(name).read_ranges(ranges)

    def digest(self, name: str) -> FileDigest:
        """Return size and checksum of a whole file; raises OSError where it cannot be read."""
        return files.digest_file(self.path / name)

    def exists(self, name: str) -> bool:
        """Say whether there is anything of this name."""
        return (self.path / name).exists()

    def size(self, name: str) -> int | None:
        """Return the size in bytes of a plain file, None where there is none of this name."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def is_link(self, name: str) -> bool:
        """Say whether this is a symbolic link."""
        return (self.path / name).is_symlink()

    def names(self, under: str = "") -> list[str]:
        """Return the names of what is in a sub-directory, none where there is none; raises OSError."""
        try:
            return [path.name for path in (self.path / under).iterdir()]
        except FileNotFoundError:
            return []

    def walk(self) -> Iterator[str]:
        """Yield the names of all files at any depth, and of links to directories, sorted."""
        found = []
        for directory, folders, names in os.walk(self.path):
            links = [name for name in folders if Path(directory, name).is_symlink()]
            found += [Path(directory, name).relative_to(self.path).as_posix() for name in names + links]
        yield from sorted(found)

    def write(self, name: str, data: Bytes) -> FileDigest:
        """Write a whole file so that it survives a power cut; raises CacheStorageError."""
        return files.write_file(self.path / name, data)

    def write_new(self, name: str, data: Bytes) -> bool:
        """Write a whole file unless there is one of this name; say whether it was written."""
        return files.write_new_file(self.path / name, data)

    def delete(self, name: str) -> None:
        """Remove a file, for good even if the power fails next; raises CacheStorageError."""
        path = self.path / name
        with files.storage_errors(path):
            if path.parent.is_dir():
                path.unlink(missing_ok=True)
                files.flush_directory(path.parent)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold the directory's lock against other builders; see `cache_schema.storage.files.directory_lock`."""
        return files.directory_lock(self.path)

    def aside(self, name: str) -> AsideFile:
        """Return a file that grows beside its final place, in which `publish` puts it."""
        return AsideFile(self.path / name)

    def create(self) -> None:
        """Create the directory itself, if it is not there; raises CacheStorageError."""
        with files.storage_errors(self.path):
            files.make_directory(self.path)

    def sweep(self) -> list[str]:
        """Remove what dead writers left aside; return the names."""
        return [path.relative_to(self.path).as_posix() for path in files.sweep_aside_files(self.path)]

    def refuse_links(self) -> None:
        """Raise CacheCorrupt if there is a link to a directory: writing into it would change what it names."""
        files.refuse_linked_folders(self.path)


def local_folder(path: str | os.PathLike[str]) -> LocalFolder:
    """Return the local folder that a path or a file:// URL names; other URLs raise CacheError."""
    text = os.fspath(path)
    scheme, separator, rest = text.partition("://")
    if separator and scheme.lower() == "file":
        text = unquote(rest.removeprefix("localhost") if rest.startswith("localhost/") else rest)
    elif separator:
        raise CacheError(f"{text} is not a local directory; copy the cache here and open the copy")
    return LocalFolder(text)
