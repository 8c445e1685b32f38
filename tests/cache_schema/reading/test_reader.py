"""Reading gives what was written, says clearly what is not there, and touches only the bytes asked for."""

import multiprocessing
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_building import (
    FEATURE_ROWS,
    IMAGE_ROWS,
    TIMESTEPS,
    build,
    commit_again,
    features_of,
    fill,
    image_of,
    many_examples,
    start,
)
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import (
    Cache,
    CacheCorrupt,
    CacheError,
    CacheNotFound,
    CacheRequestError,
    CacheUnsealed,
    TapInfo,
    open_cache,
)
from cache_schema.reading.open_shards import OpenShards
from cache_schema.storage.open_file import OpenFile

CacheOf = Callable[..., Path]
ENCODINGS = [
    ("float32", "none"),
    ("float32", "zstd"),
    ("float16", "none"),
    ("bfloat16", "zstd"),
    ("int8", "none"),
    ("int8", "zstd"),
    ("float8_e4m3", "none"),
]
# Both stores hold the same arrays; a tar is never compressed.
STORED = [(*encoding, "zarr") for encoding in ENCODINGS]
STORED += [(kind, compression, "webdataset") for kind, compression in ENCODINGS if compression == "none"]
TOLERANCE = {"float32": 0.0, "float16": 1e-3, "bfloat16": 8e-3, "int8": 3e-2, "float8_e4m3": 6e-2}
NUMPY_BITS = {"bfloat16": torch.uint16, "float8_e4m3": torch.uint8}


def assert_close(found: torch.Tensor, expected: np.ndarray, kind: str) -> None:
    """Compare in units of each channel's size: channel 1 is a hundred times larger than the others."""
    unit = np.ones(expected.shape[-1], np.float32)
    unit[1] = 100
    np.testing.assert_allclose(found.numpy() / unit, expected / unit, atol=TOLERANCE[kind] * 4, rtol=0)


@pytest.mark.parametrize(("kind", "compression", "store"), STORED)
@pytest.mark.parametrize("tap", ["hidden", "single.3"])
def test_features_come_back_for_any_rows_timesteps_and_views(
    cache_of: CacheOf, kind: str, compression: str, store: str, tap: str
) -> None:
    cache = open_cache(cache_of(kind=kind, compression=compression, store=store))
    truth = features_of(range(FEATURE_ROWS), cache.manifest)[tap]

    @many_examples
    @given(st.data())
    def check(data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, FEATURE_ROWS - 1), max_size=9))
        steps = data.draw(st.lists(st.sampled_from(TIMESTEPS), min_size=1, max_size=4))
        views = data.draw(st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows)) | st.integers(0, 1))
        batch = cache.read(rows, tap=tap, timesteps=steps, view=views)
        picked = truth[rows, views][:, [TIMESTEPS.index(step) for step in steps]]
        assert batch.shape == picked.shape
        assert_close(batch.decode(), picked, kind)

    check()


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_a_shard_larger_than_the_cache_and_an_empty_cache_work(tmp_path: Path, store: str) -> None:
    large = build(tmp_path / "large", samples_per_shard=100, store=store)
    assert_close(
        open_cache(large).read([6, 0]).decode(),
        features_of([6, 0], open_cache(large).manifest)["hidden"][:, 0],
        "float32",
    )
    empty = open_cache(build(tmp_path / "empty", feature_rows=0, kind="float16", store=store))
    assert len(empty) == 0
    assert empty.read([]).decode().shape == (0, 3, 6, 8)
    assert empty.images([0]) == [image_of(0)]


