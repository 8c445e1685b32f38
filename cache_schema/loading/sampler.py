"""Which rows make up which batch: a pure function of (seed, update), so that a run can stop anywhere.

An *update* is the 0-based number of a batch counted over all epochs. Whoever knows it and the seed knows the rows: no
process has to be asked, and no generator's state has to be saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Rows = np.ndarray[Any, np.dtype[np.int64]]

# Streams of random numbers that must not repeat each other.
LABELLED, UNLABELLED, VIEWS, AUGMENT, TIMESTEPS, CLASSES, MEMBERS = range(7)


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """The random generator of one purpose (`stream`) at one place (`index`) of a run."""
    return np.random.default_rng((seed, stream, index))


class EpochSampler:
    """Batches of `rows`, (n,) row numbers: every epoch is a fresh permutation, cut into batches.

    With `drop_last` the rows that do not fill a last batch are left out of that epoch, but fewer rows than one batch
    still make one smaller batch. With `seed` None every epoch has the rows in the order given.
    """

    def __init__(
        self,
        rows: Sequence[int] | Rows,
        batch_size: int,
        seed: int | None,
        *,
        drop_last: bool = True,
        stream: int = LABELLED,
    ):
        self.rows, self.seed, self.drop_last = np.asarray(rows, dtype=np.int64), seed, drop_last
        self.batch_size = min(batch_size, len(rows))
        self.batches_per_epoch = len(rows) // self.batch_size if drop_last else -(-len(rows) // self.batch_size)
        self._orders = _Permutations(self.rows, seed, stream)

    def batch(self, update: int) -> Rows:
        """Rows of the batch of 0-based `update`."""
        epoch, place = divmod(update, self.batches_per_epoch)
        return self._orders[epoch][place * self.batch_size : (place + 1) * self.batch_size]


class BalancedSampler:
    """Batches of `classes` classes with `each` rows of every one of them, drawn by `labels` (n,) of `rows` (n,).

    Classes come in rounds, each a fresh permutation cut into batches, of which the classes that do not fill a last one
    sit out. The rows of a class come in passes of their own, cut alike: none is shown again before a pass is through,
    and a class with fewer than `each` rows repeats them within the batch. An epoch is as many batches as the rows
    would fill. Raises ValueError where there are fewer classes. Source: batches of P classes × K images as in Hermans
    et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017.
    """

    def __init__(
        self, rows: Sequence[int] | Rows, labels: Sequence[int] | Rows, classes: int, each: int, seed: int
    ) -> None:
        self.rows, self.seed, self.classes, self.each = np.asarray(rows, dtype=np.int64), seed, classes, each
        names, of = np.unique(np.asarray(labels), return_inverse=True)
        if len(names) < classes:
            raise ValueError(f"{classes} classes a batch are more than the {len(names)} that there are")
        self._members = [self.rows[of == number] for number in range(len(names))]
        self._rounds = EpochSampler(np.arange(len(names)), classes, seed, stream=CLASSES)
        self.batch_size = classes * each
        self.batches_per_epoch = max(1, len(self.rows) // self.batch_size)

    def batch(self, update: int) -> Rows:
        """Rows of the batch of 0-based `update`: those of its first class, then those of the next."""
        round_ = update // self._rounds.batches_per_epoch
        return np.concatenate([self._some(number, round_) for number in self._rounds.batch(update).tolist()])

    def _some(self, number: int, round_: int) -> Rows:
        members = self._members[number]
        pass_, part = divmod(round_, max(1, len(members) // self.each))
        order = np.random.default_rng((self.seed, MEMBERS, number, pass_)).permutation(members)
        return np.resize(order[part * self.each : (part + 1) * self.each], self.each)


class StreamSampler:
    """An endless stream of rows: permutation after permutation, nothing left out."""

    def __init__(self, rows: Sequence[int] | Rows, batch_size: int, seed: int):
        self.rows, self.batch_size, self.seed = np.asarray(rows, dtype=np.int64), batch_size, seed
        self._orders = _Permutations(self.rows, seed, UNLABELLED)

    def batch(self, update: int) -> Rows:
        """Rows of the batch of 0-based `update`."""
        start, stop, n = update * self.batch_size, (update + 1) * self.batch_size, len(self.rows)
        epochs = range(start // n, -(-stop // n))
        stream = np.concatenate([self._orders[epoch] for epoch in epochs])
        return stream[start - epochs.start * n : stop - epochs.start * n]


class _Permutations:
    """The order of each epoch; the last one asked for is kept, for a batch must not cost what an epoch does."""

    def __init__(self, rows: Rows, seed: int | None, stream: int):
        self.rows, self.seed, self.stream = rows, seed, stream
        self._last: tuple[int, Rows] | None = None

    def __getitem__(self, epoch: int) -> Rows:
        if self.seed is None:
            return self.rows
        last = self._last  # one look: another thread may replace it
        if last is not None and last[0] == epoch:
            return last[1]
        order = generator(self.seed, self.stream, epoch).permutation(self.rows)
        self._last = (epoch, order)
        return order
