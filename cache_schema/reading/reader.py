"""Reading a cache: whole batches of features in as few system calls as the request allows."""

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from cache_schema.encoding.number_formats import Array
from cache_schema.errors import CacheCorrupt, CacheError, CacheRequestError, CacheUnsealed
from cache_schema.format import layout
from cache_schema.format.damage import damaged
from cache_schema.format.journal import committed_shards, read_committed, read_record, record_name
from cache_schema.format.layout import ArrayLayout
from cache_schema.format.manifest import Manifest, TapInfo
from cache_schema.format.manifest_file import load_manifest
from cache_schema.format.samples import (
    MAX_SAMPLES_BYTES,
    check_against_manifest,
    count_usable,
    crop_boxes,
    parse_samples,
)
from cache_schema.reading.batch import TORCH_DTYPES, EncodedBatch, stored_batch
from cache_schema.reading.chunks import ChunkRequest, ChunkSource
from cache_schema.reading.image_reader import ImageReader
from cache_schema.reading.output import Buffer, output
from cache_schema.storage.folder import Folder
from cache_schema.storage.local import LocalFolder
from cache_schema.storage.streamed import reading_folder
from cache_schema.stores.calibration_files import load_channel, load_components

if TYPE_CHECKING:
    import webdataset
    import zarr


def open_cache(
    path: str | os.PathLike[str], allow_partial: bool = False, verify: bool = True, local_cache: str | None = None
) -> "Cache":
    """Open the cache at `path` for reading: a directory, or a URL (file, s3, gs, az, https, sftp, hf).

    Of one that is elsewhere, what a batch needs is fetched when it is read, and kept on a local disk up to
    `local_cache` ("50GB"; 10 GB by default, "0" keeps nothing), which all processes of the machine share. A part that
    was pulled on purpose (`manifest.provenance.pulled`) opens as what it is.

    With `verify`, every chunk and image is checked against its checksum in the journal as it is read: damage on a disk
    that is shared for months is then an error and not a slightly wrong feature. Reading from the page cache, the
    fastest there is, takes about a third longer with it; from a disk or a network it costs next to nothing. In
    caches that schema version 1 wrote, checksums are of whole rows: there, what is read of a part of a row (some of the
    timesteps, one of several views) is not checked.

    Raises CacheNotFound, CacheUnsealed (an unfinished cache, unless `allow_partial`), CacheCorrupt, UnsupportedSchema.
    """
    folder = reading_folder(path, local_cache)
    try:
        manifest = load_manifest(folder)
    except CacheCorrupt as error:
        raise CacheCorrupt(f"{error}; copy the cache here again, or build it anew in an empty directory") from error
    cache = Cache(folder, manifest, verify, local_cache)
    if not manifest.sealed and not allow_partial and manifest.provenance.pulled is None:
        raise CacheUnsealed(
            f"cache {folder} is not sealed: {cache.missing_samples} of {manifest.dataset.feature_rows} samples have no "
            "features yet",
            remedy="run the build again, it resumes, or read what is there with allow_partial=True",
            missing_samples=cache.missing_samples,
        )
    return cache


