"""Writing a cache, piece by piece, so that whatever is committed stays and the rest can be done later by anyone."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np
import pyarrow as pa

from cache_schema import fidelity, layout
from cache_schema.calibration import Calibrator
from cache_schema.card import render_card
from cache_schema.codec import TapCodec, load_codec
from cache_schema.encoding import (
    Array,
    FloatArray,
    as_features,
    first_not_finite,
)
from cache_schema.errors import (
    CacheCorrupt,
    CacheError,
    CacheMismatch,
    CacheNotFound,
    CacheUnsealed,
    InvalidFeatures,
)
from cache_schema.files import (
    AsideFile,
    directory_lock,
    is_aside,
    make_directory,
    storage_errors,
    sweep_aside_files,
    write_file,
    write_new_file,
)
from cache_schema.identity import differing_fields
from cache_schema.images import render_index, write_tar
from cache_schema.journal import (
    FidelitySums,
    FileRecord,
    Kind,
    Record,
    committed_shards,
    file_record,
    read_record,
    write_record,
)
from cache_schema.manifest import Manifest, Provenance, TapInfo
from cache_schema.manifest_file import MANIFEST_NAME, load_manifest, render_manifest, revalidate
from cache_schema.reader import local_path
from cache_schema.reduction import teacher_shape
from cache_schema.samples import (
    check_against_manifest,
    check_samples,
    count_usable,
    load_samples,
    render_samples,
)
from cache_schema.shard import ShardWriter

if TYPE_CHECKING:
    import torch

Features = Union["torch.Tensor", np.ndarray]

# How many times the allowed loss a build may show in its first shards before it is stopped.
_HOPELESS = 2.0


def create_cache(path: str | os.PathLike[str], manifest: Manifest, samples: pa.Table) -> "CacheWriter":
    """Create the cache at `path`, or continue the one that is there if it has the same cache id.

    An existing cache keeps its own shard sizes and compression, whatever `manifest` asks for; a sealed one comes back
    with nothing missing. Raises CacheMismatch where another cache, or the same with another samples table, is there;
    CacheError for a directory that holds something else; CacheStorageError where it cannot be written.
    """
    root = local_path(path)
    planned = revalidate(
        manifest.model_copy(update={"sealed": False, "fidelity": [], "bytes_features": None, "bytes_images": None})
    )
    check_samples(samples)
    check_against_manifest(samples, planned)
    existing = _establish_manifest(root, planned)
    if existing.cache_id != planned.cache_id:
        raise CacheMismatch(
            f"{root} holds cache {existing.cache_id[:12]}, these inputs make cache {planned.cache_id[:12]}; they "
            f"differ in {', '.join(differing_fields(existing, planned))}; choose another directory"
        )
    if not existing.sealed:
        sweep_aside_files(root)
        _establish_layout(root, existing, samples)
    stored = load_samples(root / layout.SAMPLES_NAME)
    if not stored.equals(samples):
        raise CacheMismatch(
            f"cache {root} was begun with other samples: {_first_difference(stored, samples)}; choose another directory"
        )
    return CacheWriter(root, existing, stored)


def _establish_manifest(root: Path, planned: Manifest) -> Manifest:
    """Return the manifest at `root`, putting `planned` there if there is none: of two builders, one wins."""
    try:
        return load_manifest(root)
    except CacheNotFound:
        pass
    if root.exists() and not root.is_dir():
        raise CacheError(f"{root} is not a directory; choose another place for the cache")
    if root.is_dir() and any(not is_aside(found.name) and found.name != MANIFEST_NAME for found in root.iterdir()):
        raise CacheError(f"{root} is not empty and not a cache; choose another directory")
    with storage_errors(root):
        make_directory(root)
    write_new_file(root / MANIFEST_NAME, render_manifest(planned))
    return load_manifest(root)


def _establish_layout(root: Path, manifest: Manifest, samples: pa.Table) -> None:
    """Write the samples table and the arrays' metadata once."""
    with directory_lock(root):
        if read_record(root, "layout") is not None:
            return
        documents = {**layout.zarr_documents(manifest), layout.SAMPLES_NAME: render_samples(samples)}
        files = {name: file_record(write_file(root / name, data)) for name, data in documents.items()}
        write_record(root, Record(kind="layout", rows=(0, samples.num_rows), files=files))


def _first_difference(ours: pa.Table, theirs: pa.Table) -> str:
    if ours.num_rows != theirs.num_rows:
        return f"{ours.num_rows} rows there, {theirs.num_rows} given"
    for name in ours.column_names:
        pairs = zip(ours[name].to_pylist(), theirs[name].to_pylist(), strict=True)
        for row, (mine, other) in enumerate(pairs):
            if mine != other:
                return f"{name} of row {row} is {mine!r} there, {other!r} given"
    return "their columns"


