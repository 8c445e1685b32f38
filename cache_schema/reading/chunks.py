"""The chunks of one array that a batch asks for: located first, then read, and checked while they are in a CPU cache.

The loops over rows are plain Python on purpose: a batch has tens of rows, for which NumPy's fixed costs are the larger.
"""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from cache_schema.encoding.number_formats import Array
from cache_schema.errors import CacheCorrupt
from cache_schema.format import layout
from cache_schema.format.damage import damaged, view_and_timestep
from cache_schema.format.journal import Kind, Record, read_record, record_name
from cache_schema.format.layout import ArrayLayout
from cache_schema.format.manifest import Manifest
from cache_schema.reading.fetching import at_once, fetched, stretches
from cache_schema.reading.open_shards import Checksums, ChunkPlaces, OpenShard, OpenShards
from cache_schema.reading.same_build import SameBuild
from cache_schema.reading.waiting import SIDE_BY_SIDE, DiskPace, FetchingPace
from cache_schema.storage.checksum import combine_crc32c, crc32c
from cache_schema.storage.folder import Folder, ReadableFile
from cache_schema.storage.local import LocalFolder
from cache_schema.storage.remote import requests
from cache_schema.storage.streamed import StreamedFile, StreamedFolder
from cache_schema.stores.base import PieceChecksums
from cache_schema.stores.compression import decompress
from cache_schema.stores.registry import store_of
from cache_schema.stores.shard import chunk_bytes

# What is read before it is checked: small enough to stay in a core's own cache, large enough for few system calls.
_BLOCK = 1 << 20

# Chunks that follow each other in one shard file and in the output: (shard, first, count, offset, size, out) with the
# number there of the first one, how many, where their bytes are, and the number of the first one in the output.
# A plain tuple, always taken apart by these names: there is one a row, and NamedTuples take ten times as long to make,
# a tenth of the time that reading a batch of small samples takes.
_Run = tuple[OpenShard, int, int, int, int, int]


