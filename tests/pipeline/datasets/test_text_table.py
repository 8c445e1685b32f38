"""Tables of `id value …` lines: what is written is read back, and anything else is refused by file and line."""

import re

import pytest
from cache_building import many_examples
from hypothesis import given
from hypothesis import strategies as st

from pipeline.datasets import DataError
from pipeline.datasets.boxes import coordinate
from pipeline.datasets.text_table import read_table

words = st.text(st.characters(exclude_characters=" \t\r\n\0\ufeff", exclude_categories=["Cs"]), min_size=1, max_size=9)
blanks = st.text(st.sampled_from(" \t"), min_size=1, max_size=3)
sentences = st.builds(lambda first, gap, last: first + gap + last, words, blanks, words) | words


@many_examples
@given(
    rows=st.lists(st.tuples(words, words, sentences), min_size=1, max_size=6, unique_by=lambda row: row[0]),
    gap=blanks,
    end=st.sampled_from(["\n", "\r\n", " \n", "\n\n"]),
    last_end=st.booleans(),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_any_table_that_is_written_is_read_back(tmp_path, rows, gap, end, last_end, mark):
    text = end.join(gap.join(row) for row in rows) + (end if last_end else "")
    (tmp_path / "t.txt").write_bytes(mark + text.encode())
    table = read_table(tmp_path / "t.txt", ("id", "word", "text"), last_is_text=True)
    assert [line.fields for line in table.values()] == rows
    assert list(table) == [row[0] for row in rows]


@many_examples
@given(st.binary(max_size=200) | st.lists(st.binary(max_size=20)).map(b"\n".join), st.booleans())
def test_any_bytes_are_a_table_or_an_error_that_names_the_file(tmp_path, data, last_is_text):
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    try:
        table, complaint = read_table(path, ("id", "value"), last_is_text=last_is_text), ""
    except DataError as error:
        table, complaint = {}, str(error)
    assert bool(table) != bool(complaint)
    assert all(len(line.fields) == 2 for line in table.values())
    assert table or re.match(rf"{re.escape(str(path))}( line \d+: |: has no entry)", complaint)
    assert len(complaint.splitlines()) <= 1


@many_examples
@given(st.text(st.characters(min_codepoint=0xA1, max_codepoint=0xFF), min_size=1, max_size=8))
def test_a_latin_1_line_is_read_among_utf_8_ones(tmp_path, name):
    (tmp_path / "t.txt").write_bytes(b"1 " + f"{name}a".encode("latin-1") + b"\n2 " + "名前".encode())
    table = read_table(tmp_path / "t.txt", ("id", "name"))
    # Bytes that happen to be UTF-8 stay UTF-8.
    latin = f"{name}a".encode("latin-1")
    try:
        expected = latin.decode("utf-8")
    except UnicodeDecodeError:
        expected = f"{name}a"
    assert table["1"].fields[1] == expected
    assert table["2"].fields[1] == "名前"


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"1 a\n2 b c\n", r"t\.txt line 2: expected 2 fields \(id value\), found 3"),
        (b"1 a\n\n\n2\n", r"t\.txt line 4: expected 2 fields \(id value\), found 1"),
        (b"1 a\n2 b\n1 c\n", r"t\.txt line 3: id '1' is on line 1 already"),
        (b"1 a\n2 \0\n", r"t\.txt line 2: holds a zero byte"),
        (b"1 a\n2 " + b"x" * 70_000, r"t\.txt line 2: longer than 65536 bytes"),
        ("1 a\n".encode("utf-16"), r"t\.txt line 1: begins UTF-16 text; save the file as UTF-8"),
        (b"\n \n", r"t\.txt: has no entry; expected lines of id value"),
    ],
)
def test_a_wrong_line_is_named_with_what_is_expected(tmp_path, data, complaint):
    (tmp_path / "t.txt").write_bytes(data)
    with pytest.raises(DataError, match=complaint):
        read_table(tmp_path / "t.txt", ("id", "value"))


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"t\.txt: cannot be read: No such file"):
        read_table(tmp_path / "t.txt", ("id", "value"))


@many_examples
@given(st.floats(-1e6, 1e6))
def test_a_coordinate_is_the_number_that_was_written(value):
    assert coordinate(repr(value)) == coordinate(value) == value


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e7", "1_0", "", "x", "٣", None, True, [], 10**400, "1 2"])
def test_what_is_no_number_of_pixels_is_refused(value):
    with pytest.raises(ValueError, match="is not a number of pixels"):
        coordinate(value)
