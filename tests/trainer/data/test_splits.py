"""Classes are held out whole, the same ones whatever the run, and never touched in training."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.splits import Split, hold_out_classes
from trainer.errors import TrainError


def split_of(labels: list[int]) -> Split:
    _, dense = np.unique(labels, return_inverse=True)
    return Split(np.arange(len(labels)) * 3, dense.astype(np.int64), len(set(labels)))


@given(st.lists(st.integers(0, 12), min_size=5).filter(lambda x: len(set(x)) >= 4), st.floats(0.01, 0.45))
def test_every_image_is_on_one_side_and_every_class_too(labels, share):
    split = split_of(labels)
    kept, held = hold_out_classes(split, share)
    assert sorted([*kept.rows, *held.rows]) == sorted(split.rows)
    names = dict(zip(split.rows.tolist(), split.labels.tolist(), strict=True))
    assert not {names[row] for row in kept.rows} & {names[row] for row in held.rows}
    for part in (kept, held):
        assert set(part.labels.tolist()) == set(range(part.classes))
        # Labels are dense, and rows of one class stay of one class.
        assert len({(names[r], label) for r, label in zip(part.rows.tolist(), part.labels.tolist(), strict=True)}) == (
            part.classes
        )
    assert held.classes == max(2, round(share * split.classes))


def test_nothing_is_held_out_unless_asked_for():
    split = split_of([0, 0, 1, 2, 2])
    kept, held = hold_out_classes(split, 0.0)
    assert kept is split
    assert (len(held.rows), held.classes) == (0, 0)


def test_the_held_out_classes_are_always_the_same():
    split = split_of(list(range(20)) * 2)
    first, second = hold_out_classes(split, 0.2)[1], hold_out_classes(split, 0.2)[1]
    assert np.array_equal(first.rows, second.rows)


def test_too_few_classes_to_train_on_are_refused():
    with pytest.raises(TrainError, match="2 of 3 training classes cannot be held out"):
        hold_out_classes(split_of([0, 1, 2]), 0.2)
