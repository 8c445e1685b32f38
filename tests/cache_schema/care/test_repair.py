"""Damage anywhere is named by `verify`, refused by the reader, and mended by repairing and building again."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_building import (
    IMAGE_ROWS,
    build,
    features_of,
    fill,
    some_examples,
    start,
    tiny_manifest,
    tiny_samples,
    tree,
)
from cache_building import damage as flip
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import (
    CacheCorrupt,
    CacheMismatch,
    CacheNotFound,
    CacheStorageError,
    CacheUnsealed,
    CacheWriter,
    create_cache,
    open_cache,
)
from cache_schema.advice import advised
from cache_schema.care.repair import repair
from cache_schema.care.verify import verify
from cache_schema.format.manifest_file import load_manifest
from cache_schema.reading.reader import Cache
from cache_schema.storage.local import LocalFolder

CacheOf = Callable[..., Path]
MENDS = r"dit-cache build --resume --repair --output"


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only a power cut could tell the difference, and waiting for the disk would take most of the time here.
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def copy(cache_of: CacheOf, tmp_path: Path, no_waiting: None) -> Path:
    """A sealed int8 cache that may be damaged."""
    return shutil.copytree(cache_of(kind="int8"), tmp_path / "cache")


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def identities(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(root)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files_of(root)}


def read_everything(cache: Cache) -> list[bytes]:
    parts = cache.images(range(IMAGE_ROWS))
    for tap in cache.manifest.taps:
        for view in (0, 1):
            batch = cache.read(cache.feature_rows, tap=tap.name, view=view)
            tensors = [part for part in (batch.payload, batch.scale, batch.channel) if part is not None]
            if cache.manifest.encoding.pca is not None:
                tensors.append(cache.restore(tap.name, batch.decode()))
            parts += [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return parts


def resume(root: Path, kind: str = "int8", **options: Any) -> None:
    """What the build does after a repair."""
    fill(start(root, kind=kind, **options)).seal()


def shard_of(name: str) -> int | None:
    """The number in the path of a file that belongs to a shard."""
    if name.endswith(".tar"):
        return int(name[-9:-4])
    if name.startswith(("journal/features-", "journal/images-")):
        return int(name[-10:-5])
    of_shard = "/c/" in name and not name.split("/")[1].endswith((".channel", ".mean", ".basis", ".amplitude"))
    return int(name.split("/")[3]) if of_shard else None


def positions(root: Path, count: int) -> list[tuple[str, int]]:
    """`count` positions, spread over all files alike and within each at random."""
    random = np.random.default_rng(0)
    names = [str(path.relative_to(root)) for path in files_of(root)]
    chosen = [names[i % len(names)] for i in range(count)]
    return [(name, int(random.integers((root / name).stat().st_size))) for name in chosen]


def refusal(root: Path, expected: list[bytes]) -> str | None:
    """The line with which a command refuses to read, or None if what is read is what was written."""
    try:
        assert read_everything(open_cache(root)) == expected
    except CacheCorrupt as error:
        return advised(error)
    return None


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"kind": "int8"}, 200),
        ({"kind": "int8", "store": "webdataset"}, 40),
        ({"kind": "float8_e4m3", "compression": "zstd", "pca": 4}, 40),
    ],
    ids=["zarr", "webdataset", "compressed"],
)
def test_a_flipped_byte_anywhere_is_named_refused_and_mended(
    cache_of: CacheOf, tmp_path: Path, no_waiting: None, options: dict[str, Any], count: int
) -> None:
    copy = shutil.copytree(cache_of(**options), tmp_path / "cache")
    good, expected = tree(copy), read_everything(open_cache(copy))
    harmless = 0
    for name, place in positions(copy, count):
        flip(copy / name, place, 0x55)

        problems = [problem for problem in verify(copy) if problem.file == name]
        assert problems, f"byte {place} of {name} is not noticed"
        shard = shard_of(name)
        for problem in problems:
            assert problem.shard == shard, str(problem)
            assert (problem.samples is None) == (shard is None), str(problem)
            assert "\n" not in str(problem)
        refused = refusal(copy, expected)
        harmless += refused is None
        if refused is not None:
            assert (copy / name).name in refused
            assert "\n" not in refused
            assert name == "manifest.json" or MENDS in refused

        if name == "manifest.json":
            with pytest.raises(CacheCorrupt, match="without its manifest"):
                repair(copy)
            flip(copy / name, place, 0x55)
            continue
        before = identities(copy)
        assert {str(item.problem.file) for item in repair(copy)} == {name}
        resume(copy, **options)
        assert tree(copy) == good, f"byte {place} of {name} is not mended"
        after = identities(copy)
        for other in good:
            if shard_of(other) is not None and shard_of(other) != shard:
                assert after[other] == before[other], f"mending {name} touched {other}"
    assert harmless < count / 2, "most damage is to what is read"


@pytest.mark.parametrize("where", ["payload", "scale", "image"])
def test_every_flipped_byte_of_a_sample_is_refused_with_its_sample(copy: Path, where: str) -> None:
    name = {"payload": "features/hidden/c/1/0/0/0/0", "scale": "features/hidden.scale/c/1/0/0/0"}.get(where)
    path = copy / (name or "images/00001.tar")
    first = path.read_bytes().index(b"image 4") if name is None else 0
    size = {"payload": 6 * 8, "scale": 6 * 4}.get(where, 12)

    @some_examples
    @given(st.integers(0, size - 1), st.integers(1, 255))
    def check(place: int, mask: int) -> None:
        flip(path, first + place, mask)
        try:
            cache = open_cache(copy)
            with pytest.raises(CacheCorrupt, match=r"shard 1, sample 'sample-\d' \(row \d\)") as caught:
                _ = cache.images([3, 4]) if name is None else cache.read([0, 3])
            assert str(path) in str(caught.value)
            assert MENDS in advised(caught.value)
            assert (caught.value.cache, caught.value.shard) == (str(copy), 1)
            assert f"sample {caught.value.sample!r} (row {caught.value.row})" in str(caught.value)
            if name is not None:
                assert "sample 'sample-3' (row 3), view canonical, timestep 10" in str(caught.value)
                unchecked = open_cache(copy, verify=False)
                assert unchecked.read([0, 3]).shape == (2, 3, 6, 8)
                assert cache.read([0, 4, 5]).shape == (3, 3, 6, 8)
        finally:
            flip(path, first + place, mask)

    check()


@pytest.mark.parametrize(
    "name",
    [
        "features/hidden/c/0/0/0/0/0",
        "features/single.3.scale/c/2/0/0/0",
        "features/hidden.channel/c/0/0",
        "features/hidden/zarr.json",
        "images/00002.tar",
        "images/index.npy",
        "journal/features-00002.json",
        "journal/images-00001.json",
        "journal/calibration-00000.json",
        "journal/layout-00000.json",
        "journal/seal-00000.json",
        "samples.parquet",
        "README.md",
    ],
)
@pytest.mark.parametrize("how", ["gone", "empty", "short", "pipe", "link"])
def test_missing_truncated_and_replaced_files_are_refused_and_mended(copy: Path, name: str, how: str) -> None:
    good, path = tree(copy), copy / name
    data = path.read_bytes()
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "link":
        path.symlink_to("/dev/zero")
    elif how != "gone":
        path.write_bytes(b"" if how == "empty" else data[: min(600, len(data) // 2)])

    assert name in {problem.file for problem in verify(copy)}
    if not name.endswith((".md", "zarr.json")) and name != "journal/layout-00000.json":
        assert MENDS in str(refusal(copy, expected=[]))

    assert repair(copy)
    resume(copy)
    assert tree(copy) == good
    assert verify(copy) == []


@pytest.mark.parametrize("name", ["features/hidden/c/1/0/0/0/0", "journal/features-00001.json"])
def test_a_directory_in_the_place_of_a_file_is_refused_and_never_emptied(copy: Path, name: str) -> None:
    (copy / name).unlink()
    (copy / name).mkdir()
    (copy / name / "mine").write_text("kept")
    assert name in {problem.file for problem in verify(copy)}
    with pytest.raises(CacheCorrupt, match=r"shard 1, sample 'sample-3' \(row 3\)") as caught:
        open_cache(copy).read([3])
    assert MENDS in advised(caught.value)
    with pytest.raises(CacheStorageError, match=name):
        repair(copy)
    assert (copy / name / "mine").read_text() == "kept"


def test_what_does_not_belong_is_reported_and_left_alone(copy: Path) -> None:
    good = tree(copy)
    (copy / "notes.txt").write_text("mine")
    (copy / "images/00001.tar.tmp-host-1-00000000-0").write_bytes(b"half a file")
    os.utime(copy / "images/00001.tar.tmp-host-1-00000000-0", (0, 0))

    done = {item.problem.file: item.action for item in repair(copy)}

    assert done == {"notes.txt": "left", "images/00001.tar.tmp-host-1-00000000-0": "removed"}
    assert tree(copy) == {**good, "notes.txt": b"mine"}
    assert load_manifest(LocalFolder(copy)).sealed


def test_what_follows_from_the_rest_is_restored_without_a_build(copy: Path) -> None:
    good = tree(copy)
    for name in ("README.md", "features/hidden.scale/zarr.json", "images/index.npy", "journal/seal-00000.json"):
        flip(copy / name, 9)
    (copy / "manifest.json").write_bytes(good["manifest.json"] + b" ")

    assert {item.action for item in repair(copy)} == {"restored"}
    assert tree(copy) == good


def test_a_manifest_without_its_checksum_is_sealed_again(copy: Path) -> None:
    good = tree(copy)
    checksum = load_manifest(LocalFolder(copy)).provenance.checksum
    assert checksum is not None
    text = (
        good["manifest.json"]
        .replace(f'"{checksum}"'.encode(), b"null")
        .replace(b'"bytes_images": ', b'"bytes_images": 1')
    )
    (copy / "manifest.json").write_bytes(text)

    assert [item.action for item in repair(copy)] == ["rebuild"]
    resume(copy)
    assert tree(copy) == good


def test_a_repaired_cache_is_not_complete_until_it_is_built(copy: Path) -> None:
    (copy / "features/hidden/c/1/0/0/0/0").unlink()
    (damage,) = repair(copy)
    assert str(damage).endswith("taken out, for the build to make again")
    with pytest.raises(CacheUnsealed, match="3 of 7 samples have no features yet"):
        open_cache(copy)
    writer = start(copy, kind="int8")
    assert writer.missing_shards() == [1]
    assert verify(copy) == []
    assert repair(copy) == []


def test_a_repair_that_is_killed_anywhere_is_done_by_the_next(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of a repair is one rename or one removal; here it ends before each of them in turn."""
    good = tree(copy)
    for name in ("features/hidden/c/1/0/0/0/0", "images/00000.tar", "samples.parquet", "features/hidden.channel/c/0/0"):
        flip(copy / name, 7)
    (copy / "journal/features-00002.json").unlink()
    steps = 0
    while True:
        root = shutil.copytree(copy, tmp_path / f"killed-{steps}")
        if killed_after(steps, lambda root=root: repair(root), monkeypatch):
            steps += 1
            repair(root)
            resume(root)
            assert tree(root) == good
            shutil.rmtree(root)
            continue
        break
    assert steps > 10


