"""A cache goes from one store to the other and back without losing a bit, whatever interrupts it on the way."""

import os
import shutil
import signal
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from cache_building import (
    FEATURE_ROWS,
    IMAGE_ROWS,
    VIEWS,
    build,
    damage,
    features_of,
    fill,
    some_examples,
    start,
    tiny_manifest,
    tiny_samples,
    tree,
)
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import (
    CacheCorrupt,
    CacheError,
    CacheMismatch,
    CacheUnsealed,
    Provenance,
    TapInfo,
    create_cache,
    open_cache,
)
from cache_schema.advice import advised
from cache_schema.care.convert import convert
from cache_schema.care.verify import verify
from cache_schema.format.layout import PAYLOAD_DTYPES
from cache_schema.format.manifest import Compression
from cache_schema.storage import files

CacheOf = Callable[..., Path]
VERSION_1 = Path(__file__).parents[1] / "fixtures" / "version1.zip"


def without_provenance(root: Path) -> dict[str, bytes]:
    """All of a cache but its manifest's provenance."""
    found = tree(root)
    manifest = open_cache(root).manifest
    found["manifest.json"] = manifest.model_copy(update={"provenance": Provenance()}).model_dump_json().encode()
    return found


def assert_same_contents(first: Path, second: Path) -> None:
    """Compare everything that a store must not change."""
    ours, theirs = open_cache(first), open_cache(second)
    assert ours.manifest.cache_id == theirs.manifest.cache_id
    assert ours.manifest.fidelity == theirs.manifest.fidelity
    assert ours.manifest.failed_rows == theirs.manifest.failed_rows
    assert ours.samples.equals(theirs.samples)
    assert ours.images(range(IMAGE_ROWS)) == theirs.images(range(IMAGE_ROWS))
    for tap in ours.manifest.taps:
        for view in VIEWS:
            batches = [cache.read(ours.feature_rows, tap=tap.name, view=view) for cache in (ours, theirs)]
            for part in ("payload", "scale", "channel"):
                a, b = (getattr(batch, part) for batch in batches)
                assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize(
    "options", [*({"kind": kind} for kind in PAYLOAD_DTYPES), {"kind": "int8", "pca": 4, "pool": 2}]
)
def test_there_and_back_differs_in_nothing_but_the_provenance(
    cache_of: CacheOf, tmp_path: Path, options: dict[str, Any]
) -> None:
    source = cache_of(**options)
    convert(source, tmp_path / "tars", "webdataset")
    convert(tmp_path / "tars", tmp_path / "back", "zarr")
    assert without_provenance(tmp_path / "tars") == without_provenance(cache_of(**options, store="webdataset"))
    assert without_provenance(tmp_path / "back") == without_provenance(source)
    assert_same_contents(source, tmp_path / "tars")


