"""Massive channels are found by a stated rule, and removed or standardised before anything is stored."""

from pathlib import Path

import numpy as np
import pytest
from cache_building import features_of, many_examples, tiny_manifest, tiny_samples
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cache_schema import CacheWriter, Encoding, Manifest, create_cache, open_cache
from cache_schema.care.convert import convert
from cache_schema.care.describe import describe, describe_text
from cache_schema.care.verify import verify
from cache_schema.encoding.calibration import Moments
from cache_schema.encoding.massive import find_massive, treatment_of
from cache_schema.encoding.reduction import pool_tokens
from cache_schema.format.identity import differing_fields

HUGE = {"hidden": 3, "single.3": 0}


def massive_features(rows, manifest: Manifest) -> dict[str, np.ndarray]:
    """Features of one huge channel that hardly varies in each tap, beside ordinary ones."""
    features = {}
    for tap, values in features_of(rows, manifest).items():
        values = np.random.default_rng(len(rows)).normal(size=values.shape).astype(np.float32)
        values[..., HUGE[tap]] += 500
        features[tap] = values
    return features


def massive_manifest(kind: str, massive: str, pool: int = 1, pca: int | None = None, store: str = "zarr"):
    samples, rows = tiny_samples()
    manifest = tiny_manifest(samples, rows, kind, pool=pool, pca=pca, store=store, with_images=False)
    encoding = Encoding(kind=kind, pool=pool, pca=pca, massive=massive, massive_factor=10.0)
    return manifest.model_copy(update={"encoding": encoding, "cache_id": ""}), samples


def built(path: Path, manifest: Manifest, samples) -> CacheWriter:
    writer = create_cache(path, Manifest.model_validate(manifest.document()), samples)
    writer.calibrate(massive_features(range(manifest.dataset.feature_rows), writer.manifest))
    for shard in writer.missing_shards():
        writer.write_shard(shard, massive_features(writer.shard_rows(shard), writer.manifest))
    writer.seal()
    return writer


@pytest.mark.parametrize(("kind", "pool", "pca"), [("float32", 1, None), ("bfloat16", 2, None), ("int8", 1, 3)])
def test_removed_channels_are_zeros_of_the_same_shape_and_named_in_the_manifest(kind, pool, pca, tmp_path):
    manifest, samples = massive_manifest(kind, "remove", pool, pca)
    writer = built(tmp_path / "cache", manifest, samples)
    assert writer.manifest.massive_channels == {tap: [channel] for tap, channel in HUGE.items()}
    cache = open_cache(tmp_path / "cache")
    given_rows = list(writer.shard_rows(0))
    given_features = massive_features(given_rows, writer.manifest)
    for tap in cache.manifest.taps:
        stored = cache.restore(tap.name, cache.read(given_rows, tap=tap.name).decode()).numpy()
        expected = pool_tokens(given_features[tap.name][:, 0], tap.grid, pool).copy()
        expected[..., HUGE[tap.name]] = 0
        assert stored.shape == expected.shape
        if pca is None:
            np.testing.assert_allclose(stored, expected, rtol=0.01, atol=0.02)
        # What was removed is no loss: the fidelity is that of what is left.
        assert np.abs(stored[..., HUGE[tap.name]]).max() < 1e-4
    if pca is None:
        assert min(item.cosine_mean for item in cache.manifest.fidelity) > 0.999
    assert not verify(tmp_path / "cache")


def test_standardised_channels_are_as_large_as_the_others(tmp_path):
    manifest, samples = massive_manifest("float32", "standardize")
    writer = built(tmp_path / "cache", manifest, samples)
    cache, rows = open_cache(tmp_path / "cache"), range(manifest.dataset.feature_rows)
    for tap, channel in HUGE.items():
        stored = cache.read(list(rows), tap=tap).decode().numpy()
        assert abs(stored[..., channel].mean()) < 0.5
        assert 0.5 < stored[..., channel].std() / np.delete(stored, channel, axis=-1).std() < 2
    assert writer.manifest.massive_channels == {tap: [channel] for tap, channel in HUGE.items()}