class Killed(BaseException):
    """The process is gone: no handler of ordinary errors runs."""


def killed_after(steps: int, run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run until `steps` renames and removals were done; say whether that stopped it."""
    left = [steps]

    def counted(original: Callable[..., object], clears_up: bool) -> Callable[..., object]:
        def step(self: Path, *args: object, **options: object) -> object:
            # What a writer clears away on its own way out is not a step: a killed one would not.
            if not (clears_up and ".tmp-" in self.name):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
            return original(self, *args, **options)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", counted(Path.unlink, True))
        patch.setattr(Path, "replace", counted(Path.replace, False))
        try:
            run()
        except Killed:
            return True
    return False


def test_a_calibration_is_only_replaced_by_the_same(copy: Path) -> None:
    good = tree(copy)
    for lost in ("features/hidden.channel/c/0/0", "journal/calibration-00000.json"):
        flip(copy / lost, 20)
        repair(copy)
        with pytest.raises(CacheUnsealed, match="calibration is missing"):
            fill_without_calibrating(copy)
        writer = start_without_calibrating(copy)
        assert writer.needs_calibration()
        with pytest.raises(CacheMismatch, match="the calibration computed now is not"):
            writer.calibrate(features_of([6], writer.manifest))
        resume(copy)
        assert tree(copy) == good


def test_shards_whose_calibration_is_lost_for_good_are_built_again(copy: Path) -> None:
    good = tree(copy)
    (copy / "journal/calibration-00000.json").unlink()
    (copy / "features/hidden.channel/c/0/0").unlink()

    reasons = [item.problem.reason for item in repair(copy) if item.problem.kind == "features"]

    assert reasons == ["it was encoded with a calibration that is lost"] * 3
    assert start_without_calibrating(copy).missing_shards() == [0, 1, 2]
    resume(copy)
    assert tree(copy) == good


def start_without_calibrating(root: Path) -> CacheWriter:
    samples, rows = tiny_samples()
    return create_cache(root, tiny_manifest(samples, rows, kind="int8"), samples)


def fill_without_calibrating(root: Path) -> None:
    fill(start_without_calibrating(root)).seal()


def test_a_cache_without_images_and_an_unfinished_one_are_mended_too(tmp_path: Path) -> None:
    plain = build(tmp_path / "plain", with_images=False)
    good = tree(plain)
    (plain / "README.md").unlink()
    assert [item.action for item in repair(plain)] == ["restored"]
    assert tree(plain) == good

    writer = start(tmp_path / "part", kind="int8")
    writer.write_shard(1, features_of(writer.shard_rows(1), writer.manifest))
    flip(tmp_path / "part/features/hidden/c/1/0/0/0/0", 3)
    assert [item.action for item in repair(tmp_path / "part")] == ["rebuild"]
    assert start(tmp_path / "part", kind="int8").missing_shards() == [0, 1, 2]


def test_there_is_nothing_to_mend_where_there_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFound):
        repair(tmp_path)
