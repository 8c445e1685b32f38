"""Verification finds every kind of damage and says where it is."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_building import build, features_of, many_examples, start
from cache_building import damage as flip
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import CacheNotFound, open_cache
from cache_schema.care.verify import Problem, verify

CacheOf = Callable[..., Path]


@pytest.fixture
def copy(cache_of: CacheOf, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a sealed cache to where it may be damaged."""

    def make(**options: object) -> Path:
        shutil.copytree(cache_of(**options), tmp_path / "cache")
        return tmp_path / "cache"

    return make


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize(("compression", "store"), [("none", "zarr"), ("zstd", "zarr"), ("none", "webdataset")])
def test_a_good_cache_has_no_problems(cache_of: CacheOf, kind: str, compression: str, store: str) -> None:
    assert verify(cache_of(kind=kind, compression=compression, store=store)) == []


def test_the_statistics_of_an_encoding_are_checked_like_everything_else(copy: Callable[..., Path]) -> None:
    root = copy(kind="float8_e4m3", pca=3, pool=2)
    assert verify(root) == []
    for name in ("hidden.amplitude/c/0", "hidden.mean/c/0", "single.3.basis/c/0/0", "single.3.channel/c/0/0"):
        flip(root / "features" / name, 2)
        assert [problem.file for problem in verify(root)] == [f"features/{name}"]
        flip(root / "features" / name, 2)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_flipped_byte_of_features_is_found_with_its_file_shard_and_row(
    copy: Callable[..., Path], compression: str
) -> None:
    root = copy(compression=compression)
    name = "features/hidden/c/1/0/0/0/0"
    shard = root / name
    # Shard 1 holds rows 3 to 5; a byte in the middle of its chunks belongs to row 4.
    flip(shard, (shard.stat().st_size - 16 * 18 - 4) // 2)
    (problem,) = verify(root)
    assert (problem.file, problem.shard, problem.rows) == (name, 1, (4, 5))
    assert str(problem) == (f"{name} (shard 1, row 4, sample 'sample-2'): the contents are damaged (checksum)"), (
        "row 4 is that of sample-2, for the tiny table is given in reverse"
    )


def test_a_flipped_byte_of_an_image_is_found_with_its_row(copy: Callable[..., Path]) -> None:
    root = copy()
    data = (root / "images/00001.tar").read_bytes()
    flip(root / "images/00001.tar", data.index(b"image 6 "))
    (problem,) = verify(root)
    assert (problem.file, problem.shard, problem.rows) == ("images/00001.tar", 1, (6, 7))


def test_damage_to_an_index_concerns_all_rows_of_its_shard(copy: Callable[..., Path]) -> None:
    root = copy()
    flip(root / "features/single.3/c/2/0/0/0/0", -1)
    (problem,) = verify(root)
    assert (problem.file, problem.shard, problem.rows) == ("features/single.3/c/2/0/0/0/0", 2, (6, 7))
    assert str(problem).startswith("features/single.3/c/2/0/0/0/0 (shard 2, row 6, sample 'sample-0'): ")
    flip(root / "images/00000.tar", 0)
    assert [(p.file, p.rows) for p in verify(root)][1:] == [("images/00000.tar", (0, 4))]
    assert "shard 0, rows 0 to 3, samples 'sample-6' to 'sample-3'" in str(verify(root)[1])


@many_examples
@given(data=st.data())
def test_one_flipped_byte_anywhere_is_found_in_its_file(data: st.DataObject, cache_of: CacheOf) -> None:
    root = cache_of(kind="int8", store=data.draw(st.sampled_from(["zarr", "webdataset"])))
    path = data.draw(st.sampled_from(sorted(path for path in root.rglob("*") if path.is_file())))
    place, mask = data.draw(st.integers(0, path.stat().st_size - 1)), data.draw(st.integers(1, 255))
    flip(path, place, mask)
    try:
        problems = verify(root)
    finally:
        flip(path, place, mask)
    assert str(path.relative_to(root)) in {problem.file for problem in problems}
    assert verify(root) == []


@pytest.mark.parametrize(
    ("name", "shard", "rows"),
    [
        ("features/00001.tar", 1, (3, 6)),
        ("features/hidden/c/0/0/0/0/0", 0, (0, 3)),
        ("features/hidden.scale/c/2/0/0/0", 2, (6, 7)),
        ("images/00002.tar", 2, (8, 10)),
        ("images/index.npy", None, None),
        ("features/hidden/zarr.json", None, None),
        ("features/hidden.channel/c/0/0", None, None),
        ("features/hidden.channel.npy", None, None),
        ("README.md", None, None),
    ],
)
def test_missing_and_truncated_files_are_named(
    copy: Callable[..., Path], name: str, shard: int | None, rows: tuple[int, int] | None
) -> None:
    in_tars = name.startswith("features/") and name.endswith((".tar", ".npy"))
    root = copy(kind="int8", store="webdataset" if in_tars else "zarr")
    data = (root / name).read_bytes()
    (root / name).write_bytes(data[:-1])
    (problem,) = verify(root)
    assert (problem.file, problem.shard, problem.rows) == (name, shard, rows)
    assert f"has {len(data) - 1} bytes instead of {len(data)}" in problem.reason
    (root / name).unlink()
    assert verify(root) == [Problem(name, shard, rows, "the file is missing")]
    (root / name).symlink_to("/dev/zero")
    assert verify(root)[0] == Problem(name, shard, rows, "this is not a plain file")


def test_a_missing_or_damaged_record_is_named_with_the_rows_it_stands_for(copy: Callable[..., Path]) -> None:
    root = copy()
    flip(root / "journal/features-00001.json", 40)
    (problem,) = verify(root)
    assert (problem.file, problem.shard, problem.rows) == ("journal/features-00001.json", 1, (3, 6))
    (root / "journal/features-00001.json").unlink()
    (problem,) = verify(root)
    assert problem == Problem("journal/features-00001.json", 1, (3, 6), "the journal record is missing")


def test_files_that_do_not_belong_are_named(copy: Callable[..., Path]) -> None:
    root = copy()
    (root / "features/notes.txt").write_text("mine")
    (root / "journal/features-00099.json").write_text("{}")
    (root / "elsewhere").symlink_to("/")
    (root / "images/x.tar.tmp-host-1-00000000-0").write_bytes(b"")
    assert [problem.file for problem in verify(root)] == [
        "elsewhere",
        "features/notes.txt",
        "images/x.tar.tmp-host-1-00000000-0",
        "journal/features-00099.json",
    ]


def test_a_damaged_samples_table_does_not_hide_other_damage(copy: Callable[..., Path]) -> None:
    root = copy()
    flip(root / "samples.parquet", 10)
    flip(root / "features/hidden/c/1/0/0/0/0", 0)
    (root / "samples.parquet").write_bytes((root / "samples.parquet").read_bytes()[:50])
    assert [(p.file, p.rows) for p in verify(root)] == [
        ("samples.parquet", None),
        ("features/hidden/c/1/0/0/0/0", (3, 4)),
    ]


def test_an_unfinished_cache_is_checked_as_far_as_it_goes(tmp_path: Path) -> None:
    writer = start(tmp_path / "cache", kind="int8")
    writer.write_shard(1, features_of(writer.shard_rows(1), writer.manifest))
    assert verify(tmp_path / "cache") == []
    # A shard that was put in place but not recorded is not there yet.
    shutil.copytree(tmp_path / "cache/features/hidden/c/1", tmp_path / "cache/features/hidden/c/2")
    assert verify(tmp_path / "cache") == []
    flip(tmp_path / "cache/features/hidden/c/1/0/0/0/0", 0)
    assert [(p.shard, p.rows) for p in verify(tmp_path / "cache")] == [(1, (3, 4))]


def test_verifying_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFound):
        verify(tmp_path)


def test_reading_never_returns_rows_of_a_shard_of_another_cache(tmp_path: Path, copy: Callable[..., Path]) -> None:
    """A shard with another geometry, put in place by hand, is refused rather than misread."""
    other = build(tmp_path / "other", samples_per_shard=2)
    root = copy()
    shutil.copy(other / "features/hidden/c/1/0/0/0/0", root / "features/hidden/c/1/0/0/0/0")
    assert verify(root)
    with pytest.raises(Exception, match="c/1/0/0/0/0"):
        open_cache(root).read([3])
