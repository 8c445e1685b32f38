"""Shard files follow the Zarr specification, and their index is never believed beyond the file it is in."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from cache_building import many_examples
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import CacheCorrupt
from cache_schema.format.layout import ArrayLayout
from cache_schema.reading.open_shards import ChunkPlaces, OpenShards, RecentlyUsed
from cache_schema.storage.checksum import crc32c
from cache_schema.storage.files import AsideFile
from cache_schema.storage.folder import ReadableFile
from cache_schema.storage.local import LocalFolder
from cache_schema.storage.open_file import OpenFile
from cache_schema.stores.compression import decompress, max_compressed
from cache_schema.stores.shard import (
    ShardIndex,
    ShardWriter,
    chunk_bytes,
    index_size,
    parse_index,
)

MISSING = 2**64 - 1


def layout(compression: str = "none", rows: int = 3) -> ArrayLayout:
    return ArrayLayout("hidden", "payload", "int8", (7, 1, 2), (2, 4), rows, compression)


def sign(index: bytes) -> bytes:
    return index + crc32c(index).to_bytes(4, "little")


numbers = (
    st.integers(0, MISSING)
    | st.integers(0, 400)
    | st.sampled_from([0, 8, 16, 40, 48, MISSING - 1, MISSING, 2**63, 2**63 - 8])
)


def is_honest(table: list[tuple[int, int]], contents: int, array: ArrayLayout) -> bool:
    """Say whether chunks at these places, those that are not missing, can be in a file's first bytes."""
    places = sorted(pair for pair in table if pair != (MISSING, MISSING))
    smallest, largest = chunk_bytes(array), chunk_bytes(array)
    if array.compression != "none":
        smallest, largest = 1, max_compressed(chunk_bytes(array))
    return (
        all(smallest <= length <= largest and offset + length <= contents for offset, length in places)
        and all(offset + length <= after for (offset, length), (after, _) in itertools.pairwise(places))
    )  # fmt: skip


@many_examples
@given(
    st.lists(st.tuples(numbers, numbers), min_size=6, max_size=6),
    st.integers(0, 400),
    st.sampled_from(["none", "zstd"]),
    st.data(),
)
def test_an_index_is_accepted_if_its_chunks_lie_apart_inside_the_file_and_never_else(
    table: list[tuple[int, int]], extra: int, compression: str, data: st.DataObject
) -> None:
    array = layout(compression)
    if data.draw(st.booleans()):  # an index as it is written, but for one number
        size, start, changed = chunk_bytes(array), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 6))
        written = [(start + i * size, size) for i in range(6)]
        table = written[:changed] + table[changed : changed + 1] + written[changed + 1 :]
    signed = sign(np.array(table, dtype="<u8").tobytes())
    try:
        index = parse_index(signed, array, len(signed) + extra, "a file")
    except CacheCorrupt:
        assert not is_honest(table, extra, array)
        return
    assert is_honest(table, extra, array)
    for (offset, length), pair in zip(zip(index.offsets.flat, index.lengths.flat, strict=True), table, strict=True):
        assert (offset, length) == ((-1, 0) if pair == (MISSING, MISSING) else pair)


@many_examples
@given(st.binary(max_size=200), st.integers(0, 300))
def test_bytes_that_are_no_index_are_called_corrupt(data: bytes, size: int) -> None:
    with pytest.raises(CacheCorrupt):
        parse_index(data, layout(), size, "a file")


def test_an_index_with_a_flipped_bit_is_refused() -> None:
    data = bytearray(sign(np.full((6, 2), MISSING, dtype="<u8").tobytes()))
    data[3] ^= 1
    with pytest.raises(CacheCorrupt, match="checksum"):
        parse_index(bytes(data), layout(), 1000, "a file")


@pytest.mark.parametrize("compression", ["none", "zstd", "blosc:lz4", "blosc:zstd"])
def test_a_written_shard_gives_its_chunks_back(tmp_path: Path, compression: str) -> None:
    array = layout(compression)
    rows = np.random.default_rng(0).integers(-3, 3, (2, 1, 2, 2, 4)).astype(np.int8)
    with AsideFile(tmp_path / "shard") as aside:
        writer = ShardWriter(array, aside)
        for row in rows:
            writer.add_row(row)
        writer.finish()
        aside.finish()
        aside.publish()
    data = (tmp_path / "shard").read_bytes()
    index = parse_index(data[-index_size(array) :], array, len(data), "the shard")
    assert math.prod(index.offsets.shape) == 6
    assert (index.offsets[2] == -1).all(), "the third row was not written"
    for row in range(2):
        for step in range(2):
            offset, length = index.offsets[row, 0, step], index.lengths[row, 0, step]
            chunk = np.frombuffer(data[offset : offset + length], dtype=np.uint8)
            if compression != "none":
                plain = np.empty(chunk_bytes(array), np.uint8)
                decompress(chunk.tobytes(), plain, compression, "the shard")
                chunk = plain
            np.testing.assert_array_equal(chunk.view(np.int8).reshape(2, 4), rows[row, 0, step])