class CacheWriter:
    """Adds pieces to a cache. Several writers, in threads, processes or one after the other, may share a directory."""

    def __init__(self, root: Path, manifest: Manifest, samples: pa.Table) -> None:
        self.root = root
        self.manifest = manifest
        self.samples = samples
        self._codecs: dict[str, TapCodec] = {}
        self._measured: list[FidelitySums] = []

    def missing_shards(self) -> list[int]:
        """Return the feature shards that nobody has committed yet, as the journal stands now."""
        return sorted(set(range(self.manifest.store.feature_shards)) - committed_shards(self.root, "features"))

    def missing_image_shards(self) -> list[int]:
        """Return the image shards that nobody has committed yet, as the journal stands now."""
        return sorted(set(range(self.manifest.store.image_shards)) - committed_shards(self.root, "images"))

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
        """Say whether `calibrate` must be called before the first `write_shard`."""
        return self.manifest.encoding.calibrated and read_record(self.root, "calibration") is None

    def calibrate(self, features: Mapping[str, Features] | Iterable[Mapping[str, Features]]) -> None:
        """Store the statistics that the encoding rests on, from the teacher's features of a fixed choice of rows.

        `features` are (n, V, T, L, C) of every tap, or batches of them, of which one at a time is held in memory. Does
        nothing, and takes no batch, for encodings without calibration and where one is stored already: the first one
        counts. Raises InvalidFeatures, naming the sample by its place, for NaN and infinities.
        """
        if not self.needs_calibration():
            return
        calibrator, seen = Calibrator(self.manifest), 0
        for batch in [features] if isinstance(features, Mapping) else features:
            count = 0
            for tap, values in self._checked(batch):
                count = len(values)
                self._check_finite(values, tap, [f"calibration sample {seen + i}" for i in range(count)])
                calibrator.add(tap.name, values)
            seen += count
        statistics = {tap.name: calibrator.finish(tap.name) for tap in self.manifest.taps}
        with directory_lock(self.root):
            if not self.needs_calibration():
                return
            files = {}
            for tap in self.manifest.taps:
                for array in layout.calibration_layouts(self.manifest, tap):
                    data = statistics[tap.name][array.part].astype("<f4").tobytes()
                    files[array.file] = file_record(write_file(self.root / array.file, data))
            write_record(self.root, Record(kind="calibration", files=files))

    def write_shard(self, shard: int, features: Mapping[str, Features]) -> None:
        """Encode and commit one feature shard: for every tap, teacher features (rows of the shard, V, T, L, C).

        A shard that is committed already is left as it is. Raises InvalidFeatures, naming the sample, for NaN,
        infinities and values beyond the encoding's range, and CacheStorageError where it cannot be written; in both
        cases nothing of the shard remains.
        """
        rows = self.shard_rows(shard)
        if shard in committed_shards(self.root, "features"):
            return
        if self.needs_calibration():
            raise CacheUnsealed(f"cache {self.root} must be calibrated before its first shard is written")
        files: dict[str, FileRecord] = {}
        sums: list[FidelitySums] = []
        with contextlib.ExitStack() as stack:
            asides: list[AsideFile] = []
            for tap, values in self._checked(features, len(rows)):
                self._check_finite(values, tap, [self._name(row) for row in rows])
                writers = []
                for array in layout.feature_layouts(self.manifest, tap):
                    asides.append(stack.enter_context(AsideFile(self.root / array.shard_file(shard))))
                    writers.append(ShardWriter(array, asides[-1]))
                sums += self._encode_rows(tap, values, rows, writers)
                for writer in writers:
                    writer.finish()
                    files[writer.layout.shard_file(shard)] = file_record(writer.file.finish(), writer.piece_crc32c)
            record = Record(kind="features", shard=shard, rows=(rows.start, rows.stop), files=files, fidelity=sums)
            self._commit(record, asides)
        self._measured = fidelity.combine([*self._measured, *sums])

    def check_fidelity(self, min_cosine: float) -> None:
        """Raise LowFidelity if the shards that this writer wrote so far leave no hope for `seal(min_cosine=...)`.

        That is, if a tap and timestep has lost more than twice what is allowed: a few shards are only an estimate.
        """
        figures = fidelity.merge(self._measured)
        fidelity.require_cosine(figures, min_cosine, self.manifest.label, tolerance=_HOPELESS)

    def write_images(self, shard: int, images: Sequence[bytes]) -> None:
        """Commit one shard of student images, one encoded image per row of `image_rows(shard)`."""
        rows = self.image_rows(shard)
        settings = self.manifest.images
        assert settings is not None
        if shard in committed_shards(self.root, "images"):
            return
        if len(images) != len(rows):
            raise CacheError(f"image shard {shard} has {len(rows)} rows, {len(images)} images were given")
        for row, image in zip(rows, images, strict=True):
            if not image:
                raise CacheError(f"the image of {self._name(row)} is empty")
        name = layout.image_file(shard)
        with AsideFile(self.root / name) as aside:
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
        with directory_lock(self.root):
            manifest = load_manifest(self.root)
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
            calibration = [record for record in [read_record(self.root, "calibration")] if record is not None]
            sealed = revalidate(
                manifest.model_copy(
                    update={
                        "sealed": True,
                        "fidelity": figures,
                        "bytes_features": _bytes(features + calibration),
                        "bytes_images": _bytes(images),
                        "provenance": provenance or manifest.provenance,
                    }
                )
            )
            documents = {layout.CARD_NAME: render_card(sealed)}
            if sealed.images is not None:
                documents[layout.IMAGE_INDEX_NAME] = render_index([place for item in images for place in item.offsets])
            files = {name: file_record(write_file(self.root / name, data)) for name, data in documents.items()}
            write_record(self.root, Record(kind="seal", files=files))
            # The last write: up to here the cache is unsealed, and sealing it again writes the same bytes.
            write_file(self.root / MANIFEST_NAME, render_manifest(sealed))
        sweep_aside_files(self.root)
        self.manifest = load_manifest(self.root)
        return self.manifest

    def _commit(self, record: Record, asides: list[AsideFile]) -> None:
        with directory_lock(self.root):
            # Another builder may have been faster; its files and its record belong together, so ours are dropped.
            if record.shard in committed_shards(self.root, record.kind):
                return
            for aside in asides:
                aside.publish()
            write_record(self.root, record)

    def _encode_rows(
        self, tap: TapInfo, values: FloatArray, rows: range, writers: list[ShardWriter]
    ) -> list[FidelitySums]:
        codec = self._codec(tap)
        originals: list[FloatArray] = []
        decoded: list[Array] = []
        for row, sample in zip(rows, values, strict=True):
            try:
                encoded = codec.encode(sample)
            except InvalidFeatures as error:
                raise InvalidFeatures(f"tap {tap.name} of {self._name(row)}: {error}") from error
            for writer in writers:
                part = encoded.payload if writer.layout.part == "payload" else encoded.scale
                assert part is not None
                writer.add_row(part)
            if len(decoded) < fidelity.MEASURED_SAMPLES:
                originals.append(codec.pooled(sample))
                decoded.append(codec.restore(codec.decode(encoded)))
        return [
            fidelity.measure(
                tap.name,
                timestep,
                np.concatenate([sample[:, t] for sample in originals]),
                np.concatenate([sample[:, t] for sample in decoded]),
            )
            for t, timestep in enumerate(self.manifest.curriculum.timesteps)
        ]

    def _codec(self, tap: TapInfo) -> TapCodec:
        if tap.name not in self._codecs:
            self._codecs[tap.name] = load_codec(self.root, self.manifest, tap)
        return self._codecs[tap.name]

    def _checked(
        self, features: Mapping[str, Features], count: int | None = None
    ) -> Iterator[tuple[TapInfo, FloatArray]]:
        """Yield every tap of the cache with its features, once all names and shapes are known to be right."""
        names = [tap.name for tap in self.manifest.taps]
        if set(features) != set(names):
            raise InvalidFeatures(f"features are given for taps {sorted(features)}, the cache has {sorted(names)}")
        steps, views = len(self.manifest.curriculum.timesteps), len(self.manifest.views)
        for tap in self.manifest.taps:
            shape = tuple(features[tap.name].shape)
            first = shape[0] if count is None and shape else count
            expected = (first, views, steps, *teacher_shape(tap, self.manifest.encoding))
            if shape != expected:
                raise InvalidFeatures(f"features of tap {tap.name} have shape {shape}, expected {expected}")
        for tap in self.manifest.taps:
            yield tap, as_features(features[tap.name])

    def _check_finite(self, values: FloatArray, tap: TapInfo, names: Sequence[str]) -> None:
        for name, sample in zip(names, values, strict=True):
            bad = first_not_finite(sample)
            if bad is not None:
                raise InvalidFeatures(
                    f"tap {tap.name} of {name} is {sample[bad]} at (view, timestep, token, channel) = {bad}: the "
                    "teacher failed on it; quarantine the sample or compute it in a wider type"
                )

    def _check_complete(self) -> None:
        parts = {"feature": self.missing_shards(), "image": self.missing_image_shards()}
        for what, missing in parts.items():
            if missing:
                some = ", ".join(str(shard) for shard in missing[:8]) + (", ..." if len(missing) > 8 else "")
                raise CacheUnsealed(f"cannot seal {self.root}: {len(missing)} {what} shards are missing ({some})")

    def _records(self, kind: Kind, count: int) -> Iterator[Record]:
        """Yield the records of all shards of a kind, after checking that their files are there."""
        for shard in range(count):
            record = read_record(self.root, kind, shard)
            assert record is not None
            for name, expected in record.files.items():
                path = self.root / name
                size = path.stat().st_size if path.is_file() else None
                if size != expected.bytes:
                    found = "is gone" if size is None else f"has {size} bytes instead of {expected.bytes}"
                    raise CacheCorrupt(f"{path} {found}; `dit-cache verify` lists all damage")
            yield record

    def _name(self, row: int) -> str:
        return f"sample {self.samples['id'][row].as_py()!r} (row {row})"


def _check_shard(shard: int, count: int, what: str) -> None:
    if not 0 <= shard < count:
        raise CacheError(f"there is no {what} shard {shard}: there are {count}")


def _bytes(records: Iterable[Record]) -> int:
    return sum(file.bytes for record in records for file in record.files.values())
