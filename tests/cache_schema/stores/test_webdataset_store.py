"""In a tar, every chunk is where the manifest says, and nothing that the tar itself says is believed."""

import contextlib
import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cache_building import damage, features_of, many_examples, start, tiny_manifest, tiny_samples
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cache_schema import CacheCorrupt, CacheError, CropsInfo, TapInfo, open_cache
from cache_schema.care.verify import verify
from cache_schema.format.layout import all_layouts
from cache_schema.storage.open_file import OpenFile
from cache_schema.stores.registry import store_of
from cache_schema.stores.webdataset_store import npy_header

CacheOf = Callable[..., Path]


@pytest.fixture
def copy(cache_of: CacheOf, tmp_path: Path) -> Path:
    """A sealed cache in tars that may be damaged."""
    shutil.copytree(cache_of(kind="int8", store="webdataset"), tmp_path / "cache")
    return tmp_path / "cache"


@many_examples
@given(
    st.sampled_from(["float32", "float16", "uint16", "int8", "uint8"]),
    st.lists(st.integers(1, 1 << 20), min_size=1, max_size=2),
    st.lists(st.integers(1, 4096), min_size=2, max_size=2),
)
def test_an_npy_header_is_the_one_numpy_writes(dtype: str, inner: list[int], outer: list[int]) -> None:
    shape = (*outer, *inner)
    expected = io.BytesIO()
    # An array of this shape that takes no memory.
    header = np.lib.format.header_data_from_array_1_0(np.broadcast_to(np.zeros((), dtype), shape))
    np.lib.format.write_array_header_1_0(expected, {**header, "fortran_order": False})
    assert npy_header(dtype, shape) == expected.getvalue()


def test_every_computed_chunk_is_the_one_the_tar_holds(cache_of: CacheOf) -> None:
    root = cache_of(kind="int8", store="webdataset")
    manifest = open_cache(root).manifest
    store = store_of(manifest)
    for array in all_layouts(manifest):
        for shard, rows in ((0, range(3)), (2, range(6, 7))):
            name = store.array_file(array, shard)
            index = store.read_index(OpenFile(str(root / name)), array, shard)
            assert (index.offsets[len(rows) :] == -1).all()
            with tarfile.open(root / name) as tar:
                for local, row in enumerate(rows):
                    member = tar.getmember(f"{row:08d}.{array.name}.npy")
                    chunk = member.offset_data + 128 + index.lengths[0, 0, 0] * np.arange(6).reshape(2, 3)
                    np.testing.assert_array_equal(index.offsets[local], chunk)
                    assert member.size == 128 + index.lengths[local].sum()


def test_a_shard_of_another_size_is_refused_before_anything_is_read(copy: Path) -> None:
    shard = copy / "features/00001.tar"
    os.truncate(shard, shard.stat().st_size - 512)
    cache = open_cache(copy)
    assert cache.read([0]).shape == (1, 3, 6, 8)
    with pytest.raises(CacheCorrupt, match=r"00001.tar is truncated or not of this cache: \d+ bytes instead of \d+"):
        cache.read([3])


@pytest.mark.parametrize("place", ["header", "npy header", "padding", "json", "end"])
def test_damage_between_the_rows_is_found_and_does_not_hurt_them(copy: Path, place: str) -> None:
    shard = copy / "features/00001.tar"
    with tarfile.open(shard) as tar:
        payload, description = tar.getmember("00000003.hidden.npy"), tar.getmember("00000003.json")
    damage(
        shard,
        {
            "header": payload.offset,
            "npy header": payload.offset_data + 20,
            "padding": payload.offset_data + payload.size,
            "json": description.offset_data,
            "end": -1,
        }[place],
    )
    (problem,) = verify(copy)
    assert (problem.file, problem.shard, problem.rows) == ("features/00001.tar", 1, (3, 6))
    assert "between the rows" in problem.reason
    manifest = open_cache(copy).manifest
    found = open_cache(copy).read([3], timesteps=[10]).decode().numpy()
    assert np.abs(found - features_of([3], manifest)["hidden"][:, 0, :1]).max() < 2


