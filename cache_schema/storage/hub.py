"""Data sets of the Hugging Face Hub through its own fsspec file system, read only.

Credentials are the Hub's own: `hf auth login`, or HF_TOKEN.
"""

import functools
import os
from pathlib import Path
from typing import Any

from cache_schema.errors import CacheStorageError, CacheUnreachable
from cache_schema.storage.checksum import Bytes
from cache_schema.storage.extras import required
from cache_schema.storage.remote import ChangedWhileRead, Stat
from cache_schema.storage.retrying import Transient

SCHEMES = ("hf",)


class FsspecPlace:
    """A folder of an fsspec file system; see `cache_schema.storage.remote.Place`."""

    writable = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._scheme, _, self._root = self.url.partition("://")

    def stat(self, name: str) -> Stat | None:
        """Return size and what the file system has for a version of a file."""
        try:
            info = self._ask("info", self._path(name))
        except FileNotFoundError:
            return None
        return Stat(info["size"], _tag(info)) if info["type"] == "file" else None

    def get(self, name: str, start: int, stop: int, tag: str) -> bytes:
        """Return a range of a file; raises FileNotFoundError, ChangedWhileRead."""
        if _tag(self._ask("info", self._path(name))) != tag:
            raise ChangedWhileRead
        return self._ask("cat_file", self._path(name), start=start, end=stop)

    def list_folder(self, under: str) -> list[str]:
        """Return the names in a sub-folder."""
        path = self._path(under) if under else self._root
        try:
            return [_relative(found, path) for found in self._ask("ls", path, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def list_files(self) -> dict[str, int]:
        """Return the names and sizes of all files."""
        found = self._ask("find", self._root, detail=True)
        return {_relative(path, self._root): info["size"] for path, info in found.items()}

    def put(self, name: str, data: Bytes | Path, new: bool) -> bool:
        """Refuse: each file would be a commit of its own."""
        raise CacheStorageError(f"cannot write {self.url}/{name}: `hf upload-large-folder` brings a cache to the Hub")

    def delete(self, name: str) -> None:
        """Refuse, as `put` does."""
        raise CacheStorageError(f"cannot remove {self.url}/{name}: it is removed on the Hub's own pages")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        system = _file_system(self._scheme, self.url, os.getpid())
        try:
            return getattr(system, method)(*arguments, **options)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except PermissionError as error:
            raise CacheUnreachable(f"{self.url} refuses access; `hf auth login` stores credentials") from error
        except OSError as error:
            raise Transient(type(error).__name__) from error


@functools.lru_cache(maxsize=4)
def _file_system(scheme: str, url: str, process: int) -> Any:
    fsspec = required("fsspec", url)
    try:
        # Listings are remembered by default, so that what changed would not be seen.
        return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
    except (ImportError, ValueError):
        raise CacheStorageError(f"{url} needs huggingface-hub; pip install 'dit-distill[remote]'") from None


def _relative(path: str, root: str) -> str:
    return path.lstrip("/").removeprefix(root.lstrip("/")).strip("/")


def _tag(info: dict[str, Any]) -> str:
    return str(info.get("blob_id") or info.get("ETag") or info.get("mtime") or info.get("created") or "")
