"""Caches that an older release wrote are read, checked and trained on as they are."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from cache_building import damage, features_of, tiny_manifest, tiny_samples

from cache_schema import CacheCorrupt, create_cache, open_cache
from cache_schema.care.verify import verify

# A sealed int8 cache, as `building.build(path, kind="int8")` made it when the schema version was 1.
VERSION_1 = Path(__file__).parents[1] / "fixtures" / "version1.zip"


@pytest.fixture
def old_cache(tmp_path: Path) -> Path:
    with zipfile.ZipFile(VERSION_1) as archive:
        archive.extractall(tmp_path / "old")
    return tmp_path / "old"


def test_a_cache_of_version_1_keeps_its_id_and_its_features(old_cache: Path) -> None:
    cache = open_cache(old_cache)

    assert cache.manifest.schema_version == 2
    assert cache.manifest.cache_id == "7bd813bd27fc980a941714dd95ce50b0c6b18fd3eb2b006ca6bf737b80af8e9e"
    rows = [3, 0, 6]
    decoded = cache.read(rows, tap="hidden").decode().numpy()
    expected = features_of(rows, cache.manifest)["hidden"][:, 0]
    assert np.abs(decoded - expected).max() <= np.abs(expected).max() / 100


def test_a_cache_of_version_1_is_verified_with_its_own_checksums(old_cache: Path) -> None:
    assert verify(old_cache) == []
    shard = old_cache / "features/hidden/c/1/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)

    (problem,) = verify(old_cache)
    assert (problem.file, problem.shard, problem.rows) == ("features/hidden/c/1/0/0/0/0", 1, (3, 4))


def test_whole_rows_of_version_1_are_checked_as_they_are_read(old_cache: Path) -> None:
    damage(old_cache / "features/hidden/c/1/0/0/0/0", 5)
    cache = open_cache(old_cache)

    # Row 3 in its two views: its checksum covers both, so a single one of them cannot be checked.
    with pytest.raises(CacheCorrupt, match=r"shard 1, sample 'sample-3' \(row 3\)"):
        cache.read([0, 3, 3, 4], view=[0, 0, 1, 1])
    assert cache.read([3, 4, 4], view=[0, 0, 1]).shape == (3, 3, 6, 8)
    assert len(cache.images(range(10))) == 10


def test_the_same_inputs_find_the_old_cache_again(old_cache: Path) -> None:
    samples, rows = tiny_samples()

    writer = create_cache(old_cache, tiny_manifest(samples, rows, kind="int8"), samples)

    assert writer.missing_shards() == []