@some_examples
@given(data=st.data())
def test_any_settings_keep_the_contents(
    data: st.DataObject, cache_of: CacheOf, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind = data.draw(st.sampled_from(["float16", "int8"]))
    source, root = cache_of(kind=kind), tmp_path_factory.mktemp("chain")
    for step in range(data.draw(st.integers(1, 2))):
        store: Any = data.draw(st.sampled_from(["zarr", "webdataset"]))
        compression: Any = data.draw(st.sampled_from([None, *(get_args(Compression) if store == "zarr" else ["none"])]))
        samples = data.draw(st.none() | st.integers(1, 9))
        copied: list[int] = []
        manifest = convert(source, root / str(step), store, compression, samples, copied.append)
        assert sum(copied) == FEATURE_ROWS
        assert manifest.store.kind == store
        assert compression in (None, manifest.encoding.compression)
        assert samples in (None, manifest.store.samples_per_shard)
        source = root / str(step)
        assert verify(source) == []
    assert_same_contents(cache_of(kind=kind), source)


def test_the_copy_keeps_its_provenance_and_says_what_it_was_copied_from(tmp_path: Path) -> None:
    made = Provenance(created="2026-01-02", device="a GPU", command="dit-cache build", seconds=3.0)
    build(tmp_path / "cache", made, kind="int8")
    manifest = convert(tmp_path / "cache", tmp_path / "tars", "webdataset", samples_per_shard=2)
    source = open_cache(tmp_path / "cache").manifest
    assert manifest.provenance.converted == (
        f"from zarr, 3 samples per shard, compression none, manifest {source.provenance.checksum}"
    )
    assert manifest.provenance.model_copy(update={"converted": None, "checksum": None}) == made


def test_failed_rows_stay_failed_for_the_same_reasons(tmp_path: Path) -> None:
    writer = start(tmp_path / "cache", kind="int8")
    for shard, failed in enumerate([{0: "first", 1: "second"}, {3: "a", 4: "b", 5: "c"}, {}]):
        writer.write_shard(shard, features_of(writer.shard_rows(shard), writer.manifest), failed)
    fill(writer).seal()
    convert(tmp_path / "cache", tmp_path / "tars", "webdataset", samples_per_shard=2)
    convert(tmp_path / "tars", tmp_path / "back", "zarr", samples_per_shard=3)
    convert(tmp_path / "cache", tmp_path / "same", "webdataset")
    convert(tmp_path / "same", tmp_path / "round", "zarr")
    for copy in ("tars", "back", "same", "round"):
        assert_same_contents(tmp_path / "cache", tmp_path / copy)
        assert open_cache(tmp_path / copy).manifest.failed_rows == [0, 1, 3, 4, 5]
        assert verify(tmp_path / copy) == []
    assert without_provenance(tmp_path / "round") == without_provenance(tmp_path / "cache")


def test_a_cache_of_version_1_is_converted(tmp_path: Path) -> None:
    with zipfile.ZipFile(VERSION_1) as archive:
        archive.extractall(tmp_path / "old")
    convert(tmp_path / "old", tmp_path / "tars", "webdataset", samples_per_shard=4)
    assert_same_contents(tmp_path / "old", tmp_path / "tars")
    damage(tmp_path / "old/features/hidden/c/1/0/0/0/0", 5)
    with pytest.raises(CacheCorrupt, match=r"hidden/c/1/0/0/0/0 \(shard 1\) is damaged: sample '.*' \(row 3\)"):
        convert(tmp_path / "old", tmp_path / "again", "webdataset")


@some_examples
@given(store=st.sampled_from(["zarr", "webdataset"]), moments=st.lists(st.integers(0, 40), min_size=1, max_size=3))
def test_a_conversion_killed_at_any_moments_ends_in_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, cache_of: CacheOf, store: Any, moments: list[int]
) -> None:
    other: Any = "webdataset" if store == "zarr" else "zarr"
    source, root = cache_of(kind="int8", store=other), tmp_path_factory.mktemp("killed")
    for moment in moments:
        assert run_until_killed(source, root / "cache", store, moment)
    convert(source, root / "cache", store)
    assert without_provenance(root / "cache") == without_provenance(cache_of(kind="int8", store=store))


def run_until_killed(source: Path, target: Path, store: Any, moment: int) -> bool:
    """Convert in a process that kills itself at its n-th flush; say whether it was killed, or done before."""
    child = os.fork()
    if child == 0:
        flush, left = os.fsync, [moment]

        def flush_or_die(fd: int) -> None:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            flush(fd)

        files.os.fsync = flush_or_die  # type: ignore[attr-defined]
        try:
            convert(source, target, store)
        finally:
            os._exit(7)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status) in (-signal.SIGKILL, 7)


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_damage_is_named_and_not_copied(cache_of: CacheOf, tmp_path: Path, store: Any) -> None:
    source = tmp_path / "cache"
    shutil.copytree(cache_of(kind="int8", store=store), source)
    other: Any = "webdataset" if store == "zarr" else "zarr"
    sample = open_cache(source).samples["id"][4].as_py()
    if store == "zarr":
        name = "features/single.3.scale/c/1/0/0/0"
        data = (source / name).read_bytes()
        place = len(data[: -16 * 18 - 4]) // 2
    else:
        name = "features/00001.tar"
        data = (source / name).read_bytes()
        place = data.index(b"00000004.single.3.scale.npy") + 512 + 128
    damage(source / name, place)
    expected = rf"{name} \(shard 1\) is damaged: sample '{sample}' \(row 4\).*lists all damage"
    with pytest.raises(CacheCorrupt, match=expected) as caught:
        convert(source, tmp_path / "copy", other)
    assert (caught.value.shard, caught.value.row, caught.value.sample) == (1, 4, sample)
    assert advised(caught.value).endswith(f"; `dit-cache verify {source}` lists all damage")
    with pytest.raises(CacheUnsealed, match="4 of 7 samples have no features yet"):
        open_cache(tmp_path / "copy")
    assert verify(tmp_path / "copy") == []
    (source / name).write_bytes(data)
    convert(source, tmp_path / "copy", other)
    assert_same_contents(source, tmp_path / "copy")