def test_a_view_can_be_named(cache_of: CacheOf) -> None:
    cache = open_cache(cache_of())
    assert torch.equal(cache.read([2], view="hflip").payload, cache.read([2], view=1).payload)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"rows": [7]}, "row 7 .* does not have features: rows 0 to 6 do"),
        ({"rows": [-1]}, "row -1"),
        ({"rows": [0.5]}, "row numbers"),
        ({"rows": [[0]]}, "row numbers"),
        ({"rows": [0], "tap": "velocity"}, r"lacks tap velocity \(has hidden, single.3\)"),
        ({"rows": [0], "timesteps": [10, 22]}, r"lacks timestep 22 \(has 10, 16, 28\)"),
        ({"rows": [0], "view": 2}, "views 0 to 1"),
        ({"rows": [0], "view": "crop"}, r"lacks view crop \(has canonical, hflip\)"),
        ({"rows": [0], "view": [0, 1]}, "1 rows need one view or 1"),
    ],
)
def test_what_the_cache_does_not_hold_is_named(cache_of: CacheOf, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheRequestError, match=message):
        open_cache(cache_of()).read(**request_)


def test_the_error_for_a_lacking_timestep_knows_those_of_a_cache_that_would_do(cache_of: CacheOf) -> None:
    with pytest.raises(CacheRequestError) as caught:
        open_cache(cache_of()).read([0], timesteps=[22, 10])
    assert caught.value.timesteps == [10, 16, 22, 28]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("int8", torch.int8),
        ("float8_e4m3", torch.float8_e4m3fn),
    ],
)
def test_a_given_buffer_is_filled_and_is_the_payload(cache_of: CacheOf, kind: str, dtype: torch.dtype) -> None:
    cache = open_cache(cache_of(kind=kind))
    fresh = cache.read([5, 1])
    out = torch.zeros((2, 3, 6, 8), dtype=dtype)
    batch = cache.read([5, 1], out=out)
    assert batch.payload.data_ptr() == out.data_ptr()
    assert torch.equal(out.view(torch.uint8), fresh.payload.view(torch.uint8))
    decoded = batch.decode()
    out.zero_()
    assert torch.equal(decoded, fresh.decode()), "decoded features do not share the buffer"
    bits = NUMPY_BITS.get(kind, dtype)
    array = torch.zeros((2, 3, 6, 8), dtype=bits).numpy()
    cache.read([5, 1], out=array)
    assert torch.equal(torch.from_numpy(array), fresh.payload.view(bits))