class Cache:
    """An open cache. It may be shared by threads, forked, and pickled; a copy opens its own files when first used.

    A partial cache is read as it was when it was opened: open it again to see what was built since.
    """

    def __init__(self, folder: Folder, manifest: Manifest, verify: bool = True, local_cache: str | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.verify = verify
        self.local_cache = local_cache
        self._calibrations: dict[str, torch.Tensor] = {}  # by tap, of all timesteps
        self._channels: dict[str, tuple[Array, torch.Tensor]] = {}  # by tap, of the timesteps last asked for
        self._components: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._layouts: dict[str, list[ArrayLayout]] = {}
        self._open_nothing()

    @property
    def root(self) -> Path:
        """The directory of the cache; raises CacheRequestError for one that is not in a directory of this machine."""
        if isinstance(self.folder, LocalFolder):
            return self.folder.path
        raise CacheRequestError(f"cache {self.folder} is not in a directory of this machine; pull it here first")

    def __reduce__(self) -> tuple[Any, ...]:
        return (open_cache, (self.folder.location, True, self.verify, self.local_cache))

    def __repr__(self) -> str:
        state = "sealed" if self.manifest.sealed else "partial"
        return f"<Cache {self.manifest.label} at {self.folder}: {len(self)} samples with features, {state}>"

    def __len__(self) -> int:
        """The number of samples that have features."""
        return len(self.feature_rows)

    @cached_property
    def samples(self) -> pa.Table:
        """The samples table: row i of it is row i of the features, if it has any, and of the images."""
        where = self.folder.where(layout.SAMPLES_NAME)
        try:
            data = read_committed(self.folder, "layout", layout.SAMPLES_NAME, MAX_SAMPLES_BYTES)
            if data is None:
                if not self.manifest.sealed:
                    raise CacheUnsealed(
                        f"cache {self.folder} has no samples table yet; run the build again, it resumes"
                    )
                raise CacheCorrupt(f"the journal of {self.folder} has no record of {layout.SAMPLES_NAME}")
            table = parse_samples(data, where)
            check_against_manifest(table, self.manifest)
        except CacheCorrupt as error:
            raise damaged(self.folder, error) from error
        except CacheUnsealed:
            raise
        except CacheError as error:
            raise damaged(self.folder, f"{where} is not that of this cache: {error}") from error
        return table

    @cached_property
    def crops(self) -> np.ndarray:
        """What the views `crop.k` show: (rows, K, 4) as (left, top, right, bottom) in fractions of the upright image.

        The same fractions of a student image show the same; NaN where an image is quarantined. K is 0 without crops.
        """
        count = self.manifest.crop_count
        return crop_boxes(self.samples) if count else np.zeros((len(self.samples), 0, 4))

    @cached_property
    def feature_rows(self) -> Sequence[int]:
        """The rows that have features, ascending: those that a partial cache lacks or the teacher failed on are not."""
        rows, per_shard = self.manifest.dataset.feature_rows, self.manifest.store.samples_per_shard
        built: Iterable[int] = range(rows)
        if self._built is not None:
            built = (row for shard in sorted(self._built) for row in layout.rows_of_shard(shard, per_shard, rows))
        elif not self._failed:
            return range(rows)
        # Rows are about to be listed, so the manifest's word for their number must be borne out.
        _ = self.samples
        return [row for row in built if row not in self._failed]

    @property
    def missing_samples(self) -> int:
        """The number of samples whose features are still to be built: none in a sealed cache."""
        rows, per_shard = self.manifest.dataset.feature_rows, self.manifest.store.samples_per_shard
        built = () if self._built is None else self._built
        return 0 if self._built is None else rows - sum(len(layout.rows_of_shard(k, per_shard, rows)) for k in built)

    def has_features(self, row: int) -> bool:
        """Say whether a row of the samples table has features in this cache."""
        if not 0 <= row < self.manifest.dataset.feature_rows or row in self._failed:
            return False
        return self._built is None or row // self.manifest.store.samples_per_shard in self._built

    @property
    def waits(self) -> bool:
        """Whether the last reads had to wait for a network or a disk, so that several batches are best read at once."""
        return self._opened.waits

    def read(
        self,
        rows: Sequence[int] | Array,
        tap: str = "hidden",
        timesteps: Sequence[int] | Array | None = None,
        view: int | str | Sequence[int] | Array = 0,
        out: Buffer | None = None,
    ) -> EncodedBatch:
        """Read the features of B samples at T timesteps (all of the cache's by default), still encoded.

        `timesteps` may be an array (B, T), each row's own. `view` is a view's number or name, or one number per row.
        `out`, a contiguous CPU tensor or NumPy array (B, T, L, C) of the stored type, receives the payload. Raises
        CacheRequestError for what the cache does not hold, CacheUnsealed for rows a partial cache lacks, CacheCorrupt,
        naming file, shard and sample, for damage.
        """
        info = self._tap(tap)
        samples = self._row_indices(rows, self.manifest.dataset.feature_rows, "features")
        steps = self._step_indices(timesteps, len(samples))
        each = steps.tolist() if steps.ndim == 2 else [steps.tolist()] * len(samples)
        views = self._view_indices(view, len(samples))
        self._check_built(samples)
        if tap not in self._layouts:
            self._layouts[tap] = layout.feature_layouts(self.manifest, info)
        parts: dict[str, torch.Tensor] = {}
        dtype = TORCH_DTYPES[self.manifest.encoding.kind]
        source = self._opened
        with source.noting():
            opened = source.open_at_once(self._layouts[tap], samples)
            for array in self._layouts[tap]:
                request = ChunkRequest(source, array, samples, views, each, opened)
                shape, payload = (len(samples), steps.shape[-1], *array.inner), array.part == "payload"
                tensor = output(out, shape, dtype) if payload else torch.empty(shape, dtype=torch.float32)
                request.read_into(tensor.reshape(-1).view(torch.uint8).numpy())
                parts[array.part] = tensor
        channel = self._channel(info, steps) if "scale" in parts else None
        return EncodedBatch(parts["payload"], parts.get("scale"), channel, self.manifest.encoding.kind)

    def restore(self, tap: str, features: torch.Tensor) -> torch.Tensor:
        """Return decoded features (..., C) of a tap in the teacher's channels (..., C_teacher), on the same device.

        Without PCA they are there already. What PCA left out is lost, and pooled tokens stay pooled. Raises
        CacheRequestError for a tap the cache lacks or another number of channels, CacheCorrupt.
        """
        info = self._tap(tap)
        if features.shape[-1:] != (info.channels,):
            raise CacheRequestError(f"features are {tuple(features.shape)}, tap {tap} has {info.channels} channels")
        if self.manifest.encoding.pca is None:
            return features
        if tap not in self._components:
            self._opened.same_build.check()
            try:
                stored = load_components(self.folder, self.manifest, info)
            except CacheCorrupt as error:
                raise damaged(self.folder, f"the components of tap {tap} cannot be used: {error}") from error
            parts = (torch.from_numpy(array) for array in (stored.amplitude, stored.mean, stored.basis))
            self._components[tap] = (next(parts), next(parts), next(parts))
        amplitude, mean, basis = (array.to(features) for array in self._components[tap])
        return (features @ basis + mean) * amplitude

    def decode(
        self, payload: Array, scale: Array | None = None, tap: str = "hidden", timesteps: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return the float32 features (..., T, L, C) that stored values stand for, as `read(...).decode()` gives them.

        `payload` (..., T, L, C) and, where the encoding is scaled, `scale` (..., T, L) are slices of `zarr(tap)` and
        `zarr(tap, "scale")` that keep the axis of the timesteps; `timesteps` says which of them, all by default.
        Raises CacheRequestError for values of another shape or type.
        """
        info, steps = self._tap(tap), self._timestep_indices(timesteps)
        channel = self._channel(info, np.array(steps)) if self.manifest.encoding.scaled else None
        shape = (len(steps), info.tokens, info.channels)
        return stored_batch(payload, scale, channel, self.manifest.encoding.kind, shape).decode()

    def zarr(self, tap: str = "hidden", part: str = "payload") -> "zarr.Array":
        """Return the values of a tap as they are stored, (N, V, T, L, C), as a read-only array of zarr-python.

        bfloat16 and float8 are bits in unsigned integers; `decode` makes features of slices, for which scaled encodings
        need the `part` "scale" (N, V, T, L) as well. Other parts are the statistics: "channel", "amplitude", "mean" and
        "basis" of PCA, "offset" and "factor" of massive channels. Rows without features are zeros (`has_features`), and
        checksums are not checked. Raises CacheRequestError for what the cache does not hold and for a cache of tars,
        CacheCorrupt.
        """
        from cache_schema.reading.interop import zarr_array

        return zarr_array(self.root, self.manifest, self._tap(tap).name, part)

    def webdataset(
        self,
        taps: Sequence[str] | None = None,
        timesteps: Sequence[int] | None = None,
        views: Sequence[int | str] | None = None,
        images: bool = True,
        **options: Any,
    ) -> "webdataset.WebDataset":
        """Return the samples that have features, in the order of the rows, as a pipeline of webdataset to go on from.

        A sample is a dict: `id`, `label`, `split`, `row`, under the name of each of the `taps` its features, decoded,
        float32 (V, T, L, C), and with `images` under `jpg`, `png` or `webp` the bytes of its image, where the cache has
        them. All taps, `timesteps` and `views` by default. `options` (`shardshuffle`, `nodesplitter`, …) go to
        `webdataset.WebDataset`; shuffling and batching are its methods. Checksums are not checked. Raises
        CacheRequestError for what the cache does not hold, for one in a Zarr store, and where webdataset is missing.
        """
        from cache_schema.reading.interop import sample_pipeline

        names = [tap.name for tap in self.manifest.taps] if taps is None else [self._tap(name).name for name in taps]
        numbers = [self._view_indices(view, 1)[0] for view in (self.manifest.views if views is None else views)]
        self._timestep_indices(timesteps)
        return sample_pipeline(self, names, timesteps, numbers, images, options)

    def images(self, rows: Sequence[int] | Array) -> list[bytes]:
        """Return the encoded student images of the given rows, each by one read of just its bytes."""
        if self.manifest.images is None:
            raise CacheRequestError(f"cache {self.manifest.label} was built without images")
        wanted = self._row_indices(rows, self._image_count, "an image")
        if self._opened.distant:
            return self._image_reader.read_at_once(wanted)
        return [self._image_reader.read(row) for row in wanted]

    @cached_property
    def _built(self) -> set[int] | None:
        """The feature shards that a partial cache had when this was first asked; None if the cache is sealed."""
        return None if self.manifest.sealed else committed_shards(self.folder, "features")

    @cached_property
    def _failed(self) -> frozenset[int]:
        """The rows that the teacher failed on."""
        if self._built is None:
            return frozenset(self.manifest.failed_rows)
        records = (read_record(self.folder, "features", shard) for shard in self._built)
        return frozenset(item.row for record in records if record is not None for item in record.failed)

    @cached_property
    def _image_count(self) -> int:
        return count_usable(self.samples)

    @property
    def _opened(self) -> ChunkSource:
        if self._pid != os.getpid():
            # Another thread may have held a lock at the moment of the fork.
            self._open_nothing()
        return self._source

    def _open_nothing(self) -> None:
        self._pid = os.getpid()
        self._source = ChunkSource(self.folder, self.manifest, self.verify)
        self._image_reader = ImageReader(self._source, lambda: self._image_count)

    def _tap(self, name: str) -> TapInfo:
        info = self.manifest.tap(name)
        if info is None:
            names = ", ".join(tap.name for tap in self.manifest.taps)
            raise CacheRequestError(f"cache {self.manifest.label} lacks tap {name} (has {names}); rebuild with it")
        return info

    def _timestep_indices(self, timesteps: Sequence[int] | Array | None) -> list[int]:
        have = self.manifest.curriculum.timesteps
        if timesteps is None:
            return list(range(len(have)))
        lacking = [step for step in timesteps if step not in have]
        if lacking:
            raise CacheRequestError(
                f"cache {self.manifest.label} lacks timestep {lacking[0]} (has {', '.join(map(str, have))})",
                remedy="build one that has it as well",
                timesteps=sorted({*have, *lacking}),
            )
        return [have.index(step) for step in timesteps]

    def _step_indices(self, timesteps: Sequence[int] | Array | None, count: int) -> Array:
        """Indices of timesteps, (T,); of each row's own, (count, T)."""
        if not isinstance(timesteps, np.ndarray) or timesteps.ndim != 2:
            return np.array(self._timestep_indices(timesteps), dtype=np.int64)
        if len(timesteps) != count:
            raise CacheRequestError(f"{count} rows need the timesteps of {count}, not of {len(timesteps)}")
        return np.array(self._timestep_indices(timesteps.ravel().tolist()), dtype=np.int64).reshape(timesteps.shape)

    def _view_indices(self, view: int | str | Sequence[int] | Array, count: int) -> list[int]:
        names = self.manifest.views
        if isinstance(view, int) and 0 <= view < len(names):
            return [view] * count
        if isinstance(view, str):
            if view not in names:
                raise CacheRequestError(f"cache {self.manifest.label} lacks view {view} (has {', '.join(names)})")
            view = names.index(view)
        indices = np.asarray(view, dtype=np.int64)
        if indices.shape not in ((), (count,)):
            raise CacheRequestError(f"{count} rows need one view or {count}, not {indices.shape}")
        if indices.size and (indices.min() < 0 or indices.max() >= len(names)):
            raise CacheRequestError(f"cache {self.manifest.label} has the views 0 to {len(names) - 1}")
        return [int(indices)] * count if indices.ndim == 0 else indices.tolist()

    def _row_indices(self, rows: Sequence[int] | Array, limit: int, what: str) -> list[int]:
        indices = np.asarray(rows)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise CacheRequestError("rows must be a sequence of row numbers")
        listed: list[int] = indices.tolist()
        if listed and (min(listed) < 0 or max(listed) >= limit):
            row = next(row for row in listed if not 0 <= row < limit)
            raise CacheRequestError(
                f"row {row} of cache {self.manifest.label} does not have {what}: rows 0 to {limit - 1} do"
            )
        return listed

    def _check_built(self, rows: list[int]) -> None:
        if self._built is None and not self._failed:
            return
        for row in rows:
            if row in self._failed:
                record = record_name("features", row // self.manifest.store.samples_per_shard)
                raise CacheRequestError(
                    f"sample {self.samples['id'][row].as_py()!r} (row {row}) of cache {self.manifest.label} has no "
                    f"features: the teacher failed on it, {record} says how; leave it out (Cache.has_features)"
                )
            if not self.has_features(row):
                raise CacheUnsealed(f"row {row} of {self.folder} has no features yet; run the build again, it resumes")

    def _channel(self, tap: TapInfo, steps: Array) -> torch.Tensor:
        """Return a tap's calibration at some timesteps; batches that ask for the same ones get the same tensor."""
        known = self._channels.get(tap.name)
        if known is not None and np.array_equal(known[0], steps):
            return known[1]
        if tap.name not in self._calibrations:
            try:
                stored = torch.from_numpy(load_channel(self.folder, self.manifest, tap))
            except CacheCorrupt as error:
                raise damaged(self.folder, f"the calibration of tap {tap.name} cannot be used: {error}") from error
            self._calibrations[tap.name] = stored
        channel = self._calibrations[tap.name][torch.from_numpy(steps)]
        self._channels[tap.name] = steps, channel
        return channel
