"""`Cache.zarr` and `Cache.webdataset` are the libraries' own objects, and give the features that `Cache.read` gives."""

import itertools
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import zarr
from cache_building import (
    FEATURE_ROWS,
    TAPS,
    TIMESTEPS,
    VIEWS,
    build,
    damage,
    features_of,
    image_of,
    some_examples,
    start,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from cache_schema import Cache, CacheCorrupt, CacheRequestError, CacheUnsealed, open_cache
from cache_schema.format.layout import PAYLOAD_DTYPES
from cache_schema.format.manifest import Compression

webdataset = pytest.importorskip("webdataset")

CacheOf = Callable[..., Path]
ENCODINGS = [{"kind": kind, **reduction} for kind in PAYLOAD_DTYPES for reduction in ({}, {"pool": 2}, {"pca": 3})]
ROWS = range(FEATURE_ROWS)


def features(cache: Cache, tap: str) -> torch.Tensor:
    """(N, V, T, L, C), by our own reader."""
    return torch.stack([cache.read(ROWS, tap=tap, view=view).decode() for view in VIEWS], dim=1)


def slices(cache: Cache, tap: str, where: tuple[object, ...]) -> list[np.ndarray]:
    """The same slice of everything that is stored per sample."""
    parts = ["payload", "scale"] if cache.manifest.encoding.scaled else ["payload"]
    return [np.asarray(cache.zarr(tap, part)[where]) for part in parts]


# --- zarr


@pytest.mark.parametrize(("encoding", "compression"), itertools.product(ENCODINGS, get_args(Compression)))
def test_slices_of_a_zarr_array_decode_to_what_the_reader_gives(
    cache_of: CacheOf, encoding: dict, compression: str
) -> None:
    cache = open_cache(cache_of(**encoding, compression=compression))
    for tap in TAPS:
        assert type(cache.zarr(tap)) is zarr.Array
        found = cache.decode(*slices(cache, tap, (slice(None),)), tap=tap)
        assert found.dtype == torch.float32
        assert torch.equal(found, features(cache, tap))


@some_examples
@given(st.sampled_from(["int8", "bfloat16"]), st.data())
def test_any_slice_that_keeps_the_timesteps_axis_decodes(cache_of: CacheOf, kind: str, data: st.DataObject) -> None:
    cache = open_cache(cache_of(kind=kind))
    first = data.draw(st.integers(0, FEATURE_ROWS))
    row = data.draw(
        st.integers(0, FEATURE_ROWS - 1) | st.builds(slice, st.just(first), st.integers(first, FEATURE_ROWS))
    )
    view = data.draw(st.integers(0, 1) | st.just(slice(None)))
    step = data.draw(st.integers(0, len(TIMESTEPS) - 1))
    expected = features(cache, "hidden").numpy()
    found = cache.decode(*slices(cache, "hidden", (row, view, slice(step, step + 1))), timesteps=[TIMESTEPS[step]])
    np.testing.assert_array_equal(found, expected[row, view, step : step + 1])


def test_the_statistics_are_arrays_too_and_nothing_can_be_written(cache_of: CacheOf) -> None:
    cache = open_cache(cache_of(kind="int8", pca=3))
    assert cache.zarr(part="channel").shape == (len(TIMESTEPS), 3)
    assert cache.zarr(part="basis").shape == (3, 8)
    np.testing.assert_array_equal(cache.zarr(part="channel")[:], cache.read([0]).channel)
    with pytest.raises(ValueError, match="read-only"):
        cache.zarr()[0] = 0


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda cache: cache.zarr("velocity"), "lacks tap velocity"),
        (lambda cache: cache.zarr(part="scale"), "has no part scale .has payload."),
        (lambda cache: cache.decode(cache.zarr()[:, :, 0]), "stored values are"),
        (lambda cache: cache.decode(cache.zarr()[:].astype("float64")), "stored values are"),
        (lambda cache: cache.decode(cache.zarr()[:], np.ones((7, 2, 3, 6), "float32")), "float32 has no scales"),
        (lambda cache: cache.webdataset(), "cache tiny.* no tars .* convert it to the webdataset store"),
    ],
)
def test_what_a_zarr_cache_does_not_hold_is_said(cache_of: CacheOf, request_of: Callable, message: str) -> None:
    with pytest.raises(CacheRequestError, match=message) as caught:
        request_of(open_cache(cache_of()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [None, np.ones((2, 3, 6), "float64"), np.ones((2, 3, 5), "float32")])
def test_scaled_values_are_not_decoded_without_their_scales(cache_of: CacheOf, scale: np.ndarray | None) -> None:
    cache = open_cache(cache_of(kind="int8"))
    with pytest.raises(CacheRequestError, match="int8 needs the scales"):
        cache.decode(cache.zarr()[0], scale)


def test_metadata_that_is_not_the_manifests_is_never_handed_to_zarr(tmp_path: Path, cache_of: CacheOf) -> None:
    root = build(tmp_path / "cache", kind="int8")
    damage(root / "features/hidden/zarr.json", 40)
    with pytest.raises(CacheCorrupt, match=re.escape(str(root / "features/hidden/zarr.json"))):
        open_cache(root).zarr()


# --- webdataset


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_samples_of_a_webdataset_pipeline_are_what_the_reader_gives(cache_of: CacheOf, encoding: dict) -> None:
    cache = open_cache(cache_of(**encoding, store="webdataset"))
    pipeline = cache.webdataset()
    assert isinstance(pipeline, webdataset.WebDataset)
    samples, table = list(pipeline), cache.samples.to_pylist()
    assert [sample["row"] for sample in samples] == list(ROWS)
    for row, sample in enumerate(samples):
        assert {name: sample[name] for name in ("id", "label", "split")} == {
            name: table[row][name] for name in ("id", "label", "split")
        }
        assert sample["png"] == image_of(row)
        for tap in TAPS:
            assert torch.equal(sample[tap], features(cache, tap)[row])


def test_a_pipeline_gives_the_taps_timesteps_and_views_that_are_asked_for(cache_of: CacheOf) -> None:
    cache = open_cache(cache_of(kind="int8", store="webdataset", with_images=False))
    for row, sample in enumerate(cache.webdataset(["single.3"], timesteps=[28, 10], views=["hflip"])):
        expected = cache.read([row], tap="single.3", timesteps=[28, 10], view="hflip").decode()
        assert torch.equal(sample["single.3"], expected)
        assert not {"hidden", "png"} & sample.keys()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_shuffling_batching_and_worker_processes_are_webdatasets_own(cache_of: CacheOf, context: str) -> None:
    cache = open_cache(cache_of(kind="bfloat16", store="webdataset"))
    pipeline = cache.webdataset(["hidden"], shardshuffle=3, seed=1).shuffle(4).to_tuple("row", "hidden").batched(3)
    loader = DataLoader(pipeline, batch_size=None, num_workers=2, multiprocessing_context=context)
    found = [(int(row), tokens) for rows, stack in loader for row, tokens in zip(rows, stack, strict=True)]
    assert sorted(row for row, _ in found) == list(ROWS)
    for row, tokens in found:
        assert torch.equal(tokens, features(cache, "hidden")[row])


def test_samples_that_the_teacher_failed_on_are_left_out(tmp_path: Path) -> None:
    writer = start(tmp_path / "cache", store="webdataset", kind="int8", with_images=False)
    for shard in writer.missing_shards():
        rows = writer.shard_rows(shard)
        failed = {row: "not finite" for row in rows if row == 4}
        writer.write_shard(shard, features_of(rows, writer.manifest), failed)
    writer.seal()
    found = [sample["row"] for sample in open_cache(tmp_path / "cache").webdataset()]
    assert found == [row for row in ROWS if row != 4]


def test_a_partial_cache_gives_the_samples_that_it_has(tmp_path: Path) -> None:
    writer = start(tmp_path / "cache", store="webdataset", kind="int8")
    writer.write_shard(1, features_of(writer.shard_rows(1), writer.manifest))
    cache = open_cache(tmp_path / "cache", allow_partial=True)
    assert [sample["row"] for sample in cache.webdataset(images=False)] == [3, 4, 5]
    with pytest.raises(CacheUnsealed, match="image shard 0"):
        next(iter(cache.webdataset()))


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda cache: cache.webdataset(["velocity"]), "lacks tap velocity"),
        (lambda cache: cache.webdataset(timesteps=[11]), "lacks timestep 11"),
        (lambda cache: cache.webdataset(views=["crop.1"]), "lacks view crop.1"),
        (lambda cache: cache.zarr(), "no Zarr arrays.*convert it to the zarr store"),
    ],
)
def test_what_a_cache_of_tars_does_not_hold_is_said(cache_of: CacheOf, request_of: Callable, message: str) -> None:
    with pytest.raises(CacheRequestError, match=message):
        request_of(open_cache(cache_of(store="webdataset")))


def test_without_webdataset_one_line_says_what_to_install(cache_of: CacheOf, monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "webdataset":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.delitem(sys.modules, "webdataset")
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(CacheRequestError, match=re.escape("pip install 'dit-distill[webdataset]'")):
        open_cache(cache_of(store="webdataset")).webdataset()


def test_a_damaged_tar_is_an_error_that_names_it(tmp_path: Path) -> None:
    root = build(tmp_path / "cache", store="webdataset", with_images=False)
    shard = root / "features/00001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"'shape': (2, 3, 6, 8)", b"'shape': (2, 3, 8, 6)", 1))
    with pytest.raises(CacheCorrupt, match=r"00001\.tar has no .* values of hidden"):
        list(open_cache(root).webdataset())


def test_a_pipeline_can_be_pickled(cache_of: CacheOf) -> None:
    pipeline = open_cache(cache_of(store="webdataset")).webdataset()
    assert len(list(pickle.loads(pickle.dumps(pipeline)))) == FEATURE_ROWS
