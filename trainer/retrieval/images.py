"""Where images to embed and to show come from: a folder of files, or a cache's own images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from cache_schema.format.samples import SPLITS
from trainer.data.files import UnreadableImageError, class_of, decode_image, find_images
from trainer.data.images import ImageStore
from trainer.data.splits import select_split
from trainer.errors import TrainError
from trainer.retrieval.model import Model

if TYPE_CHECKING:
    from cache_schema import Cache

ALL = "all"


@dataclass(frozen=True, slots=True)
class Entry:
    """An image by its name, with what tells whether it has changed: bytes and time of its file (0 in a cache)."""

    name: str
    class_name: str
    size: int
    modified: int  # nanoseconds since 1970


class Images(Protocol):
    """A set of images."""

    def entries(self) -> list[Entry]:
        """All of them, in order; raises TrainError where there is none."""

    def load(self, entries: Sequence[Entry], model: Model) -> list[np.ndarray | UnreadableImageError]:
        """Images as a student wants them, (S, S, 3) uint8, or why one cannot be read."""

    def picture(self, name: str) -> Image.Image:
        """An image to show; raises TrainError where it cannot be read."""

    def describe(self, base: Path) -> dict[str, Any]:
        """Where they are, for a file in the folder `base`: local places relative to it."""


class FolderImages:
    """The image files below a folder; a class is a folder (`class_of`)."""

    def __init__(self, root: Path, max_megapixels: float, threads: int | None = None):
        self.root, self.max_megapixels = root, max_megapixels
        self._threads = threads or os.cpu_count() or 1

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, "decode")

    def entries(self) -> list[Entry]:
        found = []
        for name in find_images(self.root):
            try:
                about = (self.root / name).stat()
            except OSError:  # a link to nothing, or deleted meanwhile; `load` says so
                found.append(Entry(name, class_of(name), -1, 0))
            else:
                found.append(Entry(name, class_of(name), about.st_size, about.st_mtime_ns))
        return found

    def load(self, entries: Sequence[Entry], model: Model) -> list[np.ndarray | UnreadableImageError]:
        def read(entry: Entry) -> np.ndarray | UnreadableImageError:
            try:
                return model.prepare(decode_image((self.root / entry.name).read_bytes(), self.max_megapixels))
            except UnreadableImageError as error:
                return error
            except OSError as error:
                return UnreadableImageError(f"cannot be read: {error.strerror or error}")

        return list(self._pool.map(read, entries))

    def picture(self, name: str) -> Image.Image:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise TrainError(f"{name!r} is no name of an image in a folder")
        try:
            return decode_image((self.root / name).read_bytes(), self.max_megapixels)
        except UnreadableImageError as error:
            raise TrainError(f"{self.root / name}: {error}") from None
        except OSError as error:
            raise TrainError(f"{self.root / name} cannot be read: {error.strerror or error}") from None

    def describe(self, base: Path) -> dict[str, Any]:
        return {"kind": "folder", "place": relative_place(self.root, base)}


class CacheImages:
    """The images of a cache, as its students see them; named by the ids of their samples."""

    def __init__(self, place: str, cache: Cache, split: str = ALL):
        if split not in (*SPLITS, ALL):
            raise TrainError(f"--split {split}: name one of {', '.join(SPLITS)}, {ALL}")
        if cache.manifest.images is None:
            raise TrainError(f"cache {cache.manifest.label} holds no images")
        self.place, self.cache, self.split = place, cache, split
        self._store: ImageStore | None = None

    @cached_property
    def _rows(self) -> dict[str, int]:
        splits = SPLITS if self.split == ALL else (self.split,)
        rows = np.sort(np.concatenate([select_split(self.cache, split, need_features=False).rows for split in splits]))
        return dict(zip(self.cache.samples["id"].take(rows).to_pylist(), rows.tolist(), strict=True))

    def entries(self) -> list[Entry]:
        names = self.cache.samples["class_name"].take(list(self._rows.values())).to_pylist()
        if not names:
            raise TrainError(f"cache {self.cache.manifest.label} has no images of split {self.split}")
        return [Entry(name, class_name, 0, 0) for name, class_name in zip(self._rows, names, strict=True)]

    def load(self, entries: Sequence[Entry], model: Model) -> list[np.ndarray | UnreadableImageError]:
        if self._store is None:
            self._store = ImageStore(self.cache, model.student.input_size, [], 0, model.student.fit)
        return list(self._store.pictures([self._rows[entry.name] for entry in entries]))

    def picture(self, name: str) -> Image.Image:
        row = self._rows.get(name)
        if row is None:
            raise TrainError(f"cache {self.cache.manifest.label} has no image {name!r}")
        return decode_image(self.cache.images([row])[0])

    def describe(self, base: Path) -> dict[str, Any]:
        place = self.place if "://" in self.place else relative_place(Path(self.place), base)
        return {"kind": "cache", "place": place, "cache_id": self.cache.manifest.cache_id, "split": self.split}


def is_cache(source: str) -> bool:
    """Whether a source of images is a cache rather than a folder of image files."""
    return "://" in source or (Path(source) / "manifest.json").is_file()


def images_of(about: dict[str, Any], base: Path, moved_to: str | None, max_megapixels: float) -> Images:
    """The images that a file in the folder `base` was made of, by what `describe` said, to be shown.

    `moved_to` is where they are now, if not where they were. Raises TrainError where they are not there.
    """
    place = moved_to or about["place"]
    where = place if "://" in place or moved_to else os.path.normpath(base / place)
    if about["kind"] == "folder":
        if not Path(where).is_dir():
            raise TrainError(f"the images are not in {where} any more; say where they are with --images")
        return FolderImages(Path(where), max_megapixels)
    from cache_schema import CacheError, open_cache

    try:
        cache = open_cache(where, allow_partial=True)
    except CacheError as error:
        raise TrainError(
            f"the images are in a cache that cannot be opened ({error}); --images says where it is"
        ) from None
    if cache.manifest.cache_id != about["cache_id"]:
        raise TrainError(f"the images are of cache {about['cache_id'][:8]}, not of {cache.manifest.label} in {where}")
    return CacheImages(where, cache, about["split"])


def relative_place(path: Path, base: Path) -> str:
    """A place as a file in the folder `base` names it, so that both can be moved together."""
    return Path(os.path.relpath(path.resolve(), base.resolve())).as_posix()
