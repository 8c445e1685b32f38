"""The rows of a batch follow from the seed and its number alone."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cache_schema.loading.sampler import EpochSampler, StreamSampler


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
def test_an_epoch_shows_each_row_at_most_once_and_leaves_out_less_than_a_batch(
    count: int, batch_size: int, seed: int
) -> None:
    sampler = EpochSampler(np.arange(100, 100 + count), batch_size, seed)
    for epoch in range(2):
        updates = range(epoch * sampler.batches_per_epoch, (epoch + 1) * sampler.batches_per_epoch)
        shown = np.concatenate([sampler.batch(update) for update in updates])
        assert len(set(shown.tolist())) == len(shown) == sampler.batches_per_epoch * sampler.batch_size
        assert count - len(shown) < sampler.batch_size


@given(st.integers(1, 20), st.integers(1, 30))
def test_a_stream_shows_all_rows_equally_often_whatever_the_batch_size(count: int, batch_size: int) -> None:
    sampler = StreamSampler(np.arange(count), batch_size, seed=1)
    shown = np.concatenate([sampler.batch(update) for update in range(count)])  # batch_size full passes
    assert set(Counter(shown.tolist()).values()) == {batch_size}


def test_orders_differ_between_epochs_and_seeds_but_not_between_runs() -> None:
    rows = np.arange(64)
    first, second = EpochSampler(rows, 64, seed=0), EpochSampler(rows, 64, seed=1)
    assert first.batch(0).tolist() == EpochSampler(rows, 64, seed=0).batch(0).tolist()
    assert first.batch(0).tolist() != first.batch(1).tolist()
    assert first.batch(0).tolist() != second.batch(0).tolist()


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5) | st.none())
def test_without_dropping_the_last_batch_an_epoch_shows_every_row_once(
    count: int, batch_size: int, seed: int | None
) -> None:
    sampler = EpochSampler(range(count), batch_size, seed, drop_last=False)
    for epoch in range(2):
        updates = range(epoch * sampler.batches_per_epoch, (epoch + 1) * sampler.batches_per_epoch)
        shown = np.concatenate([sampler.batch(update) for update in updates]).tolist()
        assert (sorted(shown) if seed is not None else shown) == list(range(count))


def test_batches_may_be_asked_for_in_any_order() -> None:
    sampler, stream = EpochSampler(range(50), 8, seed=3), StreamSampler(range(50), 8, seed=3)
    forward = [(sampler.batch(update).tolist(), stream.batch(update).tolist()) for update in range(30)]
    backward = [(sampler.batch(update).tolist(), stream.batch(update).tolist()) for update in reversed(range(30))]
    assert forward == backward[::-1]
