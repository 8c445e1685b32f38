"""What an encoding loses is measured against what the teacher computed, and can be too much."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cache_building import FEATURE_ROWS, TIMESTEPS, build, features_of, fill, many_examples, start, tree
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cache_schema import LowFidelity, open_cache
from cache_schema.encoding.fidelity import combine, measure, merge
from cache_schema.encoding.reduction import pool_tokens
from cache_schema.format.journal import FidelitySums

CacheOf = Callable[..., Path]

numbers = st.just(0.0) | st.floats(1e-3, 1e3)
sums = st.builds(
    FidelitySums,
    tap=st.sampled_from(["hidden", "velocity"]),
    timestep=st.sampled_from([10, 28]),
    tokens=st.integers(1, 1000),
    cosine_sum=numbers,
    cosine_min=st.floats(-1, 1),
    squared_error=numbers,
    energy=numbers,
    channel_error=numbers,
)


def test_the_figures_of_two_tokens_are_those_computed_by_hand() -> None:
    original = np.array([[[3.0, 4.0], [0.0, 2.0]]])
    stored = np.array([[[3.0, 4.0], [2.0, 0.0]]])
    (figures,) = merge([measure("hidden", 10, original, stored)])
    assert (figures.cosine_mean, figures.cosine_min) == (0.5, 0.0)
    assert figures.relative_error == pytest.approx(math.sqrt(8 / 29))
    # Channel 0: an error of 4 over an energy of 9; channel 1: 4 over 20.
    assert figures.channel_error == pytest.approx(math.sqrt((4 / 9 + 4 / 20) / 2))


def test_tokens_of_zeros_that_stay_zeros_are_kept_and_those_that_vanish_are_lost() -> None:
    (kept,) = merge([measure("hidden", 10, np.zeros((1, 1, 2)), np.zeros((1, 1, 2)))])
    assert (kept.cosine_min, kept.relative_error, kept.channel_error) == (1.0, 0.0, 0.0)
    (lost,) = merge([measure("hidden", 10, np.ones((1, 1, 2)), np.zeros((1, 1, 2)))])
    assert (lost.cosine_min, lost.relative_error, lost.channel_error) == (0.0, 1.0, 1.0)


@many_examples
@given(
    hnp.arrays(np.float32, (2, 2, 3, 5), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.booleans(),
)
def test_the_figures_are_those_of_their_definition(pair: np.ndarray, dtype: type, contiguous: bool) -> None:
    original, stored = pair.astype(dtype) if contiguous else pair.astype(dtype).swapaxes(1, 2)
    (figures,) = merge([measure("hidden", 10, original, stored.astype(np.float32))])
    x, y = original.astype(np.float64).reshape(-1, original.shape[-1]), stored.reshape(-1, original.shape[-1])
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y.astype(np.float64), axis=1)
    alike = (x * y).sum(axis=1)
    cosines = [
        1.0 if not a.any() and not b.any() else d / n if n else 0.0
        for a, b, d, n in zip(x, y, alike, norms, strict=True)
    ]
    error, energy = np.square(x - y).sum(axis=0), np.square(x).sum(axis=0)
    lost = np.where(energy > 0, error / np.where(energy > 0, energy, 1), 0)
    assert figures.cosine_mean == pytest.approx(np.mean(cosines), abs=1e-9)
    assert figures.relative_error == pytest.approx(math.sqrt(error.sum() / energy.sum()) if energy.any() else 0)
    assert figures.channel_error == pytest.approx(math.sqrt(lost.mean()))


@many_examples
@given(st.lists(sums, min_size=1, max_size=8), st.integers(0, 8))
def test_combining_in_two_steps_gives_the_figures_of_one(items: list[FidelitySums], cut: int) -> None:
    once, twice = merge(items), merge([*combine(items[:cut]), *items[cut:]])
    assert [(item.tap, item.timestep) for item in once] == [(item.tap, item.timestep) for item in twice]
    for a, b in zip(once, twice, strict=True):
        assert a.cosine_min == b.cosine_min
        for name in ("cosine_mean", "relative_error", "channel_error"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-9, abs=1e-12)


def test_pooling_is_no_error_but_what_pca_leaves_out_is(cache_of: CacheOf) -> None:
    pooled = open_cache(cache_of(pool=2)).manifest.fidelity
    assert {(item.relative_error, item.channel_error) for item in pooled} == {(0.0, 0.0)}
    cache = open_cache(cache_of(pool=2, pca=3, samples_per_shard=FEATURE_ROWS))
    measured = [0, 1]
    truth = pool_tokens(features_of(measured, cache.manifest)["hidden"], (2, 3), 2).astype(np.float64)
    for t, step in enumerate(TIMESTEPS):
        stored = [cache.read(measured, timesteps=[step], view=view).decode()[:, 0] for view in (0, 1)]
        restored = np.stack([cache.restore("hidden", values).numpy() for values in stored], axis=1)
        expected = np.linalg.norm(restored - truth[:, :, t]) / np.linalg.norm(truth[:, :, t])
        (figures,) = [item for item in cache.manifest.fidelity if (item.tap, item.timestep) == ("hidden", step)]
        assert figures.relative_error == pytest.approx(expected, rel=1e-3)
        assert figures.relative_error > 0.001


def test_a_cache_that_lost_too_much_is_not_sealed_and_nothing_of_it_is_lost(tmp_path: Path) -> None:
    unfinished = fill(start(tmp_path / "cache", pca=2))
    before = tree(tmp_path / "cache")
    with pytest.raises(LowFidelity, match=r"tap \S+ at timestep \d+ of cache tiny-\w+ keeps a mean cosine of 0\.\d+, "):
        unfinished.seal(min_cosine=0.99999)
    assert tree(tmp_path / "cache") == before
    sealed = unfinished.seal(min_cosine=0.0)
    assert sealed.sealed
    worst = min(item.cosine_mean for item in sealed.fidelity)
    assert unfinished.seal(min_cosine=worst) == sealed
    with pytest.raises(LowFidelity, match=r"0\.99999 is asked for; build with a wider encoding"):
        unfinished.seal(min_cosine=0.99999)


def test_a_faithful_cache_is_sealed_as_without_the_demand(tmp_path: Path, cache_of: CacheOf) -> None:
    fill(start(tmp_path / "cache", kind="int8")).seal(min_cosine=0.999)
    assert tree(tmp_path / "cache") == tree(cache_of(kind="int8"))


def test_a_hopeless_build_can_be_stopped_after_its_first_shard(tmp_path: Path) -> None:
    builder = start(tmp_path / "cache", pca=2)
    builder.check_fidelity(0.99999)
    builder.write_shard(0, features_of(builder.shard_rows(0), builder.manifest))
    with pytest.raises(LowFidelity):
        builder.check_fidelity(0.99999)
    assert builder.missing_shards() == [1, 2], "what was committed stays"
    lost = 1 - min(item.cosine_mean for item in open_cache(build(tmp_path / "cache", pca=2)).manifest.fidelity)
    # A close call is left to `seal`: one and a half times what is allowed is not hopeless yet.
    builder.check_fidelity(1 - lost / 1.5)
    with pytest.raises(LowFidelity):
        builder.seal(min_cosine=1 - lost / 1.5)