def test_a_row_of_the_wrong_shape_is_not_written(tmp_path: Path) -> None:
    with AsideFile(tmp_path / "shard") as aside, pytest.raises(ValueError, match="expected"):
        ShardWriter(layout(), aside).add_row(np.zeros((1, 2, 2, 5), np.int8))


def test_reading_past_the_end_of_a_file_is_called_truncated(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    file = OpenFile(str(tmp_path / "file"))
    assert file.read(1, 4) == b"2345"
    with pytest.raises(CacheCorrupt, match="truncated"):
        file.read(1, 5)


def test_open_files_and_indexes_are_bounded_and_reused(tmp_path: Path) -> None:
    parsed = []

    def parse(file: ReadableFile) -> ChunkPlaces:
        parsed.append(file.path)
        return ChunkPlaces(ShardIndex(np.zeros((1, 1, 1), np.int64), np.zeros((1, 1, 1), np.int64)), None)

    shards = OpenShards(LocalFolder(tmp_path), max_files=2, max_index_bytes=3 * 600)
    for name in "abcd":
        (tmp_path / name).write_bytes(name.encode())
    paths = [str(tmp_path / name) for name in "abcd"]
    kept = shards.file("a")
    for name in "abcd":
        shards.places(shards.file(name), "hidden", parse)
    assert len(shards.files) == 2
    assert kept.read(0, 1) == b"a", "a file in use stays open when it is pushed out"
    assert shards.file("d") is shards.file("d")
    for name in "bcd":
        shards.places(shards.file(name), "hidden", parse)
    assert parsed == paths, "an index outlives its open file"
    shards.places(shards.file("a"), "hidden", parse)
    assert parsed == [*paths, paths[0]], "the longest unused index had to go"
    (tmp_path / "d").write_bytes(b"replaced")
    shards.places(OpenFile(paths[3]), "hidden", parse)
    assert parsed[-1] == paths[3], "a replaced file's index is parsed again"


@many_examples
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=30))
def test_what_is_remembered_stays_within_its_bounds(puts: list[tuple[int, int]]) -> None:
    recent: RecentlyUsed[int, tuple[int, int]] = RecentlyUsed(max_items=4, max_weight=20)
    weights: dict[int, int] = {}
    for key, weight in puts:
        recent.put(key, (key, weight), weight)
        weights[key] = weight
        assert recent.get(key) == (key, weight)
        held = [weights[k] for k in weights if recent.get(k) is not None]
        assert recent.get(key) is not None
        assert recent.weight == sum(held)
        assert len(held) == len(recent) <= 4
        assert recent.weight <= 20 or len(recent) == 1


@many_examples
@given(data=st.data())
def test_places_say_the_same_as_the_index_they_were_made_of(data: st.DataObject) -> None:
    """Whether the chunks lie evenly, with gaps between the rows, in any order, or are partly missing."""
    S, V, T, chunk = (data.draw(st.integers(1, 4)) for _ in range(4))
    gap = data.draw(st.integers(0, 3))
    offsets = np.array([7 + s * (V * T * chunk + gap) + i * chunk for s in range(S) for i in range(V * T)])
    kind = data.draw(st.sampled_from(["even", "short", "shuffled", "holes"]))
    if kind == "short":
        offsets[data.draw(st.integers(0, S)) * V * T :] = -1
    elif kind == "shuffled":
        offsets = offsets[data.draw(st.permutations(range(len(offsets))))]
    elif kind == "holes":
        offsets[data.draw(st.lists(st.integers(0, len(offsets) - 1)))] = -1
    lengths = np.where(offsets < 0, 0, chunk)
    places = ChunkPlaces(ShardIndex(offsets.reshape(S, V, T), lengths.reshape(S, V, T)), chunk)
    assert places.offsets is None or kind != "even"
    for number, offset in enumerate(offsets.tolist()):
        if places.offsets is not None:
            assert places.offsets[number] == offset
        else:
            row, rest = divmod(number, V * T)
            assert (places.start + row * places.row + rest * chunk if row < places.rows else -1) == offset


def test_a_missing_row_between_two_is_not_taken_for_an_even_distance() -> None:
    places = ChunkPlaces(ShardIndex(np.array([[[7]], [[-1]], [[9]]]), np.array([[[1]], [[0]], [[1]]])), 1)
    assert places.offsets is not None
    assert places.offsets.tolist() == [7, -1, 9]
