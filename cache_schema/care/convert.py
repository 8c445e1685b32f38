"""Copying a sealed cache into another store, without loss: the bits of the features, the images, everything else.

What is copied is checked against the source's own checksums, sample by sample, so that damage is never given a fresh
checksum. The copy is written like any cache: piece by piece, resumable, by several processes if need be.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from cache_schema.encoding.number_formats import Array
from cache_schema.errors import CacheCorrupt, CacheError, CacheMismatch, CacheUnsealed
from cache_schema.format import layout
from cache_schema.format.journal import FidelitySums, Record, read_record, record_name
from cache_schema.format.layout import ArrayLayout
from cache_schema.format.manifest import Compression, Manifest, StoreInfo, StoreKind
from cache_schema.format.manifest_file import load_manifest, manifest_checksum, revalidate
from cache_schema.format.samples import load_samples
from cache_schema.storage.folder import Folder, ReadableFile
from cache_schema.storage.local import LocalFolder, local_folder
from cache_schema.storage.streamed import reading_folder
from cache_schema.stores.calibration_files import load_calibration
from cache_schema.stores.checked_rows import ArrayRows, ImageRows
from cache_schema.stores.registry import store_of
from cache_schema.stores.webdataset_store import check_member_sizes
from cache_schema.writing.creation import create_cache
from cache_schema.writing.writer import CacheWriter, EncodedRow


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    store: StoreKind,
    compression: Compression | None = None,
    samples_per_shard: int | None = None,
    advance: Callable[[int], None] = lambda samples: None,
) -> Manifest:
    """Copy the sealed cache at `source` to `target` in another store, and return the copy's manifest.

    Compression and samples per shard default to those of the source, as far as the store has them. Interrupted, the
    same call goes on where it stopped. `advance` is told how many more samples are in the copy, first of all those that
    an interrupted call copied. Raises
    CacheUnsealed for a source that is not complete, CacheCorrupt, naming file, shard and sample, for a damaged one,
    and CacheMismatch where something else than this copy is at `target`.
    """
    original = _Source(reading_folder(source))
    root = local_folder(target).path
    if isinstance(original.folder, LocalFolder):
        _check_apart(original.folder.path, root)
    planned = _plan(original.manifest, store, compression, samples_per_shard)
    writer = create_cache(root, planned, original.samples)
    _check_is_this_copy(writer, planned)
    if writer.manifest.sealed:
        return writer.manifest
    _copy_calibration(original, writer)
    for shard in writer.missing_image_shards():
        writer.write_images(shard, [original.image(row) for row in writer.image_rows(shard)])
    missing = writer.missing_shards()
    advance(planned.dataset.feature_rows - sum(len(writer.shard_rows(shard)) for shard in missing))
    for shard in missing:
        _copy_shard(original, writer, shard)
        advance(len(writer.shard_rows(shard)))
    return writer.seal()


def _check_apart(source: Path, target: Path) -> None:
    ours, theirs = source.resolve(), target.resolve()
    if ours == theirs:
        raise CacheError(f"{target} is the cache to convert itself; choose another directory for the copy")
    if ours in theirs.parents or theirs in ours.parents:
        raise CacheError(f"{source} and {target} lie in each other; choose another directory for the copy")


def _plan(
    manifest: Manifest, store: StoreKind, compression: Compression | None, samples_per_shard: int | None
) -> Manifest:
    """Return the unsealed manifest of the copy."""
    if store == "webdataset" and compression not in (None, "none"):
        raise CacheError(f"a webdataset store is not compressed: leave {compression} out, or convert to a zarr store")
    if samples_per_shard is not None and samples_per_shard < 1:
        raise CacheError(f"a shard cannot hold {samples_per_shard} samples")
    kept: Compression = manifest.encoding.compression if store == "zarr" else "none"
    per_shard = samples_per_shard or manifest.store.samples_per_shard
    planned = revalidate(
        manifest.model_copy(
            update={
                "encoding": manifest.encoding.model_copy(update={"compression": compression or kept}),
                "store": StoreInfo(
                    kind=store,
                    samples_per_shard=per_shard,
                    feature_shards=-(-manifest.dataset.feature_rows // per_shard),
                    images_per_shard=manifest.store.images_per_shard,
                    image_shards=manifest.store.image_shards,
                ),
                "provenance": manifest.provenance.model_copy(update={"converted": _describe(manifest)}),
                "sealed": False,
                "fidelity": [],
                "failed_rows": [],
                "massive_channels": {},
                "bytes_features": None,
                "bytes_images": None,
            }
        )
    )
    if store == "webdataset":
        check_member_sizes(planned)
    return planned


def _describe(manifest: Manifest) -> str:
    """Return what a copy says it was copied from: enough to know it again when the copying is resumed."""
    store, compression = manifest.store, manifest.encoding.compression
    return (
        f"from {store.kind}, {store.samples_per_shard} samples per shard, compression {compression}, manifest "
        f"{manifest_checksum(manifest.document())}"
    )


def _check_is_this_copy(writer: CacheWriter, planned: Manifest) -> None:
    found = writer.manifest
    if found.provenance.converted != planned.provenance.converted:
        raise CacheMismatch(
            f"{writer.root} holds this cache, but not as a copy of the one to convert; choose another directory"
        )
    settings = [(m.store, m.encoding.compression) for m in (found, planned)]
    if settings[0] != settings[1]:
        raise CacheMismatch(
            f"{writer.root} holds a copy with other settings ({found.store.kind}, {found.store.samples_per_shard} "
            f"samples per shard, compression {found.encoding.compression}); give these, or choose another directory"
        )


def _copy_calibration(original: "_Source", writer: CacheWriter) -> None:
    arrays = {
        array: load_calibration(original.folder, original.manifest, array)
        for array in layout.all_calibrations(original.manifest)
    }
    if arrays:
        writer.store_calibration(arrays)


def _copy_shard(original: "_Source", writer: CacheWriter, shard: int) -> None:
    rows = writer.shard_rows(shard)
    sources = original.records_of(rows)
    failed = {item.row: item.reason for record in sources for item in record.failed if item.row in rows}
    # What a shard lost goes to the shard that gets its first row: the figures of the whole cache stay as they are.
    sums: list[FidelitySums] = [item for record in sources if record.rows[0] in rows for item in record.fidelity]

    def encoded() -> Iterator[EncodedRow]:
        for row in rows:
            yield None if row in failed else original.row(row)

    writer.write_encoded_shard(shard, encoded(), lambda: sums, failed)


class _Source:
    """The cache that is copied, read row by row, everything checked against its journal."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.manifest = load_manifest(folder)
        if not self.manifest.sealed:
            raise CacheUnsealed(f"cache {folder} is not complete, so it cannot be converted; run its build again first")
        self._store = store_of(self.manifest)
        self.samples = self._load_samples()
        self._arrays = layout.all_layouts(self.manifest)
        self._opened: tuple[int, dict[str, ArrayRows]] | None = None
        self._records: dict[int, Record] = {}
        self._images: tuple[int, ImageRows] | None = None

    def records_of(self, rows: range) -> list[Record]:
        """Return the records of the shards that hold any of the rows, which can be read from then on."""
        each = self.manifest.store.samples_per_shard
        shards = range(rows.start // each, -(-rows.stop // each))
        self._records = {shard: self._records.get(shard) or self._record(shard) for shard in shards}
        return list(self._records.values())

    def row(self, row: int) -> Mapping[str, Array]:
        """Return the stored arrays (V, T, *inner) of a sample, by name."""
        shard, local = divmod(row, self.manifest.store.samples_per_shard)
        if self._opened is None or self._opened[0] != shard:
            self._opened = (shard, {array.name: self._open(array, shard) for array in self._arrays})
        found = {}
        for name, rows in self._opened[1].items():
            values = rows.values(local)
            if values is None:
                raise self._damaged(rows.file, row, shard)
            found[name] = values
        return found

    def image(self, row: int) -> bytes:
        """Return the encoded image of a row."""
        shard, local = divmod(row, self.manifest.store.images_per_shard)
        if self._images is None or self._images[0] != shard:
            self._images = (shard, self._open_images(shard))
        images = self._images[1]
        image = images.image(local) if local < len(images) else None
        if image is None:
            raise self._damaged(images.file, row, shard)
        return image

    def _load_samples(self) -> pa.Table:
        record = read_record(self.folder, "layout")
        table = load_samples(self.folder)
        if record is None or layout.SAMPLES_NAME not in record.files:
            raise CacheCorrupt(
                f"{self.folder.where(record_name('layout'))} is missing or says nothing about the samples"
            )
        if self.folder.digest(layout.SAMPLES_NAME).crc32c != record.files[layout.SAMPLES_NAME].crc32c:
            where = self.folder.where(layout.SAMPLES_NAME)
            raise _damaged(self.folder, f"{where} does not match its checksum")
        return table

    def _record(self, shard: int) -> Record:
        store, count = self.manifest.store, self.manifest.dataset.feature_rows
        rows = layout.rows_of_shard(shard, store.samples_per_shard, count)
        record = read_record(self.folder, "features", shard)
        if record is None or record.rows != (rows.start, rows.stop):
            raise CacheCorrupt(f"{self.folder.where(record_name('features', shard))} is missing or of other rows")
        return record

    def _open(self, array: ArrayLayout, shard: int) -> ArrayRows:
        file = self.folder.open(self._store.array_file(array, shard))
        return ArrayRows(self._store, file, self._records[shard], array)

    def _open_images(self, shard: int) -> ImageRows:
        record, name = read_record(self.folder, "images", shard), layout.image_file(shard)
        if record is None:
            raise CacheCorrupt(f"{self.folder.where(record_name('images', shard))} is missing")
        return ImageRows(self.folder.open(name), record, name)

    def _damaged(self, file: ReadableFile, row: int, shard: int) -> CacheCorrupt:
        name = self.samples["id"][row].as_py()
        problem = f"{file.path} (shard {shard}) is damaged: sample {name!r} (row {row}) does not match its checksum"
        return _damaged(self.folder, problem, shard=shard, row=row, sample=name)


def _damaged(folder: Folder, problem: str, **facts: Any) -> CacheCorrupt:
    return CacheCorrupt(problem, remedy="verify lists all damage", cache=str(folder), copied=True, **facts)
