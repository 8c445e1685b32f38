"""Shards of some of the timesteps of a cache: their chunks alone are fetched, and laid as a build of them would."""

from collections.abc import Iterator

from cache_schema.errors import CacheCorrupt
from cache_schema.format import layout
from cache_schema.format.journal import FileRecord, Record, file_record
from cache_schema.format.layout import ArrayLayout
from cache_schema.format.manifest import Manifest
from cache_schema.storage.checksum import crc32c
from cache_schema.storage.folder import Folder, ReadableFile
from cache_schema.storage.local import LocalFolder
from cache_schema.stores.calibration_files import load_calibration
from cache_schema.stores.registry import store_of
from cache_schema.stores.shard import ShardWriter

# A gap so small is fetched rather than asked around.
_GAP = 128 << 10
_SPAN = 8 << 20  # of one request


def kept_timesteps(manifest: Manifest, whole: Manifest) -> list[int]:
    """Return which of the timesteps of the whole, counted from 0, a part of it has."""
    return [whole.curriculum.timesteps.index(step) for step in manifest.curriculum.timesteps]


def cut_calibration(source: Folder, manifest: Manifest, whole: Manifest) -> dict[str, bytes]:
    """Return the contents of the calibration's files, by name, for the timesteps of a part; raises CacheCorrupt."""
    store, kept = store_of(manifest), kept_timesteps(manifest, whole)
    known = {array.name: array for array in layout.all_calibrations(whole)}
    made = {}
    for array in layout.all_calibrations(manifest):
        values = load_calibration(source, whole, known[array.name])
        by_step = values[kept] if array.dimensions[0] == "timestep" else values
        made[store.calibration_file(array)] = store.render_calibration(array, by_step)
    return made


def cut_shard(
    source: Folder, target: LocalFolder, manifest: Manifest, whole: Manifest, record: Record
) -> dict[str, FileRecord]:
    """Write the files of a shard with the timesteps of a part alone, and return what the part's record says of them.

    `record` is that of the whole's shard, of whose chunks every one is held against its checksum. Raises CacheCorrupt.
    """
    store, kept, files = store_of(manifest), kept_timesteps(manifest, whole), {}
    arrays = {array.name: array for array in layout.all_layouts(whole)}
    for name, (array,) in store.shard_files(record.shard).items():
        with target.aside(name) as aside:
            writer = ShardWriter(array, aside)
            for row in _rows(source, whole, record, arrays[array.name], kept):
                if any(row):
                    writer.add_chunks(row)
                else:
                    writer.skip_row()
            writer.finish()
            files[name] = file_record(aside.finish(), writer.piece_crc32c)
            aside.publish()
    return files


def _rows(
    source: Folder, whole: Manifest, record: Record, array: ArrayLayout, kept: list[int]
) -> Iterator[list[bytes]]:
    """Yield the stored chunks of every row of a shard at the timesteps kept; empty ones where they are missing."""
    store = store_of(whole)
    file = source.open(store.array_file(array, record.shard))
    index = store.read_index(file, array, record.shard)
    checksums = store.piece_checksums(record, array)
    if checksums.chunks != 1:
        raise CacheCorrupt(f"{file.path} has no checksums of single timesteps; pull the whole cache, without timesteps")
    rows, views, steps = record.rows[1] - record.rows[0], array.outer[1], array.outer[2]
    chosen = [(row, view, step) for row in range(rows) for view in range(views) for step in kept]
    places = [(max(0, int(index.offsets[at])), int(index.lengths[at])) for at in chosen]
    chunks = _read(file, places)
    for row in range(rows):
        found = []
        for at in chosen[row * views * len(kept) : (row + 1) * views * len(kept)]:
            chunk = next(chunks)
            if crc32c(chunk) != checksums.values[(at[0] * views + at[1]) * steps + at[2]]:
                raise CacheCorrupt(f"{file.path} is damaged: row {record.rows[0] + row} does not match its checksum")
            found.append(chunk)
        yield found


def _read(file: ReadableFile, places: list[tuple[int, int]]) -> Iterator[bytes]:
    """Yield what is at every (offset, size), in as few requests as skip what is not needed."""
    begin = 0
    while begin < len(places):
        start, size = places[begin]
        end, stop = begin + 1, start + size
        while end < len(places) and stop <= places[end][0] <= stop + _GAP and sum(places[end]) - start <= _SPAN:
            stop, end = sum(places[end]), end + 1
        data = file.read(start, stop - start)
        for offset, length in places[begin:end]:
            yield data[offset - start : offset - start + length]
        begin = end
