"""Samples that the teacher failed on have no features: the cache says so everywhere, and is otherwise whole."""

import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from cache_building import build, damage, features_of, fill, start, tree

from cache_schema import CacheCorrupt, CacheError, CacheRequestError, CacheUnsealed, InvalidFeatures, open_cache
from cache_schema.care.describe import describe, describe_text
from cache_schema.care.verify import verify
from cache_schema.format.journal import FailedRow, read_record
from cache_schema.storage.local import LocalFolder
from cache_schema.writing.writer import CacheWriter

FAILED = {1: "NaN in tap hidden", 3: "out of range", 4: "NaN", 5: "NaN"}
REST = [0, 2, 6]


def write_with_failures(writer: CacheWriter, shards: list[int]) -> CacheWriter:
    """Write shards of three rows in which some rows failed; these have NaN in place of features."""
    for shard in shards:
        rows = writer.shard_rows(shard)
        features = features_of(rows, writer.manifest)
        failed = {row: reason for row, reason in FAILED.items() if row in rows}
        for values in features.values():
            values[[row - rows.start for row in failed]] = np.nan
        writer.write_shard(shard, features, failed)
    return writer


@pytest.fixture(params=["zarr", "webdataset"])
def store(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["bfloat16", "int8"])
def cache(request: pytest.FixtureRequest, store: str, tmp_path: Path) -> Path:
    """A sealed cache; the whole of its second shard failed."""
    writer = start(tmp_path / "cache", kind=request.param, store=store)
    fill(write_with_failures(writer, [0, 1, 2])).seal()
    return tmp_path / "cache"


def test_failed_rows_are_left_out_and_the_others_are_what_they_would_have_been(
    cache: Path, cache_of: Callable[..., Path]
) -> None:
    found = open_cache(cache)
    whole = open_cache(cache_of(kind=found.manifest.encoding.kind, store=found.manifest.store.kind))
    assert found.manifest.failed_rows == sorted(FAILED)
    assert len(found) == len(REST)
    assert list(found.feature_rows) == REST
    assert [row for row in range(-1, 12) if found.has_features(row)] == REST
    assert torch.equal(found.read(REST).payload, whole.read(REST).payload)
    assert found.manifest.cache_id == whole.manifest.cache_id
    assert all(0.99 < item.cosine_mean <= 1 for item in found.manifest.fidelity)
    assert found.images(sorted(FAILED)) == whole.images(sorted(FAILED))


def test_reading_a_failed_row_names_its_sample_and_where_the_reason_is(cache: Path) -> None:
    found = open_cache(cache)
    name = found.samples["id"][4].as_py()
    with pytest.raises(CacheRequestError, match=rf"sample '{name}' \(row 4\) .*journal/features-00001.json says how"):
        found.read([0, 4])
    record = read_record(LocalFolder(cache), "features", 1)
    assert record is not None
    assert record.failed == [FailedRow(row=row, reason=FAILED[row]) for row in (3, 4, 5)]


