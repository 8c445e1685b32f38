"""One table is one data set, whether it is CSV, JSON lines or Parquet; what is not read is said."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_building import many_examples
from dataset_layouts import save_image, write_lines
from hypothesis import given
from hypothesis import strategies as st

from pipeline.datasets import DataError, open_dataset, remarks_of
from pipeline.datasets.annotated import AnnotatedDataset
from pipeline.datasets.folder_metadata import read_metadata
from pipeline.datasets.image_rows import LONGEST_ROW


def write_table(root, kind, column, values):
    """The table as a table library writes it: missing values empty in CSV, null elsewhere."""
    path = root / f"metadata.{kind}"
    names = [f"{k}.jpg" for k in range(len(values))]
    if kind == "parquet":
        pq.write_table(pa.table({"file_name": names, column: values}), path)
    elif kind == "jsonl":
        write_lines(path, [json.dumps({"file_name": n, column: v}) for n, v in zip(names, values, strict=True)])
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["file_name", column], *zip(names, values, strict=True)])
    return path


def classes_by_format(folder, column, values):
    found = {}
    for kind in ("csv", "jsonl", "parquet"):
        path = write_table(folder, kind, column, values)
        try:
            found[kind] = [row.class_name for row in read_metadata(folder).values()]
        except DataError as error:
            found[kind] = str(error).replace(" row 2", " line 3").split(" line ")[-1].split(":", 1)[-1]
        path.unlink()
    return found


@pytest.mark.parametrize("column", ["label", "class_name"])
def test_numbers_beside_a_blank_are_the_same_classes_in_every_format(tmp_path, column):
    assert list(classes_by_format(tmp_path, column, [1.0, None, 12.0]).values()) == [["1", None, "12"]] * 3
    assert list(classes_by_format(tmp_path, column, [1, 2]).values()) == [["1", "2"]] * 3


columns = (
    st.lists(st.none() | st.integers(0, 10**6), min_size=1, max_size=5)
    | st.lists(st.none() | st.integers(-9, 99).map(float) | st.sampled_from([0.5, 1e20, 2.25]), min_size=1, max_size=5)
    | st.lists(
        st.none() | st.sampled_from(["1", "1.0", "01", "wren", "Café", "1e3", "-2"]) | st.text("aß 7.", max_size=4),
        min_size=1,
        max_size=5,
    )
)


@many_examples
@given(columns)
def test_a_label_column_gives_the_same_classes_in_every_format_or_is_refused_in_all(tmp_path, values):
    found = classes_by_format(tmp_path, "label", values)
    refused = {kind: isinstance(result, str) for kind, result in found.items()}
    assert len(set(refused.values())) == 1, found
    if not refused["csv"]:
        assert found["csv"] == found["jsonl"] == found["parquet"]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (["7", "07"], r" line 3: label '07' and '7' \(.* line 2\) are one number written in two ways"),
        (["wren", "1", "1.0"], r" line 4: label '1\.0' and '1' \(.* line 3\) are one number"),
        (["wren", "nan"], r" line 3: label 'nan' is what table libraries write for a missing value"),
        (["NaN", "1"], r" line 2: label 'NaN' is what"),
        (["<NA>", "1"], r" line 2: label '<NA>' is what"),
        (["wren", "NA"], r" line 3: label 'NA' is what"),
        (["1", "None"], r" line 3: label 'None' is what"),
        (["1", "-inf"], r" line 3: label is not finite"),
    ],
)
def test_labels_that_are_not_unique_or_no_value_are_refused_by_line(tmp_path, values, complaint):
    write_table(tmp_path, "csv", "label", values)
    with pytest.raises(DataError, match=r"metadata\.csv" + complaint):
        read_metadata(tmp_path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_that_nobody_reads_may_be_long_and_are_named_once(tmp_path, kind):
    for name in "ab":
        save_image(tmp_path / f"{name}/0.jpg")
    rows = [{"file_name": f"{name}/0.jpg", "text": f"a {name}", "photo": "x" * 300_000, "by": "me"} for name in "ab"]
    path = tmp_path / f"metadata.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        write_lines(path, [json.dumps(row) for row in rows])
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    folder = open_dataset("folder", tmp_path)
    assert [s.caption for s in folder.samples] == ["a a", "a b"]
    (line,) = folder.remarks
    assert line.startswith(f"{path}: columns that are not read: photo, by; read are file_name, box")
    annotated = AnnotatedDataset(folder, path)
    assert annotated.captions == 2
    assert [said.count("photo, by") for said in remarks_of(annotated)] == [1, 1]


def test_a_caption_goes_before_a_text_and_one_that_fills_a_book_is_refused(tmp_path):
    path = write_lines(tmp_path / "metadata.csv", ["file_name,text,caption", "a.jpg,second,first", "b.jpg,second,"])
    assert [row.caption for row in read_metadata(tmp_path).values()] == ["first", "second"]
    write_lines(path, ["file_name,caption", "a.jpg," + "x" * 70_000])
    with pytest.raises(DataError, match="line 2: caption is 70000 characters long; expected at most 65536"):
        read_metadata(tmp_path)


def test_the_longest_row_holds_a_photograph():
    assert LONGEST_ROW > 100e6