@pytest.mark.parametrize("member", ["hidden.npy", "hidden.scale.npy", "single.3.npy", "single.3.scale.npy"])
def test_a_flipped_byte_in_any_member_is_found_with_its_row(copy: Path, member: str) -> None:
    shard = copy / "features/00001.tar"
    with tarfile.open(shard) as tar:
        place = tar.getmember(f"00000004.{member}")
    damage(shard, place.offset_data + place.size - 1)
    (problem,) = verify(copy)
    assert (problem.file, problem.shard, problem.rows) == ("features/00001.tar", 1, (4, 5))
    assert "checksum" in problem.reason


def test_two_damaged_members_of_one_row_are_one_problem(copy: Path) -> None:
    shard = copy / "features/00000.tar"
    with tarfile.open(shard) as tar:
        for member in ("00000001.hidden.npy", "00000001.single.3.npy", "00000002.hidden.npy"):
            damage(shard, tar.getmember(member).offset_data + 128)
    assert [problem.rows for problem in verify(copy)] == [(1, 3)]


def test_members_that_point_elsewhere_are_never_followed(copy: Path, tmp_path: Path) -> None:
    """A hostile tar of the right size: our reader looks at no more than the file itself, whatever its headers say."""
    shard = copy / "features/00000.tar"
    size = shard.stat().st_size
    with tarfile.open(shard, "w") as tar:
        for name, kind in (("../../escaped", tarfile.REGTYPE), ("/etc/passwd", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", 1 << 40 if kind == tarfile.REGTYPE else 0
            tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(shard, size)
    before = sorted(tmp_path.rglob("*"))
    with contextlib.suppress(CacheCorrupt):
        open_cache(copy).read([0, 1, 2])
    assert verify(copy)[0].file == "features/00000.tar"
    assert sorted(tmp_path.rglob("*")) == before


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def test_a_pickled_calibration_is_refused_without_being_unpickled(copy: Path, tmp_path: Path) -> None:
    bomb = _Bomb(tmp_path / "executed")
    calibration = copy / "features/hidden.channel.npy"
    size = calibration.stat().st_size
    stream = io.BytesIO()
    np.save(stream, np.array([bomb], dtype=object), allow_pickle=True)
    for data in (stream.getvalue(), stream.getvalue().ljust(size, b"\0"), pickle.dumps(bomb), b""):
        calibration.write_bytes(data)
        with pytest.raises(CacheCorrupt, match=r"hidden.channel.npy"):
            open_cache(copy).read([0])
        assert not bomb.path.exists()


def test_samples_larger_than_a_tar_member_are_refused_at_planning() -> None:
    samples, rows = tiny_samples()
    taps = [TapInfo(name="hidden", tokens=1 << 14, channels=1 << 14, grid=(1 << 7, 1 << 7))]
    crops = CropsInfo(scale=(0.2, 1.0), ratio=(0.75, 1.5))
    views = ["canonical", "hflip", "crop.0", "crop.1"]
    options = {"taps": taps, "samples_per_shard": 1, "views": views, "crops": crops}
    assert tiny_manifest(samples, rows, "float32", **options).store.kind == "zarr"
    assert tiny_manifest(samples, rows, "int8", store="webdataset", **options).store.kind == "webdataset"
    with pytest.raises(CacheError, match=r"hidden takes 12\.9 GB, more than .*; choose the zarr store"):
        tiny_manifest(samples, rows, "float32", store="webdataset", **options)


def test_a_compressed_tar_is_refused_at_planning() -> None:
    samples, rows = tiny_samples()
    with pytest.raises(ValidationError, match="not compressed"):
        tiny_manifest(samples, rows, compression="zstd", store="webdataset")


def test_a_row_of_the_wrong_shape_is_not_written(tmp_path: Path) -> None:
    writer = start(tmp_path / "cache", store="webdataset", samples_per_shard=1)
    rows = [{"hidden": np.zeros((2, 3, 6, 7), np.float32), "single.3": np.zeros((2, 3, 4, 5), np.float32)}]
    with pytest.raises(ValueError, match="expected"):
        writer.write_encoded_shard(0, rows, list, {})
    assert writer.missing_shards() == list(range(7))