def test_a_cache_with_failed_rows_verifies_and_its_damage_is_still_found(cache: Path) -> None:
    assert verify(cache) == []
    files = [path for path in sorted((cache / "features").rglob("*")) if path.is_file()]
    for path in files:
        for place in (0, path.stat().st_size // 2):
            damage(path, place)
            assert str(path.relative_to(cache)) in {problem.file for problem in verify(cache)}
            damage(path, place)


def test_the_card_and_the_description_say_how_many_failed_and_why(cache: Path) -> None:
    assert "| without features | 4 images that the teacher failed on |" in (cache / "README.md").read_text()
    found = describe(cache)
    assert found["samples_with_features"] == len(REST)
    assert found["failed"] == [{"row": row, "reason": reason} for row, reason in FAILED.items()]
    text = [line.split() for line in describe_text(cache).splitlines()]
    assert ["the", "teacher", "failed", "on", "4"] in text
    assert ["row", "3", "out", "of", "range"] in text


def test_a_partial_cache_tells_failed_rows_from_missing_ones(tmp_path: Path, store: str) -> None:
    write_with_failures(start(tmp_path / "cache", store=store), [0])
    found = open_cache(tmp_path / "cache", allow_partial=True)
    assert list(found.feature_rows) == [0, 2]
    assert len(found) == 2
    assert describe(tmp_path / "cache")["failed"] == [{"row": 1, "reason": FAILED[1]}]
    with pytest.raises(CacheRequestError, match="the teacher failed on it"):
        found.read([1])
    with pytest.raises(CacheUnsealed, match=r"row 3 .* has no features yet"):
        found.read([3])
    assert verify(tmp_path / "cache") == []


def test_a_build_with_failures_resumes_to_the_same_bytes(tmp_path: Path, store: str) -> None:
    roots = [tmp_path / "whole", tmp_path / "resumed"]
    fill(write_with_failures(start(roots[0], store=store), [0, 1, 2])).seal()
    write_with_failures(start(roots[1], store=store), [1])
    fill(write_with_failures(start(roots[1], store=store), [0, 2])).seal()
    assert tree(roots[0]) == tree(roots[1])


def test_zarr_readers_see_missing_chunks_and_tar_readers_a_mark(tmp_path: Path) -> None:
    for name in ("zarr", "webdataset"):
        fill(write_with_failures(start(tmp_path / name, store=name), [0, 1, 2])).seal()
    array = zarr.open_group(tmp_path / "zarr/features", mode="r")["hidden"]
    assert not np.asarray(array[sorted(FAILED)]).any(), "a missing chunk is read as the fill value"
    assert np.asarray(array[REST]).any(axis=(1, 2, 3, 4)).all()
    with tarfile.open(tmp_path / "webdataset/features/00000.tar") as tar:
        marks = [tar.extractfile(f"0000000{row}.json").read() for row in (0, 1)]  # type: ignore[union-attr]
        payload = np.load(BytesIO(tar.extractfile("00000001.hidden.npy").read()))  # type: ignore[union-attr]
    assert [b'"failed":true' in mark for mark in marks] == [False, True]
    assert not payload.any()


def test_a_cache_in_which_everything_failed_is_sealed_without_figures(tmp_path: Path, store: str) -> None:
    writer = start(tmp_path / "cache", store=store)
    for shard in writer.missing_shards():
        rows = writer.shard_rows(shard)
        writer.write_shard(shard, features_of(rows, writer.manifest), dict.fromkeys(rows, "NaN"))
    manifest = fill(writer).seal()
    assert (manifest.failed_rows, manifest.fidelity) == (list(range(7)), [])
    assert len(open_cache(tmp_path / "cache")) == 0
    assert verify(tmp_path / "cache") == []


def test_values_that_are_not_finite_elsewhere_are_still_refused(tmp_path: Path, store: str) -> None:
    writer = start(tmp_path / "cache", store=store)
    features = features_of(writer.shard_rows(0), writer.manifest)
    features["hidden"][:2] = np.nan
    with pytest.raises(InvalidFeatures, match=r"tap hidden of sample '.*' \(row 1\)"):
        writer.write_shard(0, features, {0: "NaN"})
    with pytest.raises(CacheError, match="row 3 cannot have failed in shard 0"):
        writer.write_shard(0, features, {3: "NaN"})
    assert writer.missing_shards() == [0, 1, 2]


def test_a_chunk_that_is_missing_without_a_failure_is_damage(tmp_path: Path) -> None:
    """The index of a shard in which a row failed, in a cache in which none did."""
    write_with_failures(start(tmp_path / "failed"), [0])
    root = build(tmp_path / "whole")
    name = "features/hidden/c/0/0/0/0/0"
    (root / name).write_bytes((tmp_path / "failed" / name).read_bytes())
    with pytest.raises(CacheCorrupt, match=r"lacks the features: shard 0, sample 'sample-5' \(row 1\)"):
        open_cache(root).read([1])


def test_the_layout_record_lists_the_quarantined_samples(tmp_path: Path, store: str) -> None:
    start(tmp_path / "cache", store=store)
    record = read_record(LocalFolder(tmp_path / "cache"), "layout")
    assert record is not None
    assert [(item.id, item.reason) for item in record.quarantined] == [("sample-10", "the file is empty")]
