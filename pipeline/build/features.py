"""The heavy part of a build: the teacher's features, computed shard by shard while the shard before is written."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from cache_schema.encoding.reduction import teacher_shape
from cache_schema.read_ahead import ReadAhead
from cache_schema.storage.buffers import empty
from cache_schema.writing.claims import Claims
from cache_schema.writing.writer import CacheWriter
from pipeline.build.calibration import CalibrationImages
from pipeline.build.config import BuildConfig
from pipeline.build.part import WHOLE, Part
from pipeline.datasets.base import Sample
from pipeline.inputs.feature_source import FeatureSource
from pipeline.inputs.scan import ScannedSample
from pipeline.inputs.tolerance import BadSamples, TooManyBadSamples
from pipeline.watchdog import watched

_PATIENCE_AT_FIRST = 10

Rows = TypeVar("Rows", bound=Sequence[int])


def find_failures(features: Mapping[str, Tensor], config: BuildConfig) -> dict[int, str]:
    """Index in the batch → where {tap: (B, V, T, L, C)} has NaN or infinities, for the samples of which it has any."""
    failures: dict[int, str] = {}
    for tap, tokens in features.items():
        # NaN and infinities show in the extremes, which take a fraction of the time that looking at every value does.
        flat = tokens.flatten(3)
        finite = torch.isfinite(flat.amax(3)) & torch.isfinite(flat.amin(3))  # B, V, T
        for i, v, t in (~finite).nonzero().tolist():
            place = f"tap {tap} at timestep {config.timesteps[t]}, view {config.views[v]}"
            failures.setdefault(i, f"the teacher's features are NaN or infinite: {place}")
    return failures


@dataclass
class _OpenShard:
    """A shard that is being computed; features: {tap: (rows, V, T, L, C)} in memory that is used again afterwards."""

    rows: range
    features: dict[str, Tensor] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    def add(self, rows: Sequence[int], computed: Mapping[str, Tensor], failed: Mapping[int, str]) -> None:
        """Take the features of some rows, and which rows have none of use."""
        places: slice | list[int] = [row - self.rows.start for row in rows]
        if rows and rows[-1] - rows[0] + 1 == len(rows):
            places = slice(rows[0] - self.rows.start, rows[-1] - self.rows.start + 1)
        for tap, tokens in computed.items():
            room = self.features[tap]
            room[places] = tokens.to(room)
        self.failed |= failed


class FeatureBuilder:
    """Computes and commits what a cache lacks of features.

    usable: the samples that are not quarantined, in cache row order. bad: counts the samples that the teacher fails on.
    check: called before every batch; may raise to end the build. part: which shards are built here, and until when.
    hung: row → why it is not shown to the teacher and has no features.
    Memory does not depend on the data set: one shard is computed while the one before is encoded and written, and a
    store that is slower than the teacher makes the teacher wait.
    """

    def __init__(
        self,
        writer: CacheWriter,
        claims: Claims,
        source: FeatureSource,
        config: BuildConfig,
        usable: Sequence[ScannedSample],
        bad: BadSamples,
        check: Callable[[], None] = lambda: None,
        part: Part = WHOLE,
        hung: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self._part, self._hung = part, hung
        # In the first pass weights are loaded and code is compiled.
        self._patience = _PATIENCE_AT_FIRST
        self._writer, self._claims, self._source = writer, claims, source
        self._config, self._usable, self._bad, self._check = config, usable, bad, check
        self._calibration = CalibrationImages(writer.manifest, config.batch_images)
        self._buffers: list[dict[str, Tensor]] = [{}, {}]

    def run(self) -> None:
        """Compute and commit every missing shard that no other builder computes; then those that others gave up."""
        if self._part.waits or self._missing_here():
            self._encode()
            self._calibrate()
        if not self._missing_here():
            return
        self._bad.check()
        with ThreadPoolExecutor(1) as pool, tqdm(desc="teacher", unit="image", total=self._missing_rows()) as bar:
            mine = self._claims.missing("features", self._missing_here())
            self._build(self._part.in_time(mine, self._writer.manifest.store.samples_per_shard), pool, bar)
            others = self._writer.missing_shards() if self._part.waits else []
            if others:
                self._bad.log(f"waiting for the other builder of this cache, which has {len(others)} shards left")
            # Nothing is claimed while waiting for the next, so that two builders cannot wait for each other.
            for shard in self._claims.missing("features", others, wait=True):
                self._build([shard], pool, bar)

    def _missing_here(self) -> list[int]:
        """The shards of this part that nobody has committed."""
        return self._part.of(self._writer.missing_shards())

    def _missing_rows(self) -> int:
        return sum(len(self._writer.shard_rows(k)) for k in self._missing_here())

    def _missing(self) -> set[int]:
        """The rows of the shards that are still to be built here."""
        return {row for k in self._missing_here() for row in self._writer.shard_rows(k)}

    def _encode(self) -> None:
        """Prepare all that will be needed: a DiT's captions and latents are encoded before it is in memory."""
        rows = self._missing()
        if self._writer.needs_calibration():
            rows.update(*self._calibration.batches)
        else:
            rows.update(*(self._calibration.batch_of(row) for row in list(rows) if row in self._calibration))
        needed = [self._usable[row] for row in sorted(rows - self._hung.keys())]
        digests = {entry.sample.id: entry.sha256 for entry in needed}
        self._source.prepare([entry.sample for entry in needed], digests, self._check, self._bad.log)

    def _calibrate(self) -> None:
        """Measure the statistics an encoding needs, on images spread evenly over the rows with features."""
        if not self._writer.needs_calibration():
            return
        if not self._claims.take("calibration"):
            self._bad.log("waiting for the other builder of this cache, which is calibrating it")
            self._claims.take("calibration", wait=True)
        batches = [left for rows in self._calibration.batches if (left := self._good(rows))]
        count = sum(map(len, batches))
        with tqdm(total=count, desc="calibrate", unit="image") as bar, closing(self._ahead(batches)) as ahead:
            self._writer.calibrate(self._calibration_features(ahead, bar))
        self._claims.drop("calibration")

    def _calibration_features(
        self, batches: Iterable[tuple[Sequence[int], Any]], bar: tqdm
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the features of calibration batches; samples that the teacher fails on count where they are stored."""
        nothing, wanted = True, self._missing()
        failures: dict[int, str] = {}
        for rows, given in batches:
            computed = self._compute(rows, given)
            failures = find_failures(computed, self._config)
            self._calibration.keep(rows, computed, wanted)
            if failures and self._bad.tolerance.strict:
                self._bad.add(self._usable[rows[min(failures)]].sample.source, failures[min(failures)])
            good = [i for i in range(len(rows)) if i not in failures]
            if good:
                yield {tap: tokens[good] for tap, tokens in computed.items()}
                nothing = False
            bar.update(len(rows))
        if nothing:
            why = next(iter([*failures.values(), *self._hung.values()]), "none was given")
            raise TooManyBadSamples(f"no image is left to calibrate the encoding on: {why}")

    def _build(self, shards: Iterable[int], pool: ThreadPoolExecutor, bar: tqdm) -> None:
        """Compute shards and hand each to the writing thread, where never more than one waits."""
        pending: Future[None] | None = None
        shard: _OpenShard | None = None
        turn = 0
        with closing(self._ahead(self._batches(shards), self._fresh)) as ahead:
            for rows, given in ahead:
                begun = time.monotonic()
                good = self._good(rows)
                computed = self._features(good, given)
                failed = {good[i]: reason for i, reason in find_failures(computed, self._config).items()}
                failed |= {row: self._hung[row] for row in rows if row in self._hung}
                number = rows.start // self._writer.manifest.store.samples_per_shard
                if shard is None:
                    shard = _OpenShard(self._writer.shard_rows(number))
                    shard.features = self._room(turn % 2, len(shard.rows), computed or self._nothing())
                shard.add(good, computed, failed)
                for row, reason in failed.items():
                    self._bad.add(self._usable[row].sample.source, reason)
                self._bad.check()
                bar.update(len(rows))
                self._part.note(len(rows), time.monotonic() - begun)
                if rows.stop == shard.rows.stop:
                    if pending:
                        # A store that is slower than the teacher counts as well.
                        begun = time.monotonic()
                        pending.result()
                        self._part.note(0, time.monotonic() - begun)
                    pending = pool.submit(self._write, number, shard)
                    shard, turn = None, turn + 1
        if pending:
            pending.result()

    def _batches(self, shards: Iterable[int]) -> Iterator[range]:
        # Batches start at the shard's first row, so what a shard holds never depends on where an earlier run stopped.
        for shard in shards:
            rows = self._writer.shard_rows(shard)
            for start in range(0, len(rows), self._config.batch_images):
                yield rows[start : start + self._config.batch_images]

    def _ahead(
        self, batches: Iterable[Rows], needed: Callable[[Rows], Sequence[int]] = lambda rows: rows
    ) -> Generator[tuple[Rows, Any], None, None]:
        """Yield batches with what the teacher needs of their `needed` rows, read while the one before is computed."""

        def read(rows: Rows) -> tuple[Rows, Any]:
            wanted = needed(rows)
            return rows, self._source.read(self._samples(wanted)) if wanted else None

        with ReadAhead(read, threads=1, depth=1) as ahead:
            yield from ahead.over(batches)

    def _samples(self, rows: Sequence[int]) -> list[Sample]:
        return [self._usable[row].sample for row in rows]

    def _good(self, rows: Sequence[int]) -> list[int]:
        """Those rows of a batch that are shown to the teacher at all."""
        return [row for row in rows if row not in self._hung]

    def _fresh(self, rows: Sequence[int]) -> list[int]:
        """Those rows of a batch that are computed with it."""
        return [row for row in self._good(rows) if row not in self._calibration]

    def _nothing(self) -> dict[str, Tensor]:
        """{tap: (0, V, T, L, C)}: the shape of features of which there are none."""
        manifest = self._writer.manifest
        V, T = len(manifest.views), len(manifest.curriculum.timesteps)
        shapes = {tap.name: teacher_shape(tap, manifest.encoding) for tap in manifest.taps}
        return {name: torch.empty(0, V, T, *shape) for name, shape in shapes.items()}

    def _compute(self, rows: Sequence[int], given: Any) -> dict[str, Tensor]:
        self._check()
        samples = self._samples(rows)
        ids, sources = [sample.id for sample in samples], [sample.source for sample in samples]
        with watched("teacher", "the teacher's pass over its batch", ids, sources, self._patience):
            computed = self._source.compute(samples, given)
        self._patience = 1
        return computed

    def _features(self, rows: Sequence[int], given: Any) -> dict[str, Tensor]:
        """{tap: (B, V, T, L, C)} of a batch of a shard; given: what the teacher needs of its fresh rows."""
        fresh = self._fresh(rows)
        computed = self._compute(fresh, given) if fresh else {}
        if len(fresh) == len(rows):
            return computed  # nothing, where the teacher hung on the whole batch
        by_row = {row: {tap: tokens[i] for tap, tokens in computed.items()} for i, row in enumerate(fresh)}
        by_row |= {row: self._of_calibration(row) for row in rows if row in self._calibration}
        return {tap: torch.stack([by_row[row][tap].cpu() for row in rows]) for tap in self._config.taps}

    def _of_calibration(self, row: int) -> dict[str, Tensor]:
        """{tap: (V, T, L, C)} of a row, computed again with its calibration batch where somebody else calibrated."""
        kept = self._calibration.take(row)
        if kept is None:
            batch = self._good(self._calibration.batch_of(row))
            computed = self._compute(batch, self._source.read(self._samples(batch)))
            self._calibration.keep(batch, computed, self._missing())
            kept = self._calibration.take(row)
        assert kept is not None, "a row that is being built is missing"
        return kept

    def _room(self, turn: int, rows: int, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Memory for a shard; two shards take turns, so that one is written while the other is computed."""
        buffer = self._buffers[turn]
        for tap, tokens in like.items():
            if tap not in buffer or len(buffer[tap]) < rows:
                buffer[tap] = empty((rows, *tokens.shape[1:]), tokens.dtype)
        return {tap: values[:rows] for tap, values in buffer.items()}

    def _write(self, number: int, shard: _OpenShard) -> None:
        try:
            self._writer.write_shard(number, shard.features, shard.failed)
            if self._config.min_cosine is not None:
                # Rather now than after the last of a hundred hours.
                self._writer.check_fidelity(self._config.min_cosine)
        finally:
            self._claims.drop("features", number)
