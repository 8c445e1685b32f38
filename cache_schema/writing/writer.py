"""Writing a cache, piece by piece, so that whatever is committed stays and the rest can be done later by anyone.

How one is begun, and found again: `cache_schema.writing.creation`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from cache_schema.encoding import fidelity
from cache_schema.encoding.calibration import Calibrator
from cache_schema.encoding.codec import TapCodec
from cache_schema.encoding.number_formats import Array, Features, as_features
from cache_schema.encoding.row_encoder import RowEncoder, check_finite, check_shapes
from cache_schema.errors import (
    CacheError,
    CacheUnsealed,
)
from cache_schema.format import layout
from cache_schema.format.card import render_card
from cache_schema.format.damage import damaged
from cache_schema.format.journal import (
    FailedRow,
    FidelitySums,
    Kind,
    Record,
    committed_shards,
    file_record,
    is_committed,
    read_record,
    write_record,
)
from cache_schema.format.manifest import Manifest, Provenance, TapInfo
from cache_schema.format.manifest_file import MANIFEST_NAME, load_manifest, render_manifest, revalidate
from cache_schema.format.samples import (
    count_usable,
)
from cache_schema.read_ahead import ReadAhead
from cache_schema.storage.files import AsideFile
from cache_schema.storage.folder import Folder
from cache_schema.storage.local import LocalFolder
from cache_schema.stores.calibration_files import commit_calibration, load_codec, load_treatment
from cache_schema.stores.images import MAX_IMAGE_BYTES, render_index, write_tar
from cache_schema.stores.registry import store_of

# The stored arrays (V, T, *inner) of a sample by name, or None where the teacher failed on it.
EncodedRow = Mapping[str, Array] | None

# How many times the allowed loss a build may show in its first shards before it is stopped.
_HOPELESS = 2.0


class CacheWriter:
    """Adds pieces to a cache. Several writers, in threads, processes or one after the other, may share a directory."""

    def __init__(self, folder: LocalFolder, manifest: Manifest, samples: pa.Table) -> None:
        self.folder = folder
        self.manifest = manifest
        self.samples = samples
        self._store = store_of(manifest)
        self._codecs: dict[str, TapCodec] = {}
        self._measured: list[FidelitySums] = []

    @property
    def root(self) -> Path:
        """The directory of the cache."""
        return self.folder.path

    def missing_shards(self) -> list[int]:
        """Return the feature shards that nobody has committed yet, as the journal stands now."""
        return sorted(set(range(self.manifest.store.feature_shards)) - committed_shards(self.folder, "features"))

    def missing_image_shards(self) -> list[int]:
        """Return the image shards that nobody has committed yet, as the journal stands now."""
        return sorted(set(range(self.manifest.store.image_shards)) - committed_shards(self.folder, "images"))

    def shard_rows(self, shard: int) -> range:
        """Return the rows of the samples table whose features belong in a shard."""
        store = self.manifest.store
        _check_shard(shard, store.feature_shards, "feature")
        return layout.rows_of_shard(shard, store.samples_per_shard, self.manifest.dataset.feature_rows)

    def image_rows(self, shard: int) -> range:
        """Return the rows of the samples table whose images belong in an image shard."""
        store = self.manifest.store
        _check_shard(shard, store.image_shards, "image")
        return layout.rows_of_shard(shard, store.images_per_shard, count_usable(self.samples))

    def needs_calibration(self) -> bool:
        """Say whether `calibrate` must be called: before the first `write_shard`, or after damage to what it stored."""
        if not self.manifest.encoding.calibrated:
            return False
        record = read_record(self.folder, "calibration")
        return record is None or not all(self.folder.exists(name) for name in record.files)

    def calibrate(self, features: Mapping[str, Features] | Iterable[Mapping[str, Features]]) -> None:
        """Store the statistics that the encoding rests on, from the teacher's features of a fixed choice of rows.

        `features` are (n, V, T, L, C) of every tap, or batches of them, of which one at a time is held in memory. Does
        nothing, and takes no batch, for encodings without calibration and where one is stored already: the first one
        counts. Raises InvalidFeatures, naming the sample by its number, for NaN and infinities, and CacheMismatch if
        shards are there that were encoded with another calibration than the one that follows from these features.
        """
        if not self.needs_calibration():
            return
        calibrator, seen = Calibrator(self.manifest), 0
        for batch in [features] if isinstance(features, Mapping) else features:
            check_shapes(self.manifest, batch)
            for tap in self.manifest.taps:
                values = as_features(batch[tap.name])
                for index, sample in enumerate(values):
                    check_finite(sample, tap, f"calibration sample {seen + index}")
                calibrator.add(tap.name, values)
            seen += len(values)
        statistics = {tap.name: calibrator.finish(tap.name) for tap in self.manifest.taps}
        self.store_calibration(
            {
                array: statistics[tap.name][array.part]
                for tap in self.manifest.taps
                for array in layout.calibration_layouts(self.manifest, tap)
            }
        )

    def store_calibration(self, statistics: Mapping[layout.CalibrationLayout, Array]) -> None:
        """Store statistics as they are, for every one of `layout.all_calibrations`, unless they are stored already.

        Raises CacheMismatch if shards are there that were encoded with others.
        """
        documents = {
            self._store.calibration_file(array): self._store.render_calibration(array, values)
            for array, values in statistics.items()
        }
        with self.folder.lock():
            if self.needs_calibration():
                commit_calibration(self.folder, documents)

    def write_shard(
        self, shard: int, features: Mapping[str, Features], failed: Mapping[int, str] | None = None
    ) -> None:
        """Encode and commit one feature shard: for every tap, teacher features (rows of the shard, V, T, L, C).

        `failed` maps rows that the teacher failed on to how it did: whatever values are given for these, the cache
        will say that it has no features of them. A shard that is committed already is left as it is. Raises
        InvalidFeatures, naming the sample, for NaN, infinities and values beyond the encoding's range in other rows,
        and CacheStorageError where it cannot be written; in both cases nothing of the shard remains.
        """
        rows, failed = self.shard_rows(shard), failed or {}
        strange = sorted(row for row in failed if row not in rows)
        if strange:
            raise CacheError(f"row {strange[0]} cannot have failed in shard {shard}: it is not one of its rows")
        if is_committed(self.folder, "features", shard):
            return
        if self.needs_calibration():
            raise CacheUnsealed(f"cache {self.folder} must be calibrated before its first shard is written")
        check_shapes(self.manifest, features, len(rows))
        encoder = RowEncoder(self.manifest, {tap.name: self._codec(tap) for tap in self.manifest.taps})

        positions = {row: position for position, row in enumerate(row for row in rows if row not in failed)}

        def encode(index: int) -> EncodedRow:
            row = rows[index]
            if row in failed:
                return None
            sample = {name: values[index] for name, values in features.items()}
            return encoder.encode(sample, self._name(row), positions[row])

        # Rows are encoded by another thread while those before them are written.
        with ReadAhead(encode, threads=1) as ahead:
            written = self.write_encoded_shard(shard, ahead.over(range(len(rows))), encoder.fidelity, failed)
        self._measured = fidelity.combine([*self._measured, *written.fidelity])

    def check_fidelity(self, min_cosine: float) -> None:
        """Raise LowFidelity if the shards that this writer wrote so far leave no hope for `seal(min_cosine=...)`.

        That is, if a tap and timestep has lost more than twice what is allowed: a few shards are only an estimate.
        """
        figures = fidelity.merge(self._measured)
        fidelity.require_cosine(figures, min_cosine, self.manifest.label, tolerance=_HOPELESS)

    def write_encoded_shard(
        self,
        shard: int,
        encoded: Iterable[EncodedRow],
        fidelity_sums: Callable[[], list[FidelitySums]],
        failed: Mapping[int, str],
    ) -> Record:
        """Commit one feature shard from rows that are encoded already, and return its record.

        What their encoding lost is asked for after the last row.
        """
        rows = self.shard_rows(shard)
        with self._store.row_writer(self.folder, shard, self.samples) as out:
            for _, parts in zip(rows, encoded, strict=True):
                if parts is None:
                    out.add_failed_row()
                else:
                    out.add_row(parts)
            record = Record(
                kind="features",
                shard=shard,
                rows=(rows.start, rows.stop),
                files=out.finish(),
                fidelity=fidelity_sums(),
                failed=[FailedRow(row=row, reason=failed[row]) for row in sorted(failed)],
            )
            self._commit(record, out.asides)
        return record

    def write_images(self, shard: int, images: Sequence[bytes]) -> None:
        """Commit one shard of student images, one encoded image per row of `image_rows(shard)`."""
        rows = self.image_rows(shard)
        settings = self.manifest.images
        assert settings is not None
        if is_committed(self.folder, "images", shard):
            return
        if len(images) != len(rows):
            raise CacheError(f"image shard {shard} has {len(rows)} rows, {len(images)} images were given")
        for row, image in zip(rows, images, strict=True):
            if not image:
                raise CacheError(f"the image of {self._name(row)} is empty")
            if len(image) > MAX_IMAGE_BYTES:
                raise CacheError(f"the image of {self._name(row)} is larger than {MAX_IMAGE_BYTES} bytes")
        name = layout.image_file(shard)
        with self.folder.aside(name) as aside:
            offsets, checksums = write_tar(aside, rows, images, settings.format)
            files = {name: file_record(aside.finish(), checksums)}
            record = Record(kind="images", shard=shard, rows=(rows.start, rows.stop), files=files, offsets=offsets)
            self._commit(record, [aside])

    def seal(self, provenance: Provenance | None = None, min_cosine: float | None = None) -> Manifest:
        """Declare the cache complete and return its final manifest; sealing a sealed cache changes nothing.

        `provenance` replaces the manifest's own. Raises CacheUnsealed if shards are missing, CacheCorrupt if
        committed files are gone or of the wrong size, and LowFidelity if a tap and timestep has a mean cosine below
        `min_cosine`: the cache then stays as it is and can still be sealed by asking for less.
        """
        with self.folder.lock():
            manifest = load_manifest(self.folder)
            if manifest.sealed:
                self.manifest = manifest
                if min_cosine is not None:
                    fidelity.require_cosine(manifest.fidelity, min_cosine, manifest.label)
                return manifest
            self._check_complete()
            features = list(self._records("features", manifest.store.feature_shards))
            figures = fidelity.merge([item for record in features for item in record.fidelity])
            if min_cosine is not None:
                fidelity.require_cosine(figures, min_cosine, manifest.label)
            images = list(self._records("images", manifest.store.image_shards))
            calibration = [record for record in [read_record(self.folder, "calibration")] if record is not None]
            sealed = revalidate(
                manifest.model_copy(
                    update={
                        "sealed": True,
                        "fidelity": figures,
                        "failed_rows": [item.row for record in features for item in record.failed],
                        "massive_channels": self._massive_channels(),
                        "bytes_features": _bytes(features + calibration),
                        "bytes_images": _bytes(images),
                        "provenance": provenance or manifest.provenance,
                    }
                )
            )
            write_seal(self.folder, sealed)
            # The last write: up to here the cache is unsealed, and sealing it again writes the same bytes.
            self.folder.write(MANIFEST_NAME, render_manifest(sealed))
        self.folder.sweep()
        self.manifest = load_manifest(self.folder)
        return self.manifest

    def _massive_channels(self) -> dict[str, list[int]]:
        if self.manifest.encoding.massive == "keep" or not self.manifest.store.feature_shards:
            return {}
        taps = self.manifest.taps
        return {tap.name: load_treatment(self.folder, self.manifest, tap).channels for tap in taps}

    def _commit(self, record: Record, asides: list[AsideFile]) -> None:
        with self.folder.lock():
            # Another builder may have been faster; its files and its record belong together, so ours are dropped.
            if is_committed(self.folder, record.kind, record.shard):
                return
            for aside in asides:
                aside.publish()
            write_record(self.folder, record)

    def _codec(self, tap: TapInfo) -> TapCodec:
        if tap.name not in self._codecs:
            self._codecs[tap.name] = load_codec(self.folder, self.manifest, tap)
        return self._codecs[tap.name]

    def _check_complete(self) -> None:
        parts = {"feature": self.missing_shards(), "image": self.missing_image_shards()}
        for what, missing in parts.items():
            if missing:
                some = ", ".join(str(shard) for shard in missing[:8]) + (", ..." if len(missing) > 8 else "")
                raise CacheUnsealed(f"cannot seal {self.folder}: {len(missing)} {what} shards are missing ({some})")
        if self.manifest.store.feature_shards and self.needs_calibration():
            raise CacheUnsealed(f"cannot seal {self.folder}: its calibration is missing")
        if not is_committed(self.folder, "layout"):
            raise CacheUnsealed(f"cannot seal {self.folder}: its samples table is missing; create_cache writes it")

    def _records(self, kind: Kind, count: int) -> Iterator[Record]:
        """Yield the records of all shards of a kind, after checking that their files are there."""
        for shard in range(count):
            record = read_record(self.folder, kind, shard)
            assert record is not None
            for name, expected in record.files.items():
                size = self.folder.size(name)
                if size != expected.bytes:
                    found = "is gone" if size is None else f"has {size} bytes instead of {expected.bytes}"
                    raise damaged(self.folder, f"{self.folder.where(name)} {found}")
            yield record

    def _name(self, row: int) -> str:
        return f"sample {self.samples['id'][row].as_py()!r} (row {row})"


def write_seal(folder: Folder, manifest: Manifest) -> None:
    """Write what is derived from a complete cache, and its record: the card and the index of the images."""
    documents = {layout.CARD_NAME: render_card(manifest)}
    if manifest.images is not None:
        records = (read_record(folder, "images", shard) for shard in range(manifest.store.image_shards))
        documents[layout.IMAGE_INDEX_NAME] = render_index(
            [place for record in records if record is not None for place in record.offsets]
        )
    files = {name: file_record(folder.write(name, data)) for name, data in documents.items()}
    write_record(folder, Record(kind="seal", files=files))


def _check_shard(shard: int, count: int, what: str) -> None:
    if not 0 <= shard < count:
        raise CacheError(f"there is no {what} shard {shard}: there are {count}")


def _bytes(records: Iterable[Record]) -> int:
    return sum(file.bytes for record in records for file in record.files.values())
