"""Pooled tokens and principal components: what is stored is small, what comes back is what can be kept."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from cache_building import (
    FEATURE_ROWS,
    build,
    features_of,
    fill,
    many_examples,
    start,
    tiny_manifest,
    tiny_samples,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cache_schema import (
    CacheRequestError,
    Encoding,
    InvalidEncoding,
    InvalidFeatures,
    TapInfo,
    create_cache,
    open_cache,
)
from cache_schema.care.describe import describe_text
from cache_schema.encoding.calibration import Moments
from cache_schema.encoding.reduction import PrincipalComponents, pool_tokens, stored_tap, teacher_shape

CacheOf = Callable[..., Path]


@many_examples
@given(st.data())
def test_pooling_is_the_mean_over_square_neighbourhoods_of_the_grid(data: st.DataObject) -> None:
    views, steps, height, width, channels, pool = (data.draw(st.integers(1, 3)) for _ in range(6))
    shape = (views, steps, height * pool * width * pool, channels)
    x = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-1e3, 1e3, width=32)))
    pooled = pool_tokens(x, (height, width), pool)
    image = torch.from_numpy(x).reshape(views * steps, height * pool, width * pool, channels).permute(0, 3, 1, 2)
    expected = torch.nn.functional.avg_pool2d(image, pool).permute(0, 2, 3, 1)
    np.testing.assert_allclose(pooled.reshape(expected.shape), expected.numpy(), atol=1e-3)


def test_pooling_one_token_changes_nothing() -> None:
    x = np.ones((1, 1, 4, 2), np.float32)
    assert pool_tokens(x, (2, 2), 1) is x


TAP = TapInfo(name="hidden", tokens=24, channels=10, grid=(4, 6))


def test_the_stored_shape_of_a_tap_follows_from_the_teachers() -> None:
    encoding = Encoding(kind="int8", pool=2, pca=7)
    stored = stored_tap(TAP, encoding)
    assert (stored.tokens, stored.grid, stored.channels, stored.teacher_channels) == (6, (2, 3), 7, 10)
    assert teacher_shape(stored, encoding) == (24, 10)
    assert stored_tap(TAP, Encoding(kind="int8")) == TAP


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        (Encoding(kind="int8", pool=3), "the 4x6 tokens of tap hidden cannot be pooled 3x3: 3 divides only one side"),
        (Encoding(kind="int8", pool=5), "5 divides neither side; choose another pool"),
        (Encoding(kind="int8", pca=11), "has 10 channels, which have no 11 principal components; choose pca 10"),
    ],
)
def test_a_reduction_that_does_not_fit_is_refused_where_the_cache_is_planned(encoding: Encoding, message: str) -> None:
    samples, rows = tiny_samples()
    with pytest.raises(InvalidEncoding, match=re.escape(message)):
        tiny_manifest(samples, rows, taps=[TAP], encoding=encoding)


def components_of(samples: np.ndarray, count: int) -> PrincipalComponents:
    moments = Moments(samples.shape[2], samples.shape[4], pairs=True)
    for sample in samples:
        moments.add(sample)
    return moments.principal_components(count)


def correlated(rng: np.random.Generator, n: int, channels: int, rank: int) -> np.ndarray:
    """Features (n, V=1, T=2, L=16, C) in a subspace of `rank` dimensions around a mean, channels of unequal size."""
    mixing = rng.normal(size=(rank, channels))
    return ((rng.normal(size=(n, 1, 2, 16, rank)) @ mixing + 3) * np.linspace(0.1, 50, channels)).astype(np.float32)


def test_the_components_are_those_of_the_normalised_channels() -> None:
    x = correlated(np.random.default_rng(0), 8, 12, rank=12)
    found = components_of(x, 5)
    flat = x.reshape(-1, 12).astype(np.float64)
    amplitude = np.sqrt(np.square(flat).mean(axis=0))
    np.testing.assert_allclose(found.amplitude, amplitude, rtol=1e-6)
    normalised = flat / amplitude
    _, _, expected = np.linalg.svd(normalised - normalised.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs((found.basis * expected[:5]).sum(axis=1)), 1, atol=1e-6)
    np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(5), atol=1e-6)
    assert (found.basis.max(axis=1) == np.abs(found.basis).max(axis=1)).all(), "the largest entry is positive"


def test_features_of_few_dimensions_survive_as_many_components() -> None:
    x = correlated(np.random.default_rng(1), 12, 40, rank=6)
    components = components_of(x[:8], 6)
    for sample in x[8:]:
        restored = components.restore(components.project(sample))
        np.testing.assert_allclose(restored / components.amplitude, sample / components.amplitude, atol=1e-4)


def test_all_components_lose_nothing_even_where_a_channel_is_silent() -> None:
    x = correlated(np.random.default_rng(2), 6, 5, rank=5)
    x[..., 2] = 0
    components = components_of(x, 5)
    restored = np.stack([components.restore(components.project(sample)) for sample in x])
    np.testing.assert_allclose(restored, x, atol=1e-3)


def test_the_amplitudes_of_coordinates_are_those_measured_on_the_coordinates() -> None:
    x = correlated(np.random.default_rng(3), 8, 12, rank=12)
    x[:, :, 1] *= 7
    moments = Moments(2, 12, pairs=True)
    for sample in x:
        moments.add(sample)
    components = moments.principal_components(4)
    coordinates = np.stack([components.project(sample) for sample in x])
    measured = np.sqrt(np.square(coordinates.astype(np.float64)).mean(axis=(0, 1, 3)))
    np.testing.assert_allclose(moments.coordinate_amplitudes(components), measured, rtol=1e-4)


@pytest.mark.parametrize("kind", ["float32", "float8_e4m3"])
@pytest.mark.parametrize(("pool", "pca"), [(2, None), (1, 3), (3, 4)])
def test_a_reduced_cache_gives_its_coordinates_and_can_be_restored(
    cache_of: CacheOf, kind: str, pool: int, pca: int | None
) -> None:
    root = cache_of(kind=kind, pool=pool, pca=pca)
    cache = open_cache(root)
    features = features_of(range(FEATURE_ROWS), cache.manifest)
    group = zarr.open_group(root / "features", mode="r")
    for tap in cache.manifest.taps:
        pooled = pool_tokens(features[tap.name], tap.grid, pool)
        decoded = cache.read(range(FEATURE_ROWS), tap=tap.name, view=1).decode()
        assert decoded.shape == (FEATURE_ROWS, 3, tap.tokens, tap.channels)
        restored = cache.restore(tap.name, decoded)
        assert restored.shape == pooled[:, 1].shape
        if pca is None:
            expected, unit = pooled[:, 1], np.sqrt(np.square(pooled).mean(axis=(0, 1, 2, 3)))
            assert restored is decoded
        else:
            stored = [np.asarray(group[f"{tap.name}.{part}"][:]) for part in ("amplitude", "mean", "basis")]
            components = PrincipalComponents(*stored)
            expected, unit = components.restore(components.project(pooled[:, 1])), components.amplitude
            assert components.basis.shape == (pca, tap.teacher_channels)
        tolerance = 1e-5 if kind == "float32" else 0.3
        np.testing.assert_allclose(restored.numpy() / unit, expected / unit, atol=tolerance)
    with pytest.raises(CacheRequestError, match="channels"):
        cache.restore("hidden", torch.zeros(2, 99))


def test_a_build_resumed_after_its_calibration_gives_the_same_reduced_cache(tmp_path: Path, cache_of: CacheOf) -> None:
    options = {"kind": "int8", "pool": 2, "pca": 3}
    start(tmp_path / "cache", **options)
    root = build(tmp_path / "cache", **options)
    whole = cache_of(**options)
    names = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert [name for name in names if (root / name).read_bytes() != (whole / name).read_bytes()] == []


def test_features_of_the_stored_shape_are_refused_where_the_teachers_are_meant(tmp_path: Path) -> None:
    unfinished = start(tmp_path / "cache", pool=2)
    rows = unfinished.shard_rows(0)
    small = {tap.name: np.zeros((len(rows), 2, 3, tap.tokens, tap.channels)) for tap in unfinished.manifest.taps}
    with pytest.raises(InvalidFeatures, match=r"have shape \(3, 2, 3, 6, 8\), expected \(3, 2, 3, 24, 8\)"):
        unfinished.write_shard(0, small)


def test_a_cache_with_pca_is_calibrated_once_in_batches_of_any_size(tmp_path: Path, cache_of: CacheOf) -> None:
    samples, rows = tiny_samples()
    unfinished = create_cache(tmp_path / "cache", tiny_manifest(samples, rows, "int8", pca=3), samples)
    assert unfinished.needs_calibration()
    unfinished.calibrate(features_of([row], unfinished.manifest) for row in range(4))
    fill(unfinished).seal()
    whole = cache_of(kind="int8", pca=3)
    for path in (whole / "features").rglob("*"):
        if path.is_file():
            assert (tmp_path / "cache" / path.relative_to(whole)).read_bytes() == path.read_bytes()


def test_the_card_and_the_description_say_how_features_were_reduced(cache_of: CacheOf) -> None:
    root = cache_of(kind="int8", pool=2, pca=3)
    card = (root / "README.md").read_text()
    for text in (card, describe_text(root)):
        assert "mean over 2x2 tokens, 3 principal components, int8, compression none" in text
    assert "How close stored features are to the mean of 2x2 tokens of the teacher" in card
    assert "Channels are principal components of the teacher's 5 or 8: see `cache.restore(tap, features)`." in card
