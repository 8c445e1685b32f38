"""Exact search ranks as an evaluation does, whatever the vectors."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.evaluation.metrics import ranked_neighbours
from trainer.retrieval import neighbours
from trainer.retrieval.neighbours import nearest, norms_of


@given(
    seed=st.integers(0, 10_000), count=st.integers(1, 40), channels=st.integers(1, 70),
    top=st.integers(1, 50), scale=st.sampled_from([1e-6, 1.0, 1e6]), levels=st.sampled_from([2, 3, 0]),
)  # fmt: skip
@settings(max_examples=60)
def test_the_nearest_are_those_of_the_evaluation_ties_and_all(seed, count, channels, top, scale, levels):
    random = np.random.default_rng(seed)
    # Few different values make ties; so does a vector that is there twice, and one of zeros.
    vectors = (
        random.integers(-levels, levels + 1, (count, channels)) if levels else random.normal(size=(count, channels))
    )
    vectors = (vectors * scale).astype(np.float32)
    vectors[-1] = vectors[0]
    expected = torch.cat([rows for _, rows in ranked_neighbours(torch.from_numpy(vectors), top)]).numpy()
    norms = norms_of(vectors)
    for row in range(count):
        found, similarity = nearest(vectors, norms, vectors[row], top, skip=row)
        np.testing.assert_array_equal(found, expected[row])
        assert (np.diff(similarity) <= 0).all()
        assert row not in found


def test_blocks_of_vectors_make_no_difference(monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    whole = nearest(vectors, norms_of(vectors), vectors[3], 9)
    monkeypatch.setattr(neighbours, "_BLOCK", 24)
    for ours, theirs in zip(nearest(vectors, norms_of(vectors), vectors[3], 9), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