def test_a_copy_in_another_store_keeps_the_treatment(tmp_path):
    manifest, samples = massive_manifest("int8", "remove")
    original = built(tmp_path / "cache", manifest, samples).manifest
    copy = convert(tmp_path / "cache", tmp_path / "copy", "webdataset")
    assert copy.massive_channels == original.massive_channels
    assert copy.cache_id == original.cache_id
    assert not verify(tmp_path / "copy")
    batches = [open_cache(tmp_path / name).read([0, 1], tap="hidden").decode() for name in ("cache", "copy")]
    assert (batches[0] == batches[1]).all()


def test_what_was_removed_is_said_to_people(tmp_path):
    manifest, samples = massive_manifest("int8", "remove")
    built(tmp_path / "cache", manifest, samples)
    assert "massive channels (from 10 times the median on) removed" in describe_text(tmp_path / "cache")
    assert describe(tmp_path / "cache")["manifest"]["massive_channels"]["hidden"] == [3]
    assert "Massive channels of `hidden`, zeros here: 3." in (tmp_path / "cache/README.md").read_text()


def test_the_rule_is_part_of_the_name_of_a_cache_and_keeping_is_not():
    samples, rows = tiny_samples()
    kept = tiny_manifest(samples, rows, "int8")
    removed, _ = massive_manifest("int8", "remove")
    other = removed.model_copy(
        update={"encoding": removed.encoding.model_copy(update={"massive_factor": 20.0}), "cache_id": ""}
    )
    assert kept.cache_id == tiny_manifest(samples, rows, "int8").cache_id
    assert differing_fields(removed.document(), other.document()) == ["encoding.massive_factor"]
    with pytest.raises(ValidationError, match="massive channels"):
        Encoding(kind="int8", massive="remove")


@many_examples
@given(st.integers(0, 2**32 - 1), st.sampled_from(["remove", "standardize"]), st.booleans())
def test_statistics_after_a_treatment_follow_from_those_before_it(seed, kind, pairs):
    rng = np.random.default_rng(seed)
    sample = rng.normal(size=(2, 3, 16, 6)).astype(np.float32)
    sample[..., 4] = 300 + 10 * sample[..., 4]
    before, after = Moments(3, 6, pairs), Moments(3, 6, pairs)
    before.add(sample)
    treatment = before.treatment(kind, 10.0)
    assert treatment.channels == [4]
    after.add(treatment.apply(sample))
    derived = before.treated(treatment)
    np.testing.assert_allclose(derived._sums, after._sums, atol=1e-2)
    np.testing.assert_allclose(derived._squares, after._squares, rtol=1e-3, atol=1e-3)
    if pairs:
        np.testing.assert_allclose(derived._products, after._products, atol=1e-2)


def test_a_channel_is_massive_from_the_factor_times_the_median_on_at_any_timestep():
    amplitudes = np.array([[1.0, 1.0, 2.0, 9.9, 0.0], [1.0, 1.0, 1.0, 10.0, 0.0]])
    assert find_massive(amplitudes, 10.0).tolist() == [False, False, False, True, False]
    assert find_massive(amplitudes, 10.1).tolist() == [False] * 5
    assert find_massive(np.zeros((1, 3)), 10.0).tolist() == [False] * 3


def test_a_massive_channel_that_never_varies_becomes_zeros():
    means, squares = np.array([[0.0, 0.0, 50.0]]), np.array([[1.0, 1.0, 2500.0]])
    treatment = treatment_of(means, squares, "standardize", 10.0)
    features = np.array([[[0.5, -1.0, 50.0], [0.5, 2.0, 50.0]]], dtype=np.float32)
    assert treatment.apply(features).tolist() == [[[0.5, -1.0, 0.0], [0.5, 2.0, 0.0]]]


def test_features_are_left_as_they_were_given():
    samples, rows = tiny_samples()
    manifest = tiny_manifest(samples, rows, "float32")
    values = massive_features(range(2), manifest)["hidden"]
    copy = values.copy()
    treatment_of(np.zeros((3, 8)), np.full((3, 8), 1.0), "remove", 10.0).apply(values)
    assert (values == copy).all()
