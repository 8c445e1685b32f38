"""Files kept open for reading, with what is known about them: bounded numbers of files and of bytes of memory."""

import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from cache_schema.encoding.number_formats import Array
from cache_schema.storage.folder import Folder, ReadableFile, Signature
from cache_schema.stores.base import PieceChecksums
from cache_schema.stores.shard import ShardIndex

# An eighth of what this process may have open, at most 4096: opening a shard again costs more than reading a small
# sample. Features and images count apart, and a file lives a little longer where a batch still reads from it.
_FILE_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MAX_OPEN_FILES = 4096 if _FILE_LIMIT == resource.RLIM_INFINITY else min(4096, max(32, _FILE_LIMIT // 8))
MAX_INDEX_BYTES = 32 << 20
MAX_CHECKSUM_BYTES = 32 << 20

K = TypeVar("K")
V = TypeVar("V")


class ChunkPlaces:
    """Where the chunks of a shard are, for quick look-ups by chunk number (C order over sample, view, timestep).

    Shards as they are written here have every row at the same distance from the one before: three numbers say it all.
    For others the tables of the index are kept.
    """

    __slots__ = ("chunk", "lengths", "nbytes", "offsets", "row", "rows", "start")

    def __init__(self, index: ShardIndex, chunk_bytes: int | None) -> None:
        """`chunk_bytes` is the size of every chunk, None where they are compressed."""
        self.start = self.row = self.rows = self.nbytes = 0
        self.chunk = chunk_bytes or 0
        self.offsets: memoryview | None = None
        self.lengths: memoryview | None = None
        if chunk_bytes is None or not self._is_even(index, chunk_bytes):
            self.offsets, self.lengths = _values(index.offsets), _values(index.lengths)
            self.nbytes = self.offsets.nbytes + self.lengths.nbytes

    def _is_even(self, index: ShardIndex, chunk_bytes: int) -> bool:
        per_row = index.offsets[0].size
        offsets = index.offsets.reshape(-1)
        present = int((offsets >= 0).sum())
        rows = present // per_row
        if rows * per_row != present:
            return False
        # Rows that are missing at the end, as in the last shard, do no harm.
        if (offsets[:present] < 0).any():
            return False
        table = offsets[:present].reshape(rows, per_row)
        start = int(table[0, 0]) if rows else 0
        row = int(table[1, 0]) - start if rows > 1 else per_row * chunk_bytes
        if not np.array_equal(table, start + row * np.arange(rows)[:, None] + chunk_bytes * np.arange(per_row)):
            return False
        self.start, self.row, self.rows = start, row, rows
        return True


def _values(table: Array) -> memoryview:
    # Single values come out of a memoryview in a third of the time that NumPy takes.
    return np.ascontiguousarray(table.reshape(-1), dtype=np.int64).data


@dataclass(frozen=True)
class OpenShard:
    """An open shard file of an array, where its chunks are and, if they are checked, the CRC-32C of its pieces.

    A piece is `piece` chunks: one, or those of a whole row in caches that schema version 1 wrote. `joint_checksums`, if
    there are any, are those of all timesteps of a row and view together, for chunks that are read at once.
    """

    file: ReadableFile
    places: ChunkPlaces
    checksums: memoryview | None
    piece: int
    joint_checksums: memoryview | None = None


class RecentlyUsed(Generic[K, V]):
    """The most recently used values: at most `max_items` of them, of at most `max_weight` together."""

    def __init__(self, max_items: int, max_weight: int) -> None:
        self._lock = threading.Lock()
        self._items: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._weight = 0
        self._max_items, self._max_weight = max_items, max_weight

    def __len__(self) -> int:
        return len(self._items)

    @property
    def weight(self) -> int:
        """What the values weigh together."""
        return self._weight

    def get(self, key: K) -> V | None:
        """Return a value and mark it as used."""
        with self._lock:
            item = self._items.get(key)
            if item is None:
                return None
            self._items.move_to_end(key)
            return item[0]

    def put(self, key: K, value: V, weight: int = 0) -> V:
        """Remember a value in place of the longest unused ones; returns it."""
        with self._lock:
            replaced = self._items.pop(key, None)
            self._items[key] = (value, weight)
            self._weight += weight - (replaced[1] if replaced else 0)
            while len(self._items) > 1 and (len(self._items) > self._max_items or self._weight > self._max_weight):
                self._weight -= self._items.popitem(last=False)[1][1]
        return value


class OpenShards:
    """The most recently used files, chunk indexes and checksums. Safe to use from several threads."""

    def __init__(
        self,
        folder: Folder,
        max_files: int = MAX_OPEN_FILES,
        max_index_bytes: int = MAX_INDEX_BYTES,
        max_checksum_bytes: int = MAX_CHECKSUM_BYTES,
    ) -> None:
        self._folder = folder
        self.shards: RecentlyUsed[tuple[str, int], OpenShard] = RecentlyUsed(max_files, max_index_bytes)
        self.files: RecentlyUsed[str, ReadableFile] = RecentlyUsed(max_files, 0)
        # Both outlive the files they are about: reading them again costs far more than opening a file.
        self._places: RecentlyUsed[tuple[str, str], tuple[Signature, ChunkPlaces]] = RecentlyUsed(
            1 << 20, max_index_bytes
        )
        self._checksums: RecentlyUsed[tuple[str, int], Checksums] = RecentlyUsed(1 << 20, max_checksum_bytes)

    def file(self, name: str) -> ReadableFile:
        """Return a file, open. It stays open while the caller keeps it, even when it is forgotten here."""
        return self.files.get(name) or self.files.put(name, self._folder.open(name))

    def places(self, file: ReadableFile, array: str, parse: Callable[[ReadableFile], ChunkPlaces]) -> ChunkPlaces:
        """Return where the chunks of an array in an open file are, parsed at most once while it is remembered."""
        known = self._places.get((file.path, array))
        if known is not None and known[0] == file.signature:
            return known[1]
        places = parse(file)
        # Even places that need no table take some memory to remember.
        self._places.put((file.path, array), (file.signature, places), places.nbytes + 512)
        return places

    def checksums(self, kind: str, shard: int, load: Callable[[], "Checksums"]) -> "Checksums":
        """Return all checksums of a shard, loaded at most once while they are remembered."""
        known = self._checksums.get((kind, shard))
        if known is None:
            known = load()
            self._checksums.put((kind, shard), known, 512 + sum(table.values.nbytes for table in known.values()))
        return known


# Of the arrays of a feature shard, by their names, or of the images of a tar, by its name.
Checksums = dict[str, PieceChecksums]
