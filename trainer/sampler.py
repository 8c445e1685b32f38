"""Which rows make up which batch: a pure function of (seed, update), so that a run can stop anywhere."""

from __future__ import annotations

import numpy as np

# Streams of random numbers that must not repeat each other.
LABELLED, UNLABELLED, VIEWS, AUGMENT = range(4)


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """The random generator of one purpose (`stream`) at one place (`index`) of a run."""
    return np.random.default_rng((seed, stream, index))


class EpochSampler:
    """Labelled batches: every epoch is a fresh permutation, cut into full batches.

    The rows that do not fill a last batch are left out of that epoch; fewer rows than one batch make one
    smaller batch.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int):
        self.rows, self.seed = rows, seed
        self.batch_size = min(batch_size, len(rows))
        self.batches_per_epoch = len(rows) // self.batch_size

    def batch(self, update: int) -> np.ndarray:
        """Rows of the batch of 0-based `update`."""
        epoch, place = divmod(update, self.batches_per_epoch)
        order = generator(self.seed, LABELLED, epoch).permutation(self.rows)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


class StreamSampler:
    """An endless stream of rows: permutation after permutation, nothing left out."""

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed

    def batch(self, update: int) -> np.ndarray:
        """Rows of the batch of 0-based `update`."""
        start, stop, n = update * self.batch_size, (update + 1) * self.batch_size, len(self.rows)
        epochs = range(start // n, -(-stop // n))
        stream = np.concatenate([generator(self.seed, UNLABELLED, e).permutation(self.rows) for e in epochs])
        return stream[start - epochs.start * n : stop - epochs.start * n]
