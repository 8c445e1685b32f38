"""Whatever interrupts a build, what was committed stays and the rest, done later, gives the same cache."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_building import (
    FEATURE_ROWS,
    build,
    features_of,
    fill,
    image_of,
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
    CacheStorageError,
    CacheUnsealed,
    InvalidFeatures,
    Provenance,
    create_cache,
    open_cache,
)
from cache_schema.care.verify import verify
from cache_schema.storage import files
from cache_schema.writing import writer

CacheOf = Callable[..., Path]
HERE = Path(__file__).parents[1]


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_two_builds_differ_in_nothing_but_their_provenance(
    tmp_path: Path, cache_of: CacheOf, kind: str, store: str
) -> None:
    other = build(tmp_path / "other", Provenance(created="later", seconds=3.0), kind=kind, store=store)
    first, second = tree(cache_of(kind=kind, store=store)), tree(other)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == ["manifest.json"]
    manifests = [open_cache(path).manifest for path in (cache_of(kind=kind, store=store), other)]
    assert manifests[0].model_copy(update={"provenance": manifests[1].provenance}) == manifests[1]
    assert manifests[1].provenance.created == "later"


@some_examples
@given(data=st.data())
def test_a_build_resumed_after_any_set_of_shards_gives_the_same_cache(
    data: st.DataObject, cache_of: CacheOf, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("resumed") / "cache"
    options = {"kind": data.draw(st.sampled_from(["bfloat16", "int8"]))}
    options["store"] = data.draw(st.sampled_from(["zarr", "webdataset"]))
    first = start(root, **options)
    pieces = [("features", k) for k in range(3)] + [("images", k) for k in range(3)]
    done = data.draw(st.lists(st.sampled_from(pieces), unique=True))
    for what, shard in done:
        if what == "features":
            first.write_shard(shard, features_of(first.shard_rows(shard), first.manifest))
        else:
            first.write_images(shard, [image_of(row) for row in first.image_rows(shard)])
    second = start(root, **options)
    assert second.missing_shards() == [k for k in range(3) if ("features", k) not in done]
    assert second.missing_image_shards() == [k for k in range(3) if ("images", k) not in done]
    fill(second).seal()
    assert tree(root) == tree(cache_of(**options))


def test_committed_shards_are_not_written_again(tmp_path: Path) -> None:
    first = start(tmp_path / "cache")
    first.write_shard(0, features_of(first.shard_rows(0), first.manifest))
    shard = tmp_path / "cache/features/hidden/c/0/0/0/0/0"
    before = shard.stat()
    start(tmp_path / "cache").write_shard(0, {})
    assert (shard.stat().st_ino, shard.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_resumed_build_keeps_the_shard_sizes_it_began_with(tmp_path: Path) -> None:
    start(tmp_path / "cache", samples_per_shard=2)
    resumed = start(tmp_path / "cache", samples_per_shard=5, compression="zstd")
    assert resumed.manifest.store.samples_per_shard == 2
    assert resumed.manifest.encoding.compression == "none"
    assert resumed.missing_shards() == [0, 1, 2, 3]
    assert list(resumed.shard_rows(3)) == [6]


def test_creating_a_sealed_cache_again_finds_nothing_missing(tmp_path: Path) -> None:
    root = build(tmp_path / "cache", kind="int8")
    before = tree(root)
    again = start(root, kind="int8")
    assert (again.missing_shards(), again.missing_image_shards(), again.needs_calibration()) == ([], [], False)
    again.seal(Provenance(created="much later"))
    assert tree(root) == before


def test_another_cache_in_the_directory_is_not_touched(tmp_path: Path) -> None:
    samples, rows = tiny_samples()
    create_cache(tmp_path / "cache", tiny_manifest(samples, rows), samples)
    before = tree(tmp_path / "cache")
    with pytest.raises(CacheMismatch, match=r"encoding.kind, views; choose another directory") as caught:
        create_cache(tmp_path / "cache", tiny_manifest(samples, rows, "float16", views=["canonical"]), samples)
    ids = [tiny_manifest(samples, rows).cache_id, tiny_manifest(samples, rows, "float16", views=["canonical"]).cache_id]
    assert all(cache_id[:12] in str(caught.value) for cache_id in ids)
    assert tree(tmp_path / "cache") == before


def test_another_samples_table_under_the_same_id_is_refused(tmp_path: Path) -> None:
    samples, rows = tiny_samples()
    create_cache(tmp_path / "cache", tiny_manifest(samples, rows), samples)
    index = samples.schema.get_field_index("source")
    moved = samples.set_column(index, samples.schema.field(index), [["x", *samples["source"].to_pylist()[1:]]])
    with pytest.raises(CacheMismatch, match="source of row 0"):
        create_cache(tmp_path / "cache", tiny_manifest(samples, rows), moved)


def test_a_directory_with_other_things_is_not_built_into(tmp_path: Path) -> None:
    samples, rows = tiny_samples()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="not empty and not a cache"):
        create_cache(tmp_path, tiny_manifest(samples, rows), samples)
    with pytest.raises(CacheError, match="not a directory"):
        create_cache(tmp_path / "notes.txt", tiny_manifest(samples, rows), samples)
    assert tree(tmp_path) == {"notes.txt": b"mine"}


def test_what_a_killed_builder_left_aside_is_swept(tmp_path: Path) -> None:
    start(tmp_path / "cache")
    left = tmp_path / "cache/features" / f"x.tmp-{files._HOST}-{10**18}-00000000-0"
    left.write_bytes(b"half")
    start(tmp_path / "cache")
    assert not left.exists()


def test_a_builder_killed_before_its_manifest_leaves_a_directory_that_can_be_used(
    tmp_path: Path, cache_of: CacheOf
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"manifest.json.tmp-{files._HOST}-{10**18}-00000000-0").write_bytes(b"{")
    assert tree(build(tmp_path / "cache")) == tree(cache_of())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused_with_their_sample(tmp_path: Path, bad: float) -> None:
    unfinished = start(tmp_path / "cache")
    features = features_of(unfinished.shard_rows(1), unfinished.manifest)
    features["single.3"][2, 1, 0, 3, 4] = bad
    name = unfinished.samples["id"][5].as_py()
    before = tree(tmp_path / "cache")
    with pytest.raises(InvalidFeatures, match=rf"tap single.3 of sample '{name}' \(row 5\) is .* \(1, 0, 3, 4\)"):
        unfinished.write_shard(1, features)
    assert tree(tmp_path / "cache") == before


def test_a_value_the_encoding_cannot_hold_is_refused_with_its_sample(tmp_path: Path) -> None:
    unfinished = start(tmp_path / "cache", kind="float16")
    features = features_of(unfinished.shard_rows(0), unfinished.manifest)
    features["hidden"][1] = 1e6
    with pytest.raises(InvalidFeatures, match=r"\(row 1\): .* beyond the range of float16"):
        unfinished.write_shard(0, features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("hidden"), "given for taps"),
        (lambda f: f.update(hidden=f["hidden"][:1]), "have shape"),
        (lambda f: f.update(velocity=f["hidden"]), "given for taps"),
    ],
)
def test_features_of_the_wrong_taps_or_shape_are_refused(tmp_path: Path, change: Callable, message: str) -> None:
    unfinished = start(tmp_path / "cache")
    features = features_of(unfinished.shard_rows(0), unfinished.manifest)
    change(features)
    with pytest.raises(InvalidFeatures, match=message):
        unfinished.write_shard(0, features)


def test_torch_tensors_are_written_like_arrays(tmp_path: Path, cache_of: CacheOf) -> None:
    unfinished = start(tmp_path / "cache")
    for shard in unfinished.missing_shards():
        features = features_of(unfinished.shard_rows(shard), unfinished.manifest)
        unfinished.write_shard(shard, {tap: torch.from_numpy(values) for tap, values in features.items()})
    fill(unfinished).seal()
    assert tree(tmp_path / "cache") == tree(cache_of())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "float8_e4m3"])
@pytest.mark.parametrize("reduced", [{}, {"pool": 2, "pca": 3}])
def test_bfloat16_tensors_make_the_cache_that_their_float32_values_make(
    tmp_path: Path, kind: str, reduced: dict[str, int]
) -> None:
    for name in ("narrow", "wide"):
        building = start(tmp_path / name, kind=kind, **reduced)
        for shard in building.missing_shards():
            features = features_of(building.shard_rows(shard), building.manifest)
            narrow = {tap: torch.from_numpy(values).bfloat16() for tap, values in features.items()}
            wide = {tap: values.float().numpy() for tap, values in narrow.items()}
            building.write_shard(shard, narrow if name == "narrow" else wide)
    assert tree(tmp_path / "narrow") == tree(tmp_path / "wide")


def test_there_is_no_shard_beyond_the_last(tmp_path: Path) -> None:
    unfinished = start(tmp_path / "cache")
    for call in (unfinished.shard_rows, unfinished.image_rows):
        for shard in (-1, 3):
            with pytest.raises(CacheError, match="there are 3"):
                call(shard)


def test_an_int8_cache_is_calibrated_once_before_its_first_shard(tmp_path: Path) -> None:
    samples, rows = tiny_samples()
    unfinished = create_cache(tmp_path / "cache", tiny_manifest(samples, rows, "int8"), samples)
    features = features_of(unfinished.shard_rows(0), unfinished.manifest)
    with pytest.raises(CacheUnsealed, match="must be calibrated"):
        unfinished.write_shard(0, features)
    unsound = features_of(unfinished.shard_rows(0), unfinished.manifest)
    unsound["hidden"][1, 0, 0, 0, 0] = np.nan
    with pytest.raises(InvalidFeatures, match="calibration sample 1"):
        unfinished.calibrate(unsound)
    unfinished.calibrate(features)
    before = tree(tmp_path / "cache")
    unfinished.calibrate({tap: values * 2 for tap, values in features.items()})
    assert tree(tmp_path / "cache") == before


def test_a_cache_is_not_sealed_before_everything_is_there(tmp_path: Path) -> None:
    unfinished = start(tmp_path / "cache")
    unfinished.write_shard(1, features_of(unfinished.shard_rows(1), unfinished.manifest))
    with pytest.raises(CacheUnsealed, match=r"2 feature shards are missing \(0, 2\)"):
        unfinished.seal()
    for shard in (0, 2):
        unfinished.write_shard(shard, features_of(unfinished.shard_rows(shard), unfinished.manifest))
    with pytest.raises(CacheUnsealed, match="3 image shards are missing"):
        unfinished.seal()
    fill(unfinished)
    (tmp_path / "cache/features/hidden/c/1/0/0/0/0").unlink()
    with pytest.raises(CacheCorrupt, match="c/1/0/0/0/0 is gone"):
        unfinished.seal()


def test_an_empty_image_and_a_wrong_number_of_them_are_refused(tmp_path: Path) -> None:
    unfinished = start(tmp_path / "cache")
    with pytest.raises(CacheError, match="4 rows, 1 images"):
        unfinished.write_images(0, [b"x"])
    with pytest.raises(CacheError, match=r"\(row 2\) is empty"):
        unfinished.write_images(0, [b"x", b"y", b"", b"z"])


def test_the_sealed_manifest_says_how_faithful_and_how_large_the_cache_is(cache_of: CacheOf) -> None:
    manifest = open_cache(cache_of(kind="int8")).manifest
    assert [(item.tap, item.timestep) for item in manifest.fidelity] == [
        (tap, step) for tap in ("hidden", "single.3") for step in (10, 16, 28)
    ]
    assert all(0.9 < item.cosine_min <= item.cosine_mean <= 1 for item in manifest.fidelity)
    assert all(item.cosine_mean > 0.999 for item in manifest.fidelity)
    assert all(0 < item.relative_error < 0.02 for item in manifest.fidelity)
    assert all(0 < item.channel_error < 0.02 for item in manifest.fidelity)
    root = cache_of(kind="int8")
    shards = [path for path in (root / "features").rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert manifest.bytes_features == sum(path.stat().st_size for path in shards)
    assert manifest.bytes_images == sum(path.stat().st_size for path in root.glob("images/*.tar"))
    exact = open_cache(cache_of()).manifest.fidelity
    assert {(item.relative_error, item.channel_error) for item in exact} == {(0.0, 0.0)}


def test_the_card_is_for_people_and_holds_nothing_of_one_build(cache_of: CacheOf) -> None:
    card = (cache_of() / "README.md").read_text()
    manifest = open_cache(cache_of()).manifest
    assert manifest.cache_id in card
    assert "10 (sigma 0.9000), 16 (sigma 0.6000), 28 (sigma 0.0500) of 28" in card
    assert "| `single.3` | 4 (2x2) | 5 |" in card


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_a_full_disk_leaves_the_shard_uncommitted_and_the_build_resumable(
    tmp_path: Path, cache_of: CacheOf, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    unfinished = start(tmp_path / "cache", store=store)
    features = features_of(unfinished.shard_rows(0), unfinished.manifest)
    before = tree(tmp_path / "cache")
    original, written = os.writev, [0]

    def almost_full(fd: int, data: list[memoryview]) -> int:
        written[0] += sum(map(len, data))
        if written[0] > 3000:
            raise OSError(28, "No space left on device")
        return original(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "writev", almost_full)
        with pytest.raises(CacheStorageError, match="No space left on device; free some space"):
            unfinished.write_shard(0, features)
    assert tree(tmp_path / "cache") == before
    fill(unfinished).seal()
    assert tree(tmp_path / "cache") == tree(cache_of(store=store))


def test_two_builders_at_once_make_one_cache(
    tmp_path: Path, cache_of: CacheOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every shard is offered by four builders at the same moment; one commits it."""
    commits: list[str] = []
    original = writer.write_record

    def counted(root: Path, record: writer.Record) -> None:
        commits.append(f"{record.kind} {record.shard}")
        original(root, record)

    monkeypatch.setattr(writer, "write_record", counted)
    errors: list[BaseException] = []
    barrier = threading.Barrier(4)

    def work(seed: int) -> None:
        try:
            barrier.wait()
            builder = start(tmp_path / "cache", kind="bfloat16", samples_per_shard=1 + seed)
            shards = list(range(builder.manifest.store.feature_shards))
            random.Random(seed).shuffle(shards)
            for shard in shards:
                builder.write_shard(shard, features_of(builder.shard_rows(shard), builder.manifest))
            fill(builder).seal()
        except (CacheError, OSError, AssertionError) as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(commits) == len(set(commits))
    assert verify(tmp_path / "cache") == []
    cache = open_cache(tmp_path / "cache")
    found = cache.read(range(FEATURE_ROWS)).payload
    assert torch.equal(found, open_cache(cache_of(kind="bfloat16")).read(range(FEATURE_ROWS)).payload)


BUILDER = """
import sys
sys.path.insert(0, sys.argv[1])
from building import build
build(__import__("pathlib").Path(sys.argv[2]), kind="int8", feature_rows=48, samples_per_shard=2)
"""


def test_a_build_killed_again_and_again_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", kind="int8", feature_rows=48, samples_per_shard=2)
    root = tmp_path / "killed"
    journal = root / "journal"
    kills = 0
    for goal in (1, 8):
        process = subprocess.Popen([sys.executable, "-c", BUILDER, str(HERE), str(root)])
        # Kill it while it is writing: as soon as the journal has grown to the goal.
        while process.poll() is None and len(list(journal.glob("features-*.json")) if journal.exists() else []) < goal:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        committed = len(list(journal.glob("features-*.json")))
        assert goal <= committed < 24
    assert kills == 2
    subprocess.run([sys.executable, "-c", BUILDER, str(HERE), str(root)], check=True)
    assert tree(root) == tree(whole)
    assert verify(root) == []
