"""Student images out of their tar files: each by one read of just its bytes, checked if that is asked for."""

import contextlib
from collections.abc import Callable, Sequence

from cache_schema.encoding.number_formats import Array
from cache_schema.errors import CacheCorrupt, CacheUnsealed
from cache_schema.format import layout
from cache_schema.format.damage import damaged
from cache_schema.format.journal import read_committed, read_record
from cache_schema.reading.chunks import ChunkSource
from cache_schema.reading.fetching import at_once
from cache_schema.storage.checksum import crc32c
from cache_schema.stores.images import check_places, index_size, parse_index, recorded_places


class ImageReader:
    """Reads the images of one cache; `count` says how many rows have one, without which no index is believed."""

    def __init__(self, source: ChunkSource, count: Callable[[], int]) -> None:
        self._source, self._count = source, count
        self._offsets: dict[int, Array] = {}

    def read(self, row: int) -> bytes:
        """Return the encoded image of a row; raises CacheCorrupt, naming the sample, or CacheUnsealed."""
        source = self._source
        shard, local = divmod(row, source.manifest.store.images_per_shard)
        name = layout.image_file(shard)
        try:
            offset, size = (int(value) for value in self._places(shard)[local])
            file = source.opened.file(name)
            if offset < 0 or size < 0 or offset + size > file.size:
                raise CacheCorrupt(f"{file.path} is truncated: an image is not inside it")
            image = file.read(offset, size)
            if source.verify and crc32c(image) != source.checksums("images", shard, name).values[local]:
                raise CacheCorrupt(f"{file.path} does not match its checksum")
        except CacheCorrupt as error:
            raise damaged(source.folder, error, shard, row) from error
        except IndexError:
            raise damaged(source.folder, f"the journal does not know all images of {name}", shard, row) from None
        return image

    def read_at_once(self, rows: Sequence[int]) -> list[bytes]:
        """Return the encoded images of rows of a distant cache; those of wrong bytes are fetched once more."""
        per_shard = self._source.manifest.store.images_per_shard
        for shard in {row // per_shard for row in rows}:
            with contextlib.suppress(CacheCorrupt):
                self._places(shard)  # once, rather than by every thread

        def read(row: int) -> bytes:
            try:
                return self.read(row)
            except CacheCorrupt:
                self._source.forget(self._source.opened.file(layout.image_file(row // per_shard)))
                return self.read(row)

        with self._source.noting():
            return at_once(read, rows)

    def _places(self, shard: int) -> Array:
        """Return where the images of a shard are, int64 (rows, 2)."""
        if shard not in self._offsets:
            folder, store = self._source.folder, self._source.manifest.store
            if self._source.manifest.sealed:
                name = layout.IMAGE_INDEX_NAME
                data = read_committed(folder, "seal", name, index_size(self._count()))
                if data is None:
                    raise CacheCorrupt(f"the journal of {folder} has no record of its sealing")
                table = parse_index(data, self._count(), folder.where(name))
                for number in range(store.image_shards):
                    start = number * store.images_per_shard
                    self._offsets[number] = check_places(table[start : start + store.images_per_shard], name)
            else:
                record = read_record(folder, "images", shard)
                if record is None:
                    raise CacheUnsealed(f"image shard {shard} of {folder} is not built yet")
                self._offsets[shard] = recorded_places(record)
        return self._offsets[shard]
