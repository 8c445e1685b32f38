"""Samples tables that are none, that expand without end, or whose texts are not meant for reading."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_building import many_examples, tiny_samples
from cache_hostile import COMMANDS, READING, vouch_for
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import CacheCorrupt, CacheError, samples_table
from cache_schema.format.samples import SAMPLES_SCHEMA, parse_samples, render_samples

Attack = Callable[..., Any]


def written(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", **options)
    return buffer.getvalue()


def with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    field = SAMPLES_SCHEMA.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


def repeated(rows: int, caption: str) -> pa.Table:
    """Rows that differ in their id alone."""
    texts = {name: [""] * rows for name in ("class_name", "source", "box_source", "reason")}
    numbers = {name: [1] * rows for name in ("label", "width", "height")}
    columns = {
        "id": [str(i) for i in range(rows)],
        "split": ["train"] * rows,
        "state": ["ok"] * rows,
        "sha256": ["0" * 64] * rows,
        "box": [None] * rows,
        **texts,
        **numbers,
    }
    captions = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), [caption])
    arrays = [captions if name == "caption" else pa.array(columns[name], SAMPLES_SCHEMA.field(name).type) for name in
              SAMPLES_SCHEMA.names]  # fmt: skip
    return pa.table(arrays, names=SAMPLES_SCHEMA.names)


def bombs() -> dict[str, bytes]:
    text = "A" * 1_000_000
    table, _ = tiny_samples()
    many = pa.table({f"column {i}": [1] for i in range(3_000)})
    return {
        # 20 GB of captions, then 90 MB.
        "one caption many times": written(repeated(20_000, text)),
        "large pages": written(with_column(table, "caption", ["A" * 8_000_000] * table.num_rows), use_dictionary=False),
        "prefixes": written(
            with_column(table, "caption", ["A" * 8_000_000] * table.num_rows),
            use_dictionary=False,
            column_encoding={"caption": "DELTA_BYTE_ARRAY"},
        ),
        "columns without end": written(many),
    }


@pytest.fixture(scope="module")
def bomb() -> dict[str, bytes]:
    return bombs()


def planted(data: bytes) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        (root / "samples.parquet").write_bytes(data)
        vouch_for(root, "layout-00000", "samples.parquet")

    return plant


@pytest.mark.parametrize("what", ["one caption many times", "large pages", "prefixes", "columns without end"])
def test_a_table_that_expands_without_end_is_refused(attack: Attack, bomb: dict[str, bytes], what: str) -> None:
    assert len(bomb[what]) < 8 << 20, "it is small in the file"
    outcome = attack(planted(bomb[what]), (*READING, "convert", "resume"))
    assert {"samples", "images", "verify", "describe", "convert", "resume"} <= outcome.refused()


def footer_said_to_be(size: int) -> bytes:
    table, _ = tiny_samples()
    return render_samples(table)[:-8] + size.to_bytes(4, "little") + b"PAR1"


NOT_TABLES = {
    "nothing": b"",
    "no footer": b"PAR1" * 3,
    "a footer of 4 GB": footer_said_to_be(2**32 - 1),
    "a footer of itself": footer_said_to_be(0),
    "half": render_samples(tiny_samples()[0])[:-100],
    "other columns": written(pa.table({"id": ["a"]})),
    "other types": written(pa.table({name: [1] for name in SAMPLES_SCHEMA.names})),
    "a pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
}


@pytest.mark.parametrize("what", NOT_TABLES)
def test_what_is_no_samples_table_is_refused(attack: Attack, what: str) -> None:
    outcome = attack(planted(NOT_TABLES[what]), (*READING, "resume", "dit-cache info"))
    assert {"samples", "images", "verify", "describe", "resume", "dit-cache info"} <= outcome.refused()


def varint(number: int, length: int = 1) -> bytes:
    """A number as Thrift's compact protocol has it, zigzag, in `length` bytes at least."""
    number <<= 1
    length = max(length, -(-number.bit_length() // 7))
    return bytes([*(number >> 7 * i & 127 | 128 for i in range(length - 1)), number >> 7 * (length - 1)])


def with_first_page(change: Callable[[dict[str, int]], object]) -> bytes:
    """A table whose first page, that of the ids, says something else than the footer; nothing changes its place."""
    row = {"split": "train", "source": "", "sha256": "0" * 64, "width": 1, "height": 1}
    table = samples_table({**row, "id": f"{i:060d}"} for i in range(40))
    # Checksums of pages, which no one asks for, leave room for larger numbers.
    data = written(table, use_dictionary=False, write_statistics=False, write_page_checksum=True)
    column = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0)
    start, end = column.data_page_offset, column.data_page_offset + column.total_compressed_size
    body = data.index(b"\x28\xb5\x2f\xfd", start)  # where Zstandard begins
    page = {"type": 0, "size": column.total_uncompressed_size - (body - start), "stored": end - body, "values": 40,
            "encoding": 0}  # fmt: skip
    change(page)
    described = {0: 5, 1: 6, 2: 7, 3: 8}[page["type"]] - 3 << 4 | 12  # the number of the struct, counted from field 3
    rest = b"".join(
        [b"\x15", varint(page["size"]), b"\x15", varint(page["stored"]), bytes([described]), b"\x15",
         varint(page["values"]), b"\x15", varint(page["encoding"]), b"\x15\x06\x15\x06\x00\x00"]
    )  # fmt: skip
    return data[:start] + b"\x15" + varint(page["type"], body - start - 1 - len(rest)) + rest + data[body:]


PAGES = {
    "a page of 2 GB": lambda page: page.update(size=2**31 - 1),
    "a page of less than nothing": lambda page: page.update(size=2**32),
    "a page beyond the column": lambda page: page.update(stored=2**31 - 1),
    "more values than rows": lambda page: page.update(values=2**31 - 1),
    "a dictionary of 2 billion values": lambda page: page.update(type=2, values=2**31 - 1),
    "an index page": lambda page: page.update(type=1),
    "prefixes that the footer does not speak of": lambda page: page.update(encoding=7),
}


def test_an_honest_page_is_read() -> None:
    assert parse_samples(with_first_page(lambda page: None), "a file").num_rows == 40


@pytest.mark.parametrize("what", PAGES)
def test_a_page_that_says_more_than_the_footer_is_refused(attack: Attack, what: str) -> None:
    """Whatever a page promises, no room is made for it: it is refused before pyarrow reads it."""
    data = with_first_page(PAGES[what])
    with pytest.raises(CacheCorrupt, match="column id"):
        parse_samples(data, "a file")
    outcome = attack(planted(data), (*READING, "resume"))
    assert {"samples", "images", "verify", "describe", "resume"} <= outcome.refused()


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_honest_tables_of_many_pages_are_read_however_they_are_written(version: str, dictionary: bool) -> None:
    rows = [
        {"id": str(i), "split": "train", "source": "", "sha256": f"{i:064x}", "width": 1, "height": 1,
         "box": None if i % 3 else [0.0, 0.0, 1.0, i], "caption": f"number {i} " * (i % 90)}
        for i in range(2_000)
    ]  # fmt: skip
    table = samples_table(rows)
    options = {"data_page_version": version, "use_dictionary": dictionary, "write_page_checksum": dictionary}
    data = written(table, data_page_size=4_000, row_group_size=700, write_batch_size=50, **options)
    assert parse_samples(data, "a file").equals(table)


def test_no_text_of_a_sample_reaches_a_terminal_as_it_is(attack: Attack) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\r\nerror: all is well\u202e\x9b"
    table, _ = tiny_samples()
    rows = table.to_pylist()
    for i, row in enumerate(rows):
        row |= {"id": f"{evil}{i}", "caption": evil, "reason": evil, "class_name": evil, "source": evil}
    data = render_samples(samples_table(rows))

    def plant(root: Path) -> None:
        planted(data)(root)
        # So that messages name samples.
        with (root / "features/hidden/c/0/0/0/0/0").open("r+b") as file:
            file.write(b"damage")

    outcome = attack(plant, (*READING, *COMMANDS))
    assert outcome.by_operation["dit-cache info"] == "done"
    assert {"dit-cache verify", "dit-cache convert"} <= outcome.refused()


texts = st.text(st.characters(codec="utf-8"), max_size=20)


@many_examples
@given(
    st.lists(st.tuples(texts, texts, st.integers(-1, 2**31 - 1), st.booleans()), max_size=8, unique_by=lambda r: r[0])
)
def test_any_texts_come_back_from_a_table_as_they_were(rows: list[tuple[str, str, int, bool]]) -> None:
    table = samples_table(
        {
            "id": name,
            "split": "train",
            "source": caption,
            "sha256": hashlib.sha256(name.encode()).hexdigest(),
            "width": 1,
            "height": 2,
            "label": label,
            "box": [0.5, 1.0, 2.0, 3.0] if boxed else None,
            "caption": caption,
        }
        for name, caption, label, boxed in rows
    )
    again = parse_samples(render_samples(table), "a file")
    assert again.equals(table)
    assert render_samples(again) == render_samples(table)


@many_examples
@given(st.data())
def test_an_altered_table_is_a_table_or_called_corrupt(data: st.DataObject) -> None:
    altered = bytearray(render_samples(tiny_samples()[0]))
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of the time in the metadata, which is what is believed first.
        place = data.draw(st.integers(0, len(altered) - 1) | st.integers(len(altered) * 3 // 5, len(altered) - 1))
        altered[place] = data.draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
    cut = data.draw(st.just(len(altered)) | st.integers(0, len(altered)))
    try:
        table = parse_samples(bytes(altered[:cut]), "a file")
    except CacheCorrupt:
        return
    assert table.schema.equals(SAMPLES_SCHEMA)


@many_examples
@given(st.binary(max_size=200), st.integers(0, 300))
def test_bytes_that_are_no_table_are_called_corrupt(data: bytes, footer: int) -> None:
    for text in (data, b"PAR1" + data + footer.to_bytes(4, "little") + b"PAR1"):
        with pytest.raises(CacheError):
            parse_samples(text, "a file")