def read_only() -> np.ndarray:
    array = np.zeros((1, 3, 6, 8), np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.zeros(2, 3, 6, 8), "the batch is"),
        (torch.zeros(1, 3, 6, 8, dtype=torch.float64), "the batch is"),
        (torch.zeros(1, 3, 8, 6).transpose(2, 3), "contiguous"),
        (torch.zeros(1, 3, 6, 8, device="meta"), "CPU memory"),
        (read_only(), "read-only"),
    ],
)
def test_an_unfit_buffer_is_refused(cache_of: CacheOf, out: Any, message: str) -> None:
    with pytest.raises(CacheRequestError, match=message):
        open_cache(cache_of()).read([0], out=out)


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_reading_one_of_three_timesteps_reads_a_third_of_the_bytes(
    cache_of: CacheOf, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    calls: list[int] = []
    original = OpenFile.read_into

    def counted(self: OpenFile, view: memoryview, offset: int) -> None:
        calls.append(view.nbytes)
        original(self, view, offset)

    cache = open_cache(cache_of(store=store))
    cache.read([4])
    monkeypatch.setattr(OpenFile, "read_into", counted)
    cache.read([4], timesteps=[16])
    assert calls == [6 * 8 * 4]
    calls.clear()
    cache.read([4])
    assert calls == [3 * 6 * 8 * 4], "the timesteps of a view are one read"
    calls.clear()
    cache.images([3])
    assert calls == [len(image_of(3))]


def bytes_read() -> int:
    """What this process has asked the kernel to read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_subset_costs_hardly_more_than_the_bytes_asked_for(tmp_path: Path, store: str, kind: str) -> None:
    taps = [TapInfo(name=name, tokens=64, channels=96, grid=(8, 8)) for name in ("hidden", "velocity")]
    options = {"taps": taps, "views": ["canonical"], "feature_rows": 24, "samples_per_shard": 12}
    root = build(tmp_path / "cache", kind=kind, store=store, **options)
    cache = open_cache(root)
    cache.read([0])
    before = bytes_read()
    counting = bytes_read() - before
    for request in ({"timesteps": [16]}, {"timesteps": [28], "tap": "velocity"}, {"tap": "velocity"}):
        cache = open_cache(root)
        # The manifest, the calibration and whatever else concerns the whole cache are read with the last shard.
        cache.read([FEATURE_ROWS * 3], **request)
        before = bytes_read()
        batch = cache.read(range(20), **request)
        read = bytes_read() - before - counting
        asked = sum(part.nbytes for part in (batch.payload, batch.scale) if part is not None)
        assert asked <= read <= 1.1 * asked


def test_images_come_back_one_by_one_and_from_any_tar_tool(cache_of: CacheOf) -> None:
    root = cache_of()
    cache = open_cache(root)
    rows = [9, 0, 3, 4, 3]
    assert cache.images(rows) == [image_of(row) for row in rows]
    assert cache.images(np.array([1])) == [image_of(1)]
    for row in range(IMAGE_ROWS):
        with tarfile.open(root / "images" / f"{row // 4:05d}.tar") as tar:
            member = tar.extractfile(f"{row:08d}.png")
            assert member is not None
            assert member.read() == image_of(row)


def test_a_quarantined_row_has_neither_image_nor_features(cache_of: CacheOf) -> None:
    cache = open_cache(cache_of())
    assert cache.samples["state"][10].as_py() == "quarantined"
    assert not cache.has_features(10)
    with pytest.raises(CacheRequestError, match=r"row 10 .* does not have an image"):
        cache.images([10])


def test_a_cache_without_images_says_so(tmp_path: Path) -> None:
    cache = open_cache(build(tmp_path / "cache", with_images=False))
    with pytest.raises(CacheRequestError, match="built without images"):
        cache.images([0])


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_an_unfinished_cache_opens_only_when_that_is_asked_for(tmp_path: Path, store: str) -> None:
    writer = start(tmp_path / "cache", kind="int8", store=store)
    writer.write_shard(1, features_of(writer.shard_rows(1), writer.manifest))
    writer.write_images(0, [image_of(row) for row in writer.image_rows(0)])
    with pytest.raises(CacheUnsealed, match=r"4 of 7 samples have no features yet.*allow_partial=True") as caught:
        open_cache(tmp_path / "cache")
    assert caught.value.missing_samples == 4
    cache = open_cache(tmp_path / "cache", allow_partial=True)
    assert len(cache) == 3
    assert cache.missing_samples == 4
    assert list(cache.feature_rows) == [3, 4, 5]
    assert [row for row in range(-1, 12) if cache.has_features(row)] == [3, 4, 5]
    assert_close(cache.read([4]).decode(), features_of([4], cache.manifest)["hidden"][:, 0], "int8")
    assert cache.images([2]) == [image_of(2)]
    with pytest.raises(CacheUnsealed, match=r"row 0 .* has no features yet"):
        cache.read([0])
    with pytest.raises(CacheUnsealed, match="image shard 1"):
        cache.images([5])
    fill(writer).seal()
    assert len(open_cache(tmp_path / "cache")) == FEATURE_ROWS


def test_a_place_that_is_no_cache_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFound, match="no cache at"):
        open_cache(tmp_path)
    with pytest.raises(CacheError, match="no kind of place"):
        open_cache("ftp://team/cache")


def test_a_file_url_and_a_string_open_like_a_path(cache_of: CacheOf) -> None:
    root = cache_of()
    assert len(open_cache(str(root))) == len(open_cache(f"file://{root}")) == FEATURE_ROWS


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_reading_a_truncated_shard_names_its_file(
    cache_of: CacheOf, tmp_path: Path, compression: str, keep: float
) -> None:
    root = tmp_path / "cache"
    shutil.copytree(cache_of(compression=compression), root)
    shard = root / "features/hidden/c/1/0/0/0/0"
    size = shard.stat().st_size
    os.truncate(shard, int(size * keep) if isinstance(keep, float) else keep % size)
    cache = open_cache(root)
    assert cache.read([0]).shape == (1, 3, 6, 8)
    with pytest.raises(CacheCorrupt, match="c/1/0/0/0/0"):
        cache.read([0, 3])


def test_missing_files_are_called_damage(cache_of: CacheOf, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(cache_of(kind="int8"), root)
    cache = open_cache(root)
    (root / "features/hidden.scale/c/0/0/0/0").unlink()
    with pytest.raises(CacheCorrupt, match=r"hidden.scale"):
        cache.read([0])
    (root / "features/hidden.channel/c/0/0").write_bytes(bytes(96))
    with pytest.raises(CacheCorrupt, match=r"hidden.channel"):
        cache.read([4])
    (root / "images/index.npy").write_bytes(b"\x93NUMPY\x01\x00garbage")
    with pytest.raises(CacheCorrupt, match=r"index.npy"):
        cache.images([0])
    (root / "samples.parquet").unlink()
    with pytest.raises(CacheCorrupt, match=r"samples.parquet"):
        _ = open_cache(root).samples


def test_an_image_index_is_never_unpickled_nor_believed_beyond_its_file(cache_of: CacheOf, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(cache_of(), root)
    np.save(root / "images/index.npy", np.array([{"a": 1}] * 10, dtype=object), allow_pickle=True)
    commit_again(root, "seal", "images/index.npy")
    with pytest.raises(CacheCorrupt, match=r"index.npy"):
        open_cache(root).images([0])
    for place in ([0, 1 << 40], [1 << 40, 1], [-5, 10], [0, -1]):
        np.save(root / "images/index.npy", np.array([place] * 10, dtype="<i8"))
        with pytest.raises(CacheCorrupt, match="does not match its checksum"):
            open_cache(root).images([0])
        commit_again(root, "seal", "images/index.npy")
        with pytest.raises(CacheCorrupt, match="not inside"):
            open_cache(root).images([0])


def read_row(cache: Cache) -> torch.Tensor:
    return cache.read([4]).decode()


def test_a_cache_travels_to_other_processes_and_threads(cache_of: CacheOf) -> None:
    cache = open_cache(cache_of(kind="int8"))
    expected = read_row(cache)
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.manifest == cache.manifest
    assert torch.equal(read_row(copy), expected)
    for method in ("fork", "spawn"):
        if method == "fork":
            with multiprocessing.get_context(method).Pool(1) as pool:
                assert torch.equal(torch.tensor(pool.apply(_read_row_as_list, (cache,))), expected)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: read_row(cache), range(40)):
            assert torch.equal(found, expected)


def _read_row_as_list(cache: Cache) -> list:
    return read_row(cache).tolist()


def test_a_forked_process_opens_its_own_files(cache_of: CacheOf, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(cache_of())
    before = cache._opened
    assert cache._opened is before
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert cache._opened is not before


def test_few_files_stay_open_however_many_shards_are_read(tmp_path: Path) -> None:
    cache = open_cache(build(tmp_path / "cache", samples_per_shard=1, kind="int8"))
    cache._source.opened = OpenShards(cache.folder, max_files=3)
    for _ in range(3):
        cache.read(range(FEATURE_ROWS))
        cache.images(range(IMAGE_ROWS))
    assert len(cache._source.opened.shards) == 3
    assert len(cache._source.opened.files) == 3


def test_a_batch_moves_between_devices_still_encoded(cache_of: CacheOf) -> None:
    batch = open_cache(cache_of(kind="int8")).read([0, 1])
    moved = batch.to("cpu")
    assert moved.payload.dtype == torch.int8
    half = batch.decode(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, batch.decode().to(torch.bfloat16))
