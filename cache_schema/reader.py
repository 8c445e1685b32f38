"""Reading a cache: whole batches of features in as few system calls as the request allows."""

import itertools
import os
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cache_schema import layout
from cache_schema.batch import EncodedBatch
from cache_schema.codec import load_channel, load_components
from cache_schema.compression import decompress
from cache_schema.encoding import Array
from cache_schema.errors import CacheCorrupt, CacheError, CacheRequestError, CacheUnsealed
from cache_schema.images import load_index
from cache_schema.journal import committed_shards, read_record, record_name
from cache_schema.layout import ArrayLayout
from cache_schema.manifest import Manifest, TapInfo
from cache_schema.manifest_file import load_manifest
from cache_schema.open_shards import OpenFile, OpenShards
from cache_schema.samples import check_against_manifest, count_usable, load_samples
from cache_schema.shard import chunk_bytes
from cache_schema.stores import store_of

Buffer = torch.Tensor | np.ndarray[Any, np.dtype[Any]]

_TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float8_e4m3": torch.float8_e4m3fn,
}
# NumPy has neither bfloat16 nor float8: their bits travel as unsigned integers.
_NUMPY_BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}


def open_cache(path: str | os.PathLike[str], allow_partial: bool = False) -> "Cache":
    """Open the cache at `path` (a directory or a file:// URL) for reading.

    Raises CacheNotFound, CacheUnsealed (an unfinished cache, unless `allow_partial`), CacheCorrupt, UnsupportedSchema.
    """
    root = local_path(path)
    manifest = load_manifest(root)
    if not manifest.sealed and not allow_partial:
        done = len(committed_shards(root, "features"))
        raise CacheUnsealed(
            f"cache {root} is not complete ({done} of {manifest.store.feature_shards} feature shards); run the build "
            "again, it resumes, or open what is there with allow_partial"
        )
    return Cache(root, manifest)


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return the local directory that a path or a file:// URL names; other URLs raise CacheError."""
    text = os.fspath(path)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    elif "://" in text:
        raise CacheError(f"{text} is not a local directory; copy the cache here and open the copy")
    return Path(text)


