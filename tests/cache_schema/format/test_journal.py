"""A journal record is what was written, or it is refused."""

from pathlib import Path

import pytest
from cache_building import many_examples
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import CacheCorrupt
from cache_schema.format.journal import (
    FidelitySums,
    FileRecord,
    Record,
    committed_shards,
    parse_record,
    read_record,
    record_name,
    render_record,
    write_record,
)
from cache_schema.storage.local import LocalFolder

counts = st.integers(0, 1 << 34)
checksums = st.text("0123456789abcdef", min_size=8, max_size=8)
finite = st.floats(0, allow_nan=False, allow_infinity=False)
records = st.builds(
    Record,
    kind=st.sampled_from(["layout", "calibration", "features", "images", "seal"]),
    shard=counts,
    rows=st.tuples(counts, counts),
    files=st.dictionaries(
        st.text(max_size=9),
        st.builds(
            FileRecord,
            bytes=counts,
            crc32c=checksums,
            piece_crc32c=st.none() | st.lists(checksums, max_size=2).map("".join),
        ),
        max_size=2,
    ),
    fidelity=st.lists(
        st.builds(
            FidelitySums,
            tap=st.text(max_size=5),
            timestep=st.integers(),
            tokens=st.integers(min_value=1),
            **dict.fromkeys(("cosine_sum", "cosine_min", "squared_error", "energy", "channel_error"), finite),
        ),
        max_size=2,
    ),
    offsets=st.lists(st.tuples(counts, counts), max_size=3),
)


@many_examples
@given(records)
def test_a_record_is_the_same_after_a_round_trip(record: Record) -> None:
    data = render_record(record)
    again = parse_record(data, "a record")
    assert again.model_copy(update={"checksum": None}) == record
    assert render_record(again) == data


@many_examples
@given(records, st.data())
def test_a_record_with_any_byte_changed_is_refused(record: Record, data: st.DataObject) -> None:
    damaged = bytearray(render_record(record))
    place = data.draw(st.integers(0, len(damaged) - 1))
    damaged[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CacheCorrupt):
        parse_record(bytes(damaged), "a record")


@many_examples
@given(st.binary(max_size=100) | st.just(b"[" * 100_000) | st.just(b'{"files":1e999}'))
def test_bytes_that_are_no_record_are_called_corrupt(data: bytes) -> None:
    with pytest.raises(CacheCorrupt):
        parse_record(data, "a record")


def test_a_shard_exists_once_its_record_does(tmp_path: Path) -> None:
    assert committed_shards(LocalFolder(tmp_path), "features") == set()
    assert read_record(LocalFolder(tmp_path), "features", 3) is None
    write_record(LocalFolder(tmp_path), Record(kind="features", shard=3, files={}))
    write_record(LocalFolder(tmp_path), Record(kind="images", shard=1, files={}))
    (tmp_path / "journal" / "features-00004.json.tmp-host-1-00000000-0").write_bytes(b"half")
    assert committed_shards(LocalFolder(tmp_path), "features") == {3}
    assert committed_shards(LocalFolder(tmp_path), "images") == {1}


def test_a_record_under_another_name_is_refused(tmp_path: Path) -> None:
    write_record(LocalFolder(tmp_path), Record(kind="features", shard=3, files={}))
    (tmp_path / record_name("features", 3)).rename(tmp_path / record_name("features", 4))
    with pytest.raises(CacheCorrupt, match="is that of features 3"):
        read_record(LocalFolder(tmp_path), "features", 4)
