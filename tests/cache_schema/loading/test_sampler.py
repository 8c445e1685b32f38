"""The rows of a batch follow from the seed and its number alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema.loading.sampler import BalancedSampler, EpochSampler, StreamSampler


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


@st.composite
def balanced(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int, int]:
    """Rows with labels in any order, classes per batch, rows of each, a seed."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
    labels = np.array(draw(st.permutations([10 * label for label, size in enumerate(sizes) for _ in range(size)])))
    rows = 100 + np.arange(len(labels))
    return rows, labels, draw(st.integers(1, len(sizes))), draw(st.integers(1, 5)), draw(st.integers(0, 5))


@given(balanced(), st.integers(0, 10_000))
def test_a_balanced_batch_has_so_many_rows_of_so_many_classes_and_follows_from_its_number_alone(
    given: tuple[np.ndarray, np.ndarray, int, int, int], update: int
) -> None:
    rows, labels, classes, each, seed = given
    batch = BalancedSampler(rows, labels, classes, each, seed).batch(update)
    label_of = dict(zip(rows.tolist(), labels.tolist(), strict=True))
    of = [label_of[row] for row in batch.tolist()]
    assert set(Counter(of).values()) == {each}
    assert len(set(of)) == classes
    for label in set(of):
        shown = [row for row in batch.tolist() if label_of[row] == label]
        assert len(set(shown)) == min(each, int((labels == label).sum()))
    later = BalancedSampler(rows, labels, classes, each, seed)
    later.batch(update + 1)
    assert later.batch(update).tolist() == batch.tolist()


@given(balanced())
def test_a_class_shows_all_the_rows_that_fill_a_pass_before_it_repeats_one(
    given: tuple[np.ndarray, np.ndarray, int, int, int],
) -> None:
    rows, labels, classes, each, seed = given
    sampler = BalancedSampler(rows, labels, classes, each, seed)
    assert sampler.batches_per_epoch == max(1, len(rows) // (classes * each))
    for number, label in enumerate(np.unique(labels)):
        size = int((labels == label).sum())
        parts = max(1, size // each)
        for first in (0, parts):
            shown = np.concatenate([sampler._some(number, first + part) for part in range(parts)])
            assert set(shown) <= set(rows[labels == label])
            assert len(set(shown.tolist())) == min(size, parts * each)


def test_every_class_has_its_turn_in_each_round_that_the_batches_fill() -> None:
    labels = np.repeat(np.arange(6), 4)
    sampler = BalancedSampler(np.arange(24), labels, classes=2, each=3, seed=0)
    for round_ in range(4):
        shown = np.concatenate([labels[sampler.batch(3 * round_ + place)] for place in range(3)])
        assert Counter(shown.tolist()) == dict.fromkeys(range(6), 3)
    other = BalancedSampler(np.arange(24), labels, classes=2, each=3, seed=1)
    assert other.batch(0).tolist() != sampler.batch(0).tolist()


def test_more_classes_than_there_are_cannot_fill_a_batch() -> None:
    with pytest.raises(ValueError, match="3 classes a batch are more than the 2 that there are"):
        BalancedSampler([0, 1], [5, 6], 3, 1, 0)