class Cache:
    """An open cache. It may be shared by threads, forked, and pickled; a copy opens its own files when first used.

    A partial cache is read as it was when it was opened: open it again to see what was built since.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest
        self._store = store_of(manifest)
        self._shards = OpenShards()
        self._pid = os.getpid()
        self._channels: dict[str, torch.Tensor] = {}
        self._components: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._image_offsets: dict[int, Array] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (open_cache, (str(self.root.absolute()), True))

    def __repr__(self) -> str:
        state = "sealed" if self.manifest.sealed else "partial"
        return f"<Cache {self.manifest.label} at {self.root}: {len(self)} samples with features, {state}>"

    def __len__(self) -> int:
        """The number of samples that have features."""
        return len(self.feature_rows)

    @cached_property
    def samples(self) -> pa.Table:
        """The samples table: row i of it is row i of the features, if it has any, and of the images."""
        table = load_samples(self.root / layout.SAMPLES_NAME)
        try:
            check_against_manifest(table, self.manifest)
        except CacheError as error:
            raise CacheCorrupt(f"{self.root / layout.SAMPLES_NAME} is not that of this cache: {error}") from error
        return table

    @cached_property
    def feature_rows(self) -> Sequence[int]:
        """The rows that have features, ascending: those that a partial cache lacks or the teacher failed on are not."""
        rows, per_shard = self.manifest.dataset.feature_rows, self.manifest.store.samples_per_shard
        built: Iterable[int] = range(rows)
        if self._built is not None:
            built = (row for shard in sorted(self._built) for row in layout.rows_of_shard(shard, per_shard, rows))
        elif not self._failed:
            return range(rows)
        return [row for row in built if row not in self._failed]

    def has_features(self, row: int) -> bool:
        """Say whether a row of the samples table has features in this cache."""
        if not 0 <= row < self.manifest.dataset.feature_rows or row in self._failed:
            return False
        return self._built is None or row // self.manifest.store.samples_per_shard in self._built

    def read(
        self,
        rows: Sequence[int] | Array,
        tap: str = "hidden",
        timesteps: Sequence[int] | None = None,
        view: int | str | Sequence[int] | Array = 0,
        out: Buffer | None = None,
    ) -> EncodedBatch:
        """Read the features of B samples at T timesteps (all of the cache's by default), still encoded.

        `view` is a view's number or name, or one number per row. `out`, a contiguous CPU tensor or NumPy array
        (B, T, L, C) of the stored type, receives the payload. Raises CacheRequestError for what the cache does not
        hold, CacheUnsealed for rows a partial cache lacks, CacheCorrupt for damaged files.
        """
        info = self._tap(tap)
        steps = self._timestep_indices(timesteps)
        samples = self._row_indices(rows, self.manifest.dataset.feature_rows, "features")
        views = self._view_indices(view, len(samples))
        self._check_built(samples)
        payload: torch.Tensor | None = None
        scale: torch.Tensor | None = None
        for array in layout.feature_layouts(self.manifest, info):
            places = self._locate(array, samples, views, steps)
            shape = (len(samples), len(steps), *array.inner)
            if array.part == "payload":
                payload = self._output(out, shape)
                self._fill(array, places, payload)
            else:
                scale = torch.empty(shape, dtype=torch.float32)
                self._fill(array, places, scale)
        assert payload is not None
        channel = None if scale is None else self._channel(info)[steps]
        return EncodedBatch(payload, scale, channel, self.manifest.encoding.kind)

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
            stored = load_components(self.root, self.manifest, info)
            parts = (torch.from_numpy(array) for array in (stored.amplitude, stored.mean, stored.basis))
            self._components[tap] = (next(parts), next(parts), next(parts))
        amplitude, mean, basis = (array.to(features) for array in self._components[tap])
        return (features @ basis + mean) * amplitude

    def images(self, rows: Sequence[int] | Array) -> list[bytes]:
        """Return the encoded student images of the given rows, each by one read of just its bytes."""
        if self.manifest.images is None:
            raise CacheRequestError(f"cache {self.manifest.label} was built without images")
        images = []
        for row in self._row_indices(rows, self._image_count, "an image").tolist():
            shard, local = divmod(row, self.manifest.store.images_per_shard)
            offset, size = (int(value) for value in self._offsets(shard)[local])
            file = self._files.file(f"{self.root}/{layout.image_file(shard)}")
            if offset < 0 or size < 0 or offset + size > file.size:
                raise CacheCorrupt(f"the image of row {row} is not inside {file.path}; run `dit-cache verify`")
            images.append(file.read(offset, size))
        return images

    @cached_property
    def _built(self) -> set[int] | None:
        """The feature shards that a partial cache had when this was first asked; None if the cache is sealed."""
        return None if self.manifest.sealed else committed_shards(self.root, "features")

    @cached_property
    def _failed(self) -> frozenset[int]:
        """The rows that the teacher failed on."""
        if self._built is None:
            return frozenset(self.manifest.failed_rows)
        records = (read_record(self.root, "features", shard) for shard in self._built)
        return frozenset(item.row for record in records if record is not None for item in record.failed)

    @cached_property
    def _image_count(self) -> int:
        return count_usable(self.samples)

    @property
    def _files(self) -> OpenShards:
        if self._pid != os.getpid():
            # Another thread may have held the lock at the moment of the fork.
            self._pid, self._shards = os.getpid(), OpenShards()
        return self._shards

    def _tap(self, name: str) -> TapInfo:
        info = self.manifest.tap(name)
        if info is None:
            names = ", ".join(tap.name for tap in self.manifest.taps)
            raise CacheRequestError(f"cache {self.manifest.label} lacks tap {name} (has {names}); rebuild with it")
        return info

    def _timestep_indices(self, timesteps: Sequence[int] | None) -> list[int]:
        have = self.manifest.curriculum.timesteps
        if timesteps is None:
            return list(range(len(have)))
        lacking = [step for step in timesteps if step not in have]
        if lacking:
            wanted = ",".join(str(step) for step in sorted({*have, *lacking}))
            raise CacheRequestError(
                f"cache {self.manifest.label} lacks timestep {lacking[0]} (has {', '.join(map(str, have))}); "
                f"rebuild with --timesteps {wanted}"
            )
        return [have.index(step) for step in timesteps]

    def _view_indices(self, view: int | str | Sequence[int] | Array, count: int) -> Array:
        names = self.manifest.views
        if isinstance(view, str):
            if view not in names:
                raise CacheRequestError(f"cache {self.manifest.label} lacks view {view} (has {', '.join(names)})")
            view = names.index(view)
        indices = np.asarray(view, dtype=np.int64)
        if indices.shape not in ((), (count,)):
            raise CacheRequestError(f"{count} rows need one view or {count}, not {indices.shape}")
        if indices.size and (indices.min() < 0 or indices.max() >= len(names)):
            raise CacheRequestError(f"cache {self.manifest.label} has the views 0 to {len(names) - 1}")
        return np.broadcast_to(indices, (count,))

    def _row_indices(self, rows: Sequence[int] | Array, limit: int, what: str) -> Array:
        indices = np.asarray(rows)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise CacheRequestError("rows must be a sequence of row numbers")
        indices = indices.astype(np.int64)
        outside = indices[(indices < 0) | (indices >= limit)]
        if outside.size:
            raise CacheRequestError(
                f"row {outside[0]} of cache {self.manifest.label} does not have {what}: rows 0 to {limit - 1} do"
            )
        return indices

    def _check_built(self, rows: Array) -> None:
        if self._built is None and not self._failed:
            return
        for row in rows.tolist():
            if row in self._failed:
                record = record_name("features", row // self.manifest.store.samples_per_shard)
                raise CacheRequestError(
                    f"sample {self.samples['id'][row].as_py()!r} (row {row}) of cache {self.manifest.label} has no "
                    f"features: the teacher failed on it, {record} says how; leave it out (Cache.has_features)"
                )
            if not self.has_features(row):
                raise CacheUnsealed(f"row {row} of {self.root} has no features yet; run the build again, it resumes")

    def _output(self, out: Buffer | None, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = _TORCH_DTYPES[self.manifest.encoding.kind]
        if out is None:
            return torch.empty(shape, dtype=dtype)
        if isinstance(out, np.ndarray):
            if not out.flags.writeable:
                raise CacheRequestError("out is read-only")
            tensor = torch.from_numpy(out)
            tensor = tensor.view(dtype) if tensor.dtype == _NUMPY_BITS.get(dtype) else tensor
        else:
            tensor = out
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise CacheRequestError(f"out is {tuple(tensor.shape)} {tensor.dtype}, the batch is {shape} {dtype}")
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise CacheRequestError("out must be contiguous and in CPU memory")
        return tensor

    def _locate(self, array: ArrayLayout, rows: Array, views: Array, steps: list[int]) -> "_Places":
        """Find every chunk asked for before any memory is set aside for it, so that a lying index costs none."""
        offsets = np.empty((len(rows), len(steps)), dtype=np.int64)
        lengths = np.empty_like(offsets)
        shards, inverse = np.unique(rows // array.samples_per_shard, return_inverse=True)
        files = []
        for number, shard in enumerate(shards.tolist()):
            file = self._files.file(f"{self.root}/{self._store.array_file(array, shard)}")
            parse = partial(self._store.read_index, array=array, shard=shard)
            index = self._files.index(file, array.name, parse)
            files.append(file)
            mine = np.flatnonzero(inverse == number)
            place = (rows[mine, None] % array.samples_per_shard, views[mine, None], steps)
            offsets[mine], lengths[mine] = index.offsets[place], index.lengths[place]
            if (offsets[mine] < 0).any():
                row = rows[mine][(offsets[mine] < 0).any(axis=1)][0]
                raise CacheCorrupt(f"{file.path} lacks the features of row {row}; run `dit-cache verify`")
        return _Places(files, np.repeat(inverse, len(steps)), offsets.reshape(-1), lengths.reshape(-1))

    def _fill(self, array: ArrayLayout, places: "_Places", tensor: torch.Tensor) -> None:
        """Read the located chunks into a tensor, neighbours in the file with one system call."""
        if not places.offsets.size:
            return
        target: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        size = chunk_bytes(array)
        view = memoryview(target)
        for first, last in places.runs():
            file, offset = places.files[places.owners[first]], int(places.offsets[first])
            if array.compression == "none":
                file.read_into(view[first * size : last * size], offset)
                continue
            data = memoryview(file.read(offset, int(places.lengths[first:last].sum())))
            for chunk in range(first, last):
                start = int(places.offsets[chunk]) - offset
                frame = bytes(data[start : start + int(places.lengths[chunk])])
                decompress(frame, target[chunk * size : (chunk + 1) * size], array.compression, str(file.path))

    def _channel(self, tap: TapInfo) -> torch.Tensor:
        channel = self._channels.get(tap.name)
        if channel is None:
            channel = torch.from_numpy(load_channel(self.root, self.manifest, tap))
            self._channels[tap.name] = channel
        return channel

    def _offsets(self, shard: int) -> Array:
        """Return where the images of a shard are, int64 (rows, 2)."""
        per_shard = self.manifest.store.images_per_shard
        if shard not in self._image_offsets:
            if self.manifest.sealed:
                table = load_index(self.root / layout.IMAGE_INDEX_NAME, self._image_count)
                for number in range(self.manifest.store.image_shards):
                    self._image_offsets[number] = table[number * per_shard : (number + 1) * per_shard]
            else:
                record = read_record(self.root, "images", shard)
                if record is None:
                    raise CacheUnsealed(f"image shard {shard} of {self.root} is not built yet")
                self._image_offsets[shard] = np.array(record.offsets, dtype=np.int64).reshape(-1, 2)
        return self._image_offsets[shard]


class _Places:
    """The file (by number), offset and length of every chunk of a request, in the order of the output."""

    def __init__(self, files: list[OpenFile], owners: Array, offsets: Array, lengths: Array) -> None:
        self.files, self.owners, self.offsets, self.lengths = files, owners, offsets, lengths

    def runs(self) -> list[tuple[int, int]]:
        """Group chunks that follow each other both in the output and in one file, as [first, last) ranges."""
        follows = (self.offsets[1:] == self.offsets[:-1] + self.lengths[:-1]) & (self.owners[1:] == self.owners[:-1])
        edges = np.flatnonzero(~follows) + 1
        bounds = [0, *edges.tolist(), len(self.offsets)]
        return list(itertools.pairwise(bounds))