@some_examples
@given(data=st.data())
def test_a_flipped_byte_is_never_given_a_fresh_checksum(
    data: st.DataObject, cache_of: CacheOf, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever file of the source is damaged, the conversion refuses it or copies what was there before."""
    store: Any = data.draw(st.sampled_from(["zarr", "webdataset"]))
    source, root = cache_of(kind="int8", store=store), tmp_path_factory.mktemp("damaged")
    path = data.draw(st.sampled_from(sorted(path for path in source.rglob("*") if path.is_file())))
    place = data.draw(st.integers(0, path.stat().st_size - 1))
    damage(path, place)
    try:
        convert(source, root / "copy", "webdataset" if store == "zarr" else "zarr")
    except CacheError:
        return
    finally:
        damage(path, place)
    assert verify(root / "copy") == []
    assert_same_contents(source, root / "copy")


def test_damaged_images_and_samples_are_refused(cache_of: CacheOf, tmp_path: Path) -> None:
    source = tmp_path / "cache"
    shutil.copytree(cache_of(), source)
    data = (source / "images/00001.tar").read_bytes()
    damage(source / "images/00001.tar", data.index(b"image 6 "))
    with pytest.raises(CacheCorrupt, match=r"images/00001.tar \(shard 1\) is damaged: sample '.*' \(row 6\)"):
        convert(source, tmp_path / "copy", "webdataset")
    (source / "samples.parquet").unlink()
    with pytest.raises(CacheCorrupt, match=r"samples.parquet"):
        convert(source, tmp_path / "other", "webdataset")


def test_only_whole_caches_are_converted_and_only_to_a_place_of_their_own(cache_of: CacheOf, tmp_path: Path) -> None:
    source = cache_of(kind="int8")
    start(tmp_path / "partial")
    with pytest.raises(CacheUnsealed, match="not complete"):
        convert(tmp_path / "partial", tmp_path / "copy", "webdataset")
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link"):
        with pytest.raises(CacheError, match="the cache to convert itself"):
            convert(source, target, "webdataset")
    for target in (source / "copy", source.parent):
        with pytest.raises(CacheError, match="lie in each other"):
            convert(source, target, "webdataset")
    build(tmp_path / "another", kind="float16")
    with pytest.raises(CacheMismatch, match=r"encoding.kind; choose another directory"):
        convert(source, tmp_path / "another", "webdataset")
    assert not (tmp_path / "copy").exists()


def test_a_target_is_continued_only_with_the_same_source_and_settings(cache_of: CacheOf, tmp_path: Path) -> None:
    source = cache_of(kind="int8")
    samples, rows = tiny_samples()
    create_cache(tmp_path / "begun", tiny_manifest(samples, rows, "int8"), samples)
    build(tmp_path / "rebuilt", Provenance(created="later"), kind="int8")
    for target in ("begun", "rebuilt"):
        with pytest.raises(CacheMismatch, match="not as a copy of the one to convert"):
            convert(source, tmp_path / target, "zarr")
    convert(source, tmp_path / "copy", "webdataset")
    before = tree(tmp_path / "copy")
    assert convert(source, tmp_path / "copy", "webdataset").sealed
    for store, samples_per_shard in (("webdataset", 2), ("zarr", 3)):
        with pytest.raises(
            CacheMismatch, match=r"other settings \(webdataset, 3 samples per shard, compression none\)"
        ):
            convert(source, tmp_path / "copy", store, samples_per_shard=samples_per_shard)
    with pytest.raises(CacheMismatch, match="not as a copy"):
        convert(tmp_path / "rebuilt", tmp_path / "copy", "webdataset")
    assert tree(tmp_path / "copy") == before


def test_settings_that_make_no_sense_are_refused_before_anything_is_written(cache_of: CacheOf, tmp_path: Path) -> None:
    source = cache_of()
    with pytest.raises(CacheError, match="a webdataset store is not compressed"):
        convert(source, tmp_path / "copy", "webdataset", compression="zstd")
    with pytest.raises(CacheError, match="cannot hold 0 samples"):
        convert(source, tmp_path / "copy", "zarr", samples_per_shard=0)
    with pytest.raises(CacheError, match="more chunks than this format allows"):
        convert(source, tmp_path / "copy", "zarr", samples_per_shard=1 << 30)
    assert not (tmp_path / "copy").exists()


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    """One sample is held at a time: a fifth of a megabyte here, in a shard of 12 MB."""
    options = {
        "taps": [TapInfo(name="hidden", tokens=64, channels=256, grid=(8, 8))],
        "views": ["canonical"],
        "feature_rows": 64,
        "samples_per_shard": 64,
        "with_images": False,
    }
    build(tmp_path / "cache", **options)
    shard_bytes = (tmp_path / "cache/features/hidden/c/0/0/0/0/0").stat().st_size
    assert shard_bytes > 64 * 3 * 64 * 256 * 4
    tracemalloc.start()
    try:
        convert(tmp_path / "cache", tmp_path / "tars", "webdataset")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < shard_bytes / 4
    assert np.array_equal(
        open_cache(tmp_path / "tars").read([63]).payload, open_cache(tmp_path / "cache").read([63]).payload
    )
