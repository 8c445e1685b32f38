"""Shards read row after row, all of a row checked against the journal: for what goes through a whole cache.

Batches, whose chunks are of many shards and of which a part may be wanted, are read by `cache_schema.reading.chunks`.
"""

import numpy as np

from cache_schema.encoding.number_formats import Array
from cache_schema.errors import CacheCorrupt
from cache_schema.format.journal import Record, record_name
from cache_schema.format.layout import ArrayLayout
from cache_schema.storage.checksum import crc32c
from cache_schema.storage.folder import ReadableFile
from cache_schema.stores.base import FeatureStore
from cache_schema.stores.compression import decompress
from cache_schema.stores.images import recorded_places


class ArrayRows:
    """The rows of one array in an open shard file; raises CacheCorrupt where they cannot be told apart."""

    def __init__(self, store: FeatureStore, file: ReadableFile, record: Record, array: ArrayLayout) -> None:
        self.file = file
        self._array = array
        self._index = store.read_index(file, array, record.shard)
        self._checksums, self._piece = store.piece_checksums(record, array)

    def chunks(self, local: int) -> list[bytes] | None:
        """Return the chunks of a row, counted from the first of the shard, as they lie in the file.

        Those that are missing are empty. None for a row that does not match its checksums.
        """
        offsets, sizes = self._index.offsets[local].ravel(), self._index.lengths[local].ravel()
        places = zip(np.maximum(offsets, 0).tolist(), sizes.tolist(), strict=True)
        chunks = self.file.read_ranges(list(places))
        pieces = len(chunks) // self._piece
        found = [0] * pieces
        for number, chunk in enumerate(chunks):
            found[number // self._piece] = crc32c(chunk, found[number // self._piece])
        return chunks if found == self._checksums[local * pieces : (local + 1) * pieces].tolist() else None

    def values(self, local: int) -> Array | None:
        """Return the stored values (V, T, *inner) of a row; None where a chunk is missing or damaged."""
        chunks, array = self.chunks(local), self._array
        if chunks is None or not all(chunks):
            return None
        values = np.empty(array.row_shape, dtype=np.dtype(array.dtype).newbyteorder("<"))
        target = values.reshape(len(chunks), -1).view(np.uint8)
        for number, chunk in enumerate(chunks):
            if array.compression == "none":
                target[number] = np.frombuffer(chunk, dtype=np.uint8)
            else:
                decompress(chunk, target[number], array.compression, self.file.path)
        return values


class ImageRows:
    """The images in an open tar; raises CacheCorrupt for a record that does not know where and what they are."""

    def __init__(self, file: ReadableFile, record: Record, name: str) -> None:
        self.file = file
        checksums = record.files[name].piece_checksums() if name in record.files else None
        if checksums is None or len(checksums) != len(record.offsets):
            raise CacheCorrupt(f"{record_name('images', record.shard)} does not have the checksums of {name}")
        self._checksums = checksums.tolist()
        self._places = recorded_places(record).tolist()

    def __len__(self) -> int:
        return len(self._places)

    def image(self, local: int) -> bytes | None:
        """Return an encoded image, counted from the first of the shard; None where it does not match its checksum."""
        image = self.file.read(*self._places[local])
        return image if crc32c(image) == self._checksums[local] else None
