"""Each row may be read at timesteps of its own, which costs the bytes of those alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_building import FEATURE_ROWS, TIMESTEPS, many_examples
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import CacheCorrupt, CacheRequestError, open_cache
from cache_schema.storage.open_file import OpenFile

CacheOf = Callable[..., Path]


@pytest.mark.parametrize(
    ("kind", "compression", "store"),
    [("float32", "none", "zarr"), ("int8", "none", "zarr"), ("int8", "zstd", "zarr"), ("int8", "none", "webdataset")],
)
def test_rows_read_together_are_what_they_are_when_read_alone(
    cache_of: CacheOf, kind: str, compression: str, store: str
) -> None:
    cache = open_cache(cache_of(kind=kind, compression=compression, store=store))

    @many_examples
    @given(st.data())
    def check(data: st.DataObject) -> None:
        B, T = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 3))
        rows = data.draw(st.lists(st.integers(0, FEATURE_ROWS - 1), min_size=B, max_size=B))
        views = data.draw(st.lists(st.integers(0, 1), min_size=B, max_size=B))
        flat = data.draw(st.lists(st.sampled_from(TIMESTEPS), min_size=B * T, max_size=B * T))
        steps = np.array(flat, dtype=np.int64).reshape(B, T)
        batch = cache.read(rows, timesteps=steps, view=views)
        assert batch.shape[:2] == (B, T)
        together = batch.decode()
        for i in range(B):
            alone = cache.read([rows[i]], timesteps=steps[i].tolist(), view=views[i]).decode()
            assert torch.equal(together[i], alone[0])

    check()


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_only_each_rows_own_timesteps_are_read_and_neighbours_at_once(
    cache_of: CacheOf, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    cache, calls = open_cache(cache_of(store=store)), []
    cache.read(range(FEATURE_ROWS))
    original = OpenFile.read_into

    def counted(self: OpenFile, view: memoryview, offset: int) -> None:
        calls.append(view.nbytes)
        original(self, view, offset)

    monkeypatch.setattr(OpenFile, "read_into", counted)
    cache.read([4, 2, 5], timesteps=np.array([[10, 16], [10, 28], [16, 28]]))
    one = 6 * 8 * 4
    assert sorted(calls) == [one, one, 2 * one, 2 * one]


def test_damage_names_the_timestep_of_its_own_row(cache_of: CacheOf, tmp_path: Path) -> None:
    root = cache_of()
    damaged = tmp_path / "damaged"
    shutil.copytree(root, damaged)
    wanted = open_cache(damaged).read([0], timesteps=[28]).payload.numpy().tobytes()
    for file in (damaged / "features" / "hidden").rglob("*"):
        if file.is_file() and wanted in (data := file.read_bytes()):
            file.write_bytes(data.replace(wanted, bytes(len(wanted))))
    cache = open_cache(damaged)
    cache.read([0, 0], timesteps=np.array([[10, 16], [16, 10]]))
    with pytest.raises(CacheCorrupt, match="timestep 28"):
        cache.read([1, 0], timesteps=np.array([[10, 16], [16, 28]]))


def test_timesteps_of_another_number_of_rows_are_refused(cache_of: CacheOf) -> None:
    cache = open_cache(cache_of())
    with pytest.raises(CacheRequestError, match="2 rows need the timesteps of 2, not of 1"):
        cache.read([0, 1], timesteps=np.array([[10]]))
    with pytest.raises(CacheRequestError, match="lacks timestep 11"):
        cache.read([0], timesteps=np.array([[11]]))
