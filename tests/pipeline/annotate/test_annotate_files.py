"""Boxes and captions from a file replace those of the data set, and every wrong row is named."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_building import many_examples
from dataset_layouts import save_image, write_lines
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cache_schema import open_cache
from pipeline.annotate.config import AnnotateConfig
from pipeline.annotate.run import annotate
from pipeline.cli import app
from pipeline.datasets import DataError
from pipeline.datasets.annotated import COLUMNS, AnnotatedDataset, read_annotation_rows
from pipeline.datasets.folder import FolderDataset


@pytest.fixture
def birds(tmp_path) -> FolderDataset:
    for name in ("wren", "crow"):
        for i in range(2):
            save_image(tmp_path / "birds" / name / f"{name}{i}.png", (i, 50, 90))
    save_image(tmp_path / "birds/wren/same.png")
    save_image(tmp_path / "birds/crow/same.png")
    return FolderDataset(tmp_path / "birds", superclass="bird")


def dit_cache(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300", "TERM": "dumb"})


def write_table(folder: Path, suffix: str, rows: list[dict]) -> Path:
    path = folder / f"annotations.{suffix}"
    if suffix == "jsonl":
        return write_lines(path, [json.dumps(row) for row in rows])
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    names = list(rows[0])
    return write_lines(path, [",".join(names), *(",".join(f'"{row[n]}"' for n in names) for row in rows)])


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_file_of_any_kind_replaces_boxes_and_captions_by_id_path_or_file_name(birds, tmp_path, suffix):
    rows = [
        {"file_name": "crow/crow0.png", "box": [1.0, 2.0, 8.0, 9.5], "caption": "black, glossy"},
        {"file_name": "wren1.png", "box": [0.0, 0.0, 4.0, 4.0], "caption": "small, brown"},
    ]
    annotated = AnnotatedDataset(birds, write_table(tmp_path, suffix, rows))
    found = {s.id: (s.box, s.box_source, s.caption) for s in annotated.samples}
    assert found["crow/crow0.png"] == ((1.0, 2.0, 8.0, 9.5), "annotations", "black, glossy")
    assert found["wren/wren1.png"] == ((0.0, 0.0, 4.0, 4.0), "annotations", "small, brown")
    untouched = [s for s in annotated.samples if s.id not in ("crow/crow0.png", "wren/wren1.png")]
    assert untouched == [s for s in birds.samples if s.id not in ("crow/crow0.png", "wren/wren1.png")]
    assert (annotated.boxes, annotated.captions) == (2, 2)
    assert (annotated.name, annotated.superclass, annotated.protocol) == ("folder", "bird", birds.protocol)


def test_empty_values_leave_what_the_data_set_says(birds, tmp_path):
    file = write_lines(
        tmp_path / "a.csv", ["id,xmin,ymin,xmax,ymax,caption", "crow/crow0.png,,,,,", "wren/wren0.png,1,1,3,3,"]
    )
    annotated = {s.id: s for s in AnnotatedDataset(birds, file).samples}
    own = {s.id: s for s in birds.samples}
    assert annotated["crow/crow0.png"] == own["crow/crow0.png"]
    assert annotated["wren/wren0.png"].box == (1, 1, 3, 3)
    assert annotated["wren/wren0.png"].caption == own["wren/wren0.png"].caption


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ["id,caption", "crow/crow0.png,a", "crow/nobody.png,b"],
            r"a\.csv line 3: 'crow/nobody.png' is neither the id",
        ),
        (["id,caption", "crow/crow0.png,a", "crow0.png,b"], r"line 3: crow0.png is annotated by .*line 2 already"),
        (["file_name,caption", "same.png,a"], r"line 2: 2 images are called same.png"),
        (["id,box", 'crow/crow0.png,"[1, 2, 3]"'], r"line 2: box is not a list of four numbers"),
        (["id,box", 'crow/crow0.png,"[5, 2, 3, 4]"'], r"line 2: box \[5.0, 2.0, 3.0, 4.0\] holds nothing"),
        (["id,box", 'crow/crow0.png,"[NaN, 2, 3, 4]"'], r"line 2: 'nan' is not a number of pixels"),
        (["id,bbox", 'crow/crow0.png,"[1, 2, 3, 4]"'], r"line 2: bbox has several meanings"),
        (["id,sha256", "crow/crow0.png,abc"], r"line 2: sha256 'abc' is not a SHA-256"),
        (["caption", "a"], r"line 1: expected a header that names the column id or file_name"),
        (["id,caption", "crow/crow0.png"], r"line 2: expected 2 fields, found 1"),
        (["id,caption", ",lonely"], r"line 2: has neither id nor file_name"),
        (["id,caption"], r"a\.csv: has no row"),
    ],
)
def test_a_wrong_row_is_named_with_file_and_line(birds, tmp_path, lines, said):
    with pytest.raises(DataError, match=said) as caught:
        AnnotatedDataset(birds, write_lines(tmp_path / "a.csv", lines))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none_of_the_three_kinds_is_refused(birds, tmp_path):
    with pytest.raises(DataError, match=r"a\.txt: expected a file that ends in \.csv, \.jsonl, \.parquet"):
        AnnotatedDataset(birds, write_lines(tmp_path / "a.txt", ["id"]))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        AnnotatedDataset(birds, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"gone\.csv: cannot be read"):
        AnnotatedDataset(birds, tmp_path / "gone.csv")


def test_an_image_that_was_exchanged_after_it_was_annotated_is_noticed(birds, tmp_path):
    digests = {s.id: hashlib.sha256(birds.read(s)).hexdigest() for s in birds.samples}
    file = write_lines(tmp_path / "a.csv", ["id,sha256", *(f"{i},{d}" for i, d in digests.items())])
    save_image(tmp_path / "birds/crow/crow0.png", (200, 0, 0))
    annotated = AnnotatedDataset(birds, file)
    for sample in annotated.samples:
        if sample.id == "crow/crow0.png":
            with pytest.raises(DataError, match=r"a\.csv line 2: crow/crow0.png is not the image that was annotated"):
                annotated.read(sample)
        else:
            assert annotated.read(sample) == annotated.read(sample) == birds.read(sample)


def test_with_a_part_of_the_data_set_rows_about_the_rest_are_passed_over(birds, tmp_path):
    file = write_lines(tmp_path / "a.csv", ["id,caption", *(f"{s.id},text" for s in birds.samples)])
    part = FolderDataset(tmp_path / "birds", limit=1, superclass="bird")
    with pytest.raises(DataError, match="is neither the id"):
        AnnotatedDataset(part, file)
    assert AnnotatedDataset(part, file, partial=True).captions == len(part.samples) == 2


values = st.none() | st.text(max_size=8) | st.floats() | st.lists(st.floats(), max_size=5) | st.booleans()
objects = st.dictionaries(st.sampled_from([*COLUMNS, "other"]), values, max_size=6).map(json.dumps)


@many_examples
@given(st.lists(objects | st.text(max_size=30), max_size=4), st.sampled_from(["csv", "jsonl"]))
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory, lines, suffix):
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    refused = ""
    rows = []
    try:
        rows = read_annotation_rows(path)
    except DataError as error:
        refused = str(error)
    assert rows or refused.startswith(str(path))
    assert all(row.box is None or (row.box[0] < row.box[2] and row.box[1] < row.box[3]) for row in rows)


# --- From annotate to build --------------------------------------------------------------------------------------


def test_what_annotate_wrote_is_what_a_build_uses(birds, tmp_path, flux_folder):
    rows = [{"id": s.id, "caption": f"like {s.id}"} for s in birds.samples]
    rows[0]["box"] = [1, 2, 8, 9]
    own = write_lines(tmp_path / "own.jsonl", [json.dumps(row) for row in rows])
    output = tmp_path / "annotations.parquet"
    config = AnnotateConfig(boxes="dataset", captions="dataset", padding=0)
    annotate(AnnotatedDataset(birds, own), config, output, log=str)
    done = dit_cache(
        "build", "--dataset", "folder", "--data", tmp_path / "birds", "--superclass", "bird", "--annotations", output,
        "--teacher", flux_folder, "--resolution", 32, "--image-size", 16, "--encoding", "float32", "--timesteps", 28,
        "--output", tmp_path / "cache", "--device", "cpu", "--features", "train,test",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert f"{output}: boxes for 6, captions for 6 of 6 images" in done.output
    built = {row["id"]: row for row in open_cache(tmp_path / "cache").samples.to_pylist()}
    assert {i: row["caption"] for i, row in built.items()} == {row["id"]: row["caption"] for row in rows}
    first, second = (built[row["id"]] for row in rows[:2])
    assert (first["box"], first["box_source"]) == ([1, 2, 8, 9], "annotations")
    assert (second["box"], second["box_source"]) == ([0, 0, 24, 16], "full")


@pytest.mark.parametrize("command", ["annotate", "build", "refine", "probe"])
def test_every_command_takes_annotations_and_reports_a_wrong_row(birds, tmp_path, command):
    file = write_lines(tmp_path / "a.csv", ["id,caption", "nobody,b"])
    done = dit_cache(command, "--dataset", "folder", "--data", tmp_path / "birds", "--annotations", file)
    assert isinstance(done.exception, DataError)
    assert "a.csv line 2: 'nobody' is neither the id" in str(done.exception)
