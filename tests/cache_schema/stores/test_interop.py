"""Other people's readers open a cache's features and see the numbers that ours sees."""

import itertools
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import zarr
from cache_building import FEATURE_ROWS, tiny_samples

from cache_schema import Cache, open_cache
from cache_schema.format.layout import PAYLOAD_DTYPES, all_calibrations, all_layouts
from cache_schema.format.manifest import Compression

CacheOf = Callable[..., Path]
KINDS = list(PAYLOAD_DTYPES)
COMPRESSIONS = list(get_args(Compression))
_BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}


def stored_arrays(cache: Cache) -> dict[str, np.ndarray]:
    """What our reader finds: every array (N, V, T, *inner) of the cache, and the calibration of the channels."""
    arrays: dict[str, np.ndarray] = {}
    for tap in cache.manifest.taps:
        views = [cache.read(range(FEATURE_ROWS), tap=tap.name, view=view) for view in (0, 1)]
        payload = torch.stack([batch.payload for batch in views], dim=1)
        arrays[tap.name] = payload.view(_BITS.get(payload.dtype, payload.dtype)).numpy()
        if views[0].scale is not None and views[0].channel is not None:
            arrays[f"{tap.name}.scale"] = np.stack([batch.scale for batch in views], axis=1)
            arrays[f"{tap.name}.channel"] = views[0].channel.numpy()
    names = [array.name for array in (*all_layouts(cache.manifest), *all_calibrations(cache.manifest))]
    assert sorted(arrays) == sorted(names)
    return arrays


@pytest.mark.parametrize(("kind", "compression"), itertools.product(KINDS, COMPRESSIONS))
def test_zarr_python_sees_the_same_arrays(cache_of: CacheOf, kind: str, compression: str) -> None:
    root = cache_of(kind=kind, compression=compression)
    group = zarr.open_group(root / "features", mode="r")
    for name, expected in stored_arrays(open_cache(root)).items():
        np.testing.assert_array_equal(np.asarray(group[name][:]), expected)
    assert group["hidden"].metadata.dimension_names == ("sample", "view", "timestep", "token", "channel")
    assert sorted(group.array_keys()) == sorted(stored_arrays(open_cache(root)))


@pytest.mark.parametrize(("kind", "compression"), itertools.product(KINDS, COMPRESSIONS))
def test_tensorstore_sees_the_same_arrays(cache_of: CacheOf, kind: str, compression: str) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    root = cache_of(kind=kind, compression=compression)
    for name, expected in stored_arrays(open_cache(root)).items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(root / "features" / name)}}
        array = tensorstore.open(spec, read=True).result()
        np.testing.assert_array_equal(array.read().result(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_webdataset_sees_the_same_arrays(cache_of: CacheOf, kind: str) -> None:
    webdataset = pytest.importorskip("webdataset")
    root = cache_of(kind=kind, store="webdataset")
    expected = stored_arrays(open_cache(root))
    table, _ = tiny_samples()
    urls = [str(path) for path in sorted(root.glob("features/*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["json"]["row"] for sample in samples] == list(range(FEATURE_ROWS))
    for row, sample in enumerate(samples):
        assert sample["json"] == {"row": row, "label": table["label"][row].as_py(), "split": "train"}
        members = {name.removesuffix(".npy") for name in sample if name.endswith(".npy")}
        assert members == {name for name in expected if not name.endswith(".channel")}
        for name in members:
            np.testing.assert_array_equal(sample[f"{name}.npy"], expected[name][row])
    for name in [name for name in expected if name.endswith(".channel")]:
        np.testing.assert_array_equal(np.load(root / f"features/{name}.npy", allow_pickle=False), expected[name])


def test_the_tars_are_plain_files_without_owner_or_time(cache_of: CacheOf) -> None:
    root = cache_of(kind="int8", store="webdataset")
    with tarfile.open(root / "features/00002.tar", "r:") as tar:
        members = tar.getmembers()
        data = tar.extractfile(members[0])
        assert data is not None
        payload = np.load(BytesIO(data.read()), allow_pickle=False)
    assert [member.name for member in members] == [
        "00000006.hidden.npy",
        "00000006.hidden.scale.npy",
        "00000006.single.3.npy",
        "00000006.single.3.scale.npy",
        "00000006.json",
    ]
    assert all(member.isreg() and not member.pax_headers for member in members)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    np.testing.assert_array_equal(payload, stored_arrays(open_cache(root))["hidden"][6])