class ChunkRequest:
    """The chunks (row, view, step) of an array, for every row with its view and for it every step, in that order.

    `steps` holds those of each row, as many of one as of another. Making one locates all chunks, so that an index that
    lies costs no memory. Raises CacheCorrupt, naming the file, the shard and the sample, for damage in what is asked
    for.
    """

    def __init__(
        self,
        source: "ChunkSource",
        array: ArrayLayout,
        rows: Sequence[int],
        views: Sequence[int],
        steps: Sequence[Sequence[int]],
        opened: Mapping[tuple[str, int], OpenShard] = MappingProxyType({}),
    ) -> None:
        """`opened`: shards that are open already."""
        self._source, self._array, self._opened = source, array, opened
        self._rows, self._views, self._steps = rows, views, steps
        self._shards: list[OpenShard] = []
        self._runs = self._locate()

    def read_into(self, target: Array) -> None:
        """Read and check the chunks into `target`, uint8, as long as all of them."""
        if not self._source.distant:
            self._read_from_disk(self._runs, target)
            return
        try:
            if self._read_kept(target):
                return
        except CacheCorrupt:
            self._forget(self._runs)
        for part in stretches([run[4] for run in self._runs]):
            runs = self._runs[part.start : part.stop]
            try:
                self._read_fetched(runs, target)
            except CacheCorrupt:
                # What a line or a local disk garbled is right when it is fetched again; what is wrong there is not.
                self._forget(runs)
                self._read_fetched(runs, target)

    def _forget(self, runs: list[_Run]) -> None:
        for file in {id(run[0].file): run[0].file for run in runs}.values():
            self._source.forget(file)

    def _read_kept(self, target: Array) -> bool:
        """Read what lies whole in the local copy, as files here are read; say whether it does."""
        kept: list[StreamedFile] = []
        try:
            for shard in self._shards:
                file = shard.file
                if not isinstance(file, StreamedFile):
                    return False
                if not file.keep(run[3:5] for run in self._runs if run[0] is shard):
                    return False
                kept.append(file)
            self._read_from_disk(self._runs, target)
            return True
        finally:
            for file in kept:
                file.let_go()

    def _read_fetched(self, runs: list[_Run], target: Array) -> None:
        """Fetch runs at once, and read and check them where they arrive."""
        by_shard: dict[int, list[_Run]] = {}
        for run in runs:
            by_shard.setdefault(id(run[0]), []).append(run)
        wanted: list[Any] = [(some[0][0].file, [run[3:5] for run in some]) for some in by_shard.values()]
        with ExitStack() as stack:
            try:
                stretches_here: list[Any] = stack.enter_context(fetched(wanted))
            except CacheCorrupt as error:
                raise self._damage(error, runs[0][5]) from error
            here: list[_Run] = []
            for some, stretch in zip(by_shard.values(), stretches_here, strict=True):
                shard = replace(some[0][0], file=stretch)
                here += [(shard, *run[1:]) for run in some]
            self._read_runs(here, target)

    def _read_from_disk(self, runs: list[_Run], target: Array) -> None:
        """Read and check runs of files here: where threads have to wait for a disk, several of them wait together."""
        with self._source.pace.over(len(target), len(runs)):
            threads = SIDE_BY_SIDE if self._source.pace.slow else 1
            shares = [runs[i::threads] for i in range(threads)]
            at_once(lambda share: self._read_runs(share, target), [share for share in shares if share])

    def _read_runs(self, runs: list[_Run], target: Array) -> None:
        if self._array.compression != "none":
            for run in runs:
                self._decompress_run(run, target)
            return
        each, view = chunk_bytes(self._array), target.data
        for run in runs:
            shard, first, count, offset, size, out = run
            at, checksums = out * each, shard.checksums
            if checksums is not None and (size > _BLOCK or shard.piece != 1):
                self._read_blocks(run, target)
                continue
            self._read(shard.file, view[at : at + size], offset, out)
            if checksums is None or self._is_intact(shard, first, count, view[at : at + size]):
                continue
            for chunk in range(count):
                if crc32c(view[at : at + each]) != checksums[first + chunk]:
                    raise self._mismatch(shard, out + chunk)
                at += each

    def _is_intact(self, shard: OpenShard, first: int, count: int, data: memoryview) -> bool:
        """Say whether these are all timesteps of a row and view, and what was written: one checksum instead of many."""
        joint, T = shard.joint_checksums, self._array.outer[2]
        return joint is not None and count == T and first % T == 0 and crc32c(data) == joint[first // T]

    def _locate(self) -> list[_Run]:
        per_shard, (_, V, T) = self._array.samples_per_shard, self._array.outer
        opened: dict[int, OpenShard] = {}
        runs: list[_Run] = []
        out, before, segments = 0, None, []
        for row, view, steps in zip(self._rows, self._views, self._steps, strict=True):
            if steps is not before:  # mostly, all rows have the same ones
                before, segments = steps, _consecutive(steps)
            number, local = divmod(row, per_shard)
            shard = opened.get(number)
            if shard is None:
                shard = opened[number] = self._open(number, out)
            places, chunk = shard.places, (local * V + view) * T
            for step, count in segments:
                if places.offsets is None:
                    if local >= places.rows:
                        raise self._damage(f"{shard.file.path} lacks the features", out)
                    start = places.start + local * places.row + (view * T + step) * places.chunk
                    runs.append((shard, chunk + step, count, start, count * places.chunk, out))
                else:
                    runs += self._listed(shard, chunk + step, count, out)
                out += count
        self._shards = list(opened.values())
        return _joined(runs)

    def _listed(self, shard: OpenShard, first: int, count: int, out: int) -> list[_Run]:
        """Locate chunks one by one in the tables of their shard."""
        offsets, lengths = shard.places.offsets, shard.places.lengths
        assert offsets is not None
        assert lengths is not None
        for chunk in range(first, first + count):
            if offsets[chunk] < 0:
                raise self._damage(f"{shard.file.path} lacks the features", out + chunk - first)
        return [(shard, first + i, 1, offsets[first + i], lengths[first + i], out + i) for i in range(count)]

    def _open(self, number: int, out: int) -> OpenShard:
        found = self._opened.get((self._array.name, number))
        try:
            return found or self._source.open_shard(self._array, number)
        except CacheCorrupt as error:
            raise self._damage(error, out) from error

    def _read_blocks(self, run: _Run, target: Array) -> None:
        """Read a run in blocks that end where pieces do, and check each block while it is in a CPU cache."""
        shard, first, count, offset, size, out = run
        each, piece = size // count, shard.piece
        block = max(1, _BLOCK // (each * piece)) * piece
        while count:
            taken = min(count, block - first % piece)
            at = out * each
            self._read(shard.file, target[at : at + taken * each].data, offset, out)
            for start in range(-first % piece, taken - piece + 1, piece):
                begin = at + start * each
                self._check(shard, first + start, target[begin : begin + piece * each], out + start)
            first, count, out, offset = first + taken, count - taken, out + taken, offset + taken * each

    def _decompress_run(self, run: _Run, target: Array) -> None:
        shard, first, count, offset, size, out = run
        lengths, each = shard.places.lengths, chunk_bytes(self._array)
        assert lengths is not None
        data = np.empty(size, dtype=np.uint8)
        self._read(shard.file, data.data, offset, out)
        edges = [0, *itertools.accumulate(lengths[chunk] for chunk in range(first, first + count))]
        for start in range(-first % shard.piece, count - shard.piece + 1, shard.piece):
            self._check(shard, first + start, data[edges[start] : edges[start + shard.piece]], out + start)
        for i in range(count):
            try:
                frame = data[edges[i] : edges[i + 1]].tobytes()
                place = target[(out + i) * each : (out + i + 1) * each]
                decompress(frame, place, self._array.compression, shard.file.path)
            except CacheCorrupt as error:
                raise self._damage(error, out + i) from error

    def _read(self, file: ReadableFile, view: memoryview, offset: int, out: int) -> None:
        try:
            file.read_into(view, offset)
        except CacheCorrupt as error:
            raise self._damage(error, out) from error

    def _check(self, shard: OpenShard, first: int, data: Array, out: int) -> None:
        if shard.checksums is not None and crc32c(data) != shard.checksums[first // shard.piece]:
            raise self._mismatch(shard, out)

    def _mismatch(self, shard: OpenShard, out: int) -> CacheCorrupt:
        return self._damage(f"{shard.file.path} is damaged: it does not match its checksum", out)

    def _damage(self, reason: object, out: int) -> CacheCorrupt:
        """Return the error for what a chunk, given by its place in the output, should have come from."""
        index, step = divmod(out, len(self._steps[0]))
        row = self._rows[index]
        more = view_and_timestep(self._source.manifest, self._views[index], self._steps[index][step])
        return damaged(self._source.folder, reason, row // self._array.samples_per_shard, row, more)


def _consecutive(steps: Sequence[int]) -> list[tuple[int, int]]:
    """Group steps that follow each other: (first, how many)."""
    segments: list[tuple[int, int]] = []
    for step in steps:
        if segments and step == sum(segments[-1]):
            segments[-1] = (segments[-1][0], segments[-1][1] + 1)
        else:
            segments.append((step, 1))
    return segments


def _joined(runs: list[_Run]) -> list[_Run]:
    """Join runs that follow each other in their file."""
    joined: list[_Run] = []
    for run in runs:
        if joined:
            shard, first, count, offset, size, out = joined[-1]
            next_shard, next_first, more, next_offset, more_bytes, _ = run
            if next_offset == offset + size and next_shard is shard and next_first == first + count:
                joined[-1] = (shard, first, count + more, offset, size + more_bytes, out)
                continue
        joined.append(run)
    return joined


def _joint_checksums(checksums: memoryview, count: int, size: int) -> memoryview:
    """Return the CRC-32C of every `count` chunks of `size` bytes together, from those of the chunks."""
    joint = checksums[::count].tolist()
    for i in range(1, count):
        joint = [combine_crc32c(*pair, size) for pair in zip(joint, checksums[i::count], strict=True)]
    return np.array(joint, dtype=np.uint32).data


class ChunkSource:
    """The shards of one cache, opened with their checksums if what is read shall be checked."""

    def __init__(self, folder: Folder, manifest: Manifest, verify: bool) -> None:
        self.folder, self.manifest, self.verify = folder, manifest, verify
        self.distant = not isinstance(folder, LocalFolder)
        self.opened = OpenShards(folder)
        self.pace = DiskPace()
        kept = folder.blocks_here if isinstance(folder, StreamedFolder) else None
        self._fetching = None if kept is None else FetchingPace(lambda: kept.fetched)
        self._store = store_of(manifest)
        self.same_build = SameBuild(folder, manifest)

    def open_at_once(self, arrays: Sequence[ArrayLayout], rows: Sequence[int]) -> dict[tuple[str, int], OpenShard]:
        """Return the shards of distant arrays that rows lie in, opened side by side: each takes several answers.

        One that cannot be opened is left out, for whoever knows what it was asked for to find the same. Raises
        CacheCorrupt where there is another build by now.
        """
        if not self.distant:
            return {}
        found: dict[tuple[str, int], OpenShard] = {}
        new: list[tuple[ArrayLayout, int]] = []
        for array in arrays:
            for number in {row // array.samples_per_shard for row in rows}:
                known = self.opened.shards.get((array.name, number))
                if known is None:
                    new.append((array, number))
                else:
                    found[array.name, number] = known

        def open_one(each: tuple[ArrayLayout, int]) -> OpenShard | None:
            with suppress(CacheCorrupt):
                return self.open_shard(*each)
            return None

        try:
            same = requests().submit(self.same_build.check) if new else None
            shards = at_once(open_one, new)
            if same is not None:
                same.result()
        except BaseException:
            self.opened = OpenShards(self.folder)  # of those open by now, some may be another build's
            raise
        opened = zip(new, shards, strict=True)
        return found | {(array.name, number): shard for (array, number), shard in opened if shard is not None}

    def open_shard(self, array: ArrayLayout, number: int) -> OpenShard:
        """Return a shard of an array, open; raises CacheCorrupt."""
        known = self.opened.shards.get((array.name, number))
        if known is not None:
            return known
        # What the journal says is asked for meanwhile, where that takes an answer.
        record = requests().submit(self.checksums, "features", number, array.name) if self._asks else None
        file = self.opened.file(self._store.array_file(array, number))

        def read_places(opened: ReadableFile) -> ChunkPlaces:
            try:
                return self._read_places(opened, array, number)
            except CacheCorrupt:
                if not self.distant:
                    raise
                self.forget(opened)
                return self._read_places(opened, array, number)

        places = self.opened.places(file, array.name, read_places)
        checksums: memoryview | None = None
        piece = 1
        if self.verify:
            checksums, piece = record.result() if record else self.checksums("features", number, array.name)
        joint, T, size = None, array.outer[2], chunk_bytes(array)
        if checksums is not None and piece == 1 and T > 1 and T * size <= _BLOCK and array.compression == "none":
            joint = _joint_checksums(checksums, T, size)
        shard = OpenShard(file, places, checksums, piece, joint)
        return self.opened.shards.put((array.name, number), shard, places.nbytes + (joint.nbytes if joint else 0))

    @property
    def _asks(self) -> bool:
        return self.distant and self.verify

    @property
    def waits(self) -> bool:
        """Whether the last reads had to wait for a network or a disk."""
        return self.pace.from_disk or (self.distant and (self._fetching is None or self._fetching.fetching))

    def noting(self) -> AbstractContextManager[None]:
        """Note whether what is read meanwhile has to be fetched."""
        return nullcontext() if self._fetching is None else self._fetching.over()

    def forget(self, file: ReadableFile) -> None:
        """Have a distant file that is not what it should be fetched again."""
        if isinstance(file, StreamedFile):
            file.forget()

    def checksums(self, kind: Kind, shard: int, name: str) -> PieceChecksums:
        """Return the checksums of an array's shard, or of an image tar, as the journal has them."""
        load = self._read_feature_checksums if kind == "features" else self._read_image_checksums
        known = self.opened.checksums(kind, shard, lambda: load(self._record(kind, shard)))
        if name not in known:
            raise CacheCorrupt(f"{self.folder.where(record_name(kind, shard))} has no checksums of {name}")
        return known[name]

    def _record(self, kind: Kind, shard: int) -> Record:
        record = read_record(self.folder, kind, shard)
        if record is None:
            raise CacheCorrupt(f"{self.folder.where(record_name(kind, shard))} is missing")
        return record

    def _read_feature_checksums(self, record: Record) -> Checksums:
        return {array.name: self._store.piece_checksums(record, array) for array in layout.all_layouts(self.manifest)}

    def _read_image_checksums(self, record: Record) -> Checksums:
        pieces = {name: file.piece_checksums() for name, file in record.files.items()}
        return {name: PieceChecksums(values.data, 1) for name, values in pieces.items() if values is not None}

    def _read_places(self, file: ReadableFile, array: ArrayLayout, shard: int) -> ChunkPlaces:
        index = self._store.read_index(file, array, shard)
        return ChunkPlaces(index, chunk_bytes(array) if array.compression == "none" else None)
