"""Any folder of images as a data set: layouts, metadata, the open-set split."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_building import many_examples
from dataset_layouts import save_image, write_lines
from hypothesis import given
from hypothesis import strategies as st

from pipeline.datasets import DataError, DatasetOptionError, open_dataset, split_counts
from pipeline.datasets.class_split import ClassSplit, in_class_order
from pipeline.datasets.folder_metadata import COLUMNS, read_metadata
from pipeline.inputs.scan import scan_sample


def write_images(root, *sources):
    for source in sources:
        save_image(root / source, mode="P" if source.endswith("gif") else "RGB", colour=1)
    return root


def splits(dataset):
    return {s.id: (s.split, s.label, s.class_name) for s in dataset.samples}


def test_folders_are_classes_and_the_first_half_of_them_trains(tmp_path):
    write_images(
        tmp_path, "finch/a.jpg", "finch/deeper/b.PNG", "gull/c.webp", "heron/d.bmp", "ibis/e.gif", "jay/f.jpeg"
    )
    (tmp_path / "finch/notes.txt").write_text("not an image")
    (tmp_path / "finch/.hidden.jpg").write_bytes(b"")
    (tmp_path / "empty class").mkdir()
    folder = open_dataset("folder", tmp_path)
    assert splits(folder) == {
        "finch/a.jpg": ("train", 0, "finch"),
        "finch/deeper/b.PNG": ("train", 0, "finch"),
        "gull/c.webp": ("train", 1, "gull"),
        "heron/d.bmp": ("train", 2, "heron"),
        "ibis/e.gif": ("test", 3, "ibis"),
        "jay/f.jpeg": ("test", 4, "jay"),
    }
    assert folder.protocol == "classes in name order: the first 3 train, the other 2 test"
    assert folder.superclass == "object"
    assert all(scan_sample(folder, s).ok for s in folder.samples)


def test_the_users_choice_of_classes_share_and_super_class_is_followed(tmp_path):
    write_images(tmp_path, *(f"{name}/a.jpg" for name in "abcde"))
    by_ratio = open_dataset("folder", tmp_path, train_ratio=0.2, superclass="insect")
    assert {s.class_name for s in by_ratio.samples if s.split == "train"} == {"a"}
    assert by_ratio.superclass == "insect"
    by_name = open_dataset("folder", tmp_path, train_classes=["e", "b"])
    assert {s.class_name for s in by_name.samples if s.split == "train"} == {"b", "e"}
    assert by_name.protocol == "2 classes by name train, the other 3 test"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"train_classes": ["z"]}, "has no image of a class 'z'"),
        ({"train_classes": []}, "names no class"),
        ({"train_classes": ["a", "b"]}, "all 2 classes would train and none test"),
        ({"train_ratio": 1.0}, "must lie between 0 and 1"),
        ({"train_ratio": float("nan")}, "must lie between 0 and 1"),
        ({"train_ratio": 0.5, "train_classes": ["a"]}, "give one of them"),
    ],
)
def test_a_choice_that_cannot_be_followed_is_wrong_usage(tmp_path, options, complaint):
    write_images(tmp_path, "a/1.jpg", "b/1.jpg")
    with pytest.raises(DatasetOptionError, match=complaint):
        open_dataset("folder", tmp_path, **options)


@many_examples
@given(st.integers(2, 600), st.floats(0.01, 0.99))
def test_any_share_leaves_classes_on_both_sides(count, ratio):
    names = [f"{k:03d}" for k in range(count)]
    train, _ = ClassSplit(train_ratio=ratio).choose(names, "here")
    assert 0 < len(train) < count
    assert train == set(names[: len(train)])
    assert abs(len(train) - count * ratio) <= 1


def test_classes_called_by_numbers_are_in_the_order_of_their_values():
    assert in_class_order({"10", "9", "1"}) == ["1", "9", "10"]
    assert in_class_order({"10", "9", "a"}) == ["10", "9", "a"]


def test_train_test_and_unlabeled_folders_are_splits(tmp_path):
    write_images(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/c/1.jpg", "unlabeled/x/1.jpg", "unlabeled/2.jpg")
    folder = open_dataset("folder", tmp_path)
    assert splits(folder) == {
        "train/a/1.jpg": ("train", 0, "a"),
        "train/b/1.jpg": ("train", 1, "b"),
        "test/c/1.jpg": ("test", 2, "c"),
        "unlabeled/x/1.jpg": ("unlabeled", -1, ""),
        "unlabeled/2.jpg": ("unlabeled", -1, ""),
    }
    assert folder.protocol == "train and test as given"


def test_a_closed_set_split_is_refused_and_can_be_put_together_and_split_by_class(tmp_path):
    write_images(tmp_path, *(f"{split}/{name}/1.jpg" for split in ("train", "test") for name in "ab"))
    with pytest.raises(DataError, match=r"class 'a' is in test \(test/a/1\.jpg\) and in train .*--train-ratio 0\.5"):
        open_dataset("folder", tmp_path)
    merged = open_dataset("folder", tmp_path, train_ratio=0.5)
    assert {(s.id, s.split) for s in merged.samples} == {
        ("train/a/1.jpg", "train"), ("test/a/1.jpg", "train"), ("train/b/1.jpg", "test"), ("test/b/1.jpg", "test"),
    }  # fmt: skip


def test_a_class_may_be_called_train_if_the_user_says_so_and_a_validation_folder_is_asked_about(tmp_path):
    write_images(tmp_path, "train/1.jpg", "bus/1.jpg")
    with pytest.raises(DataError, match=r"train: beside bus/, is this a class or a split\?"):
        open_dataset("folder", tmp_path)
    assert splits(open_dataset("folder", tmp_path, train_ratio=0.5))["train/1.jpg"] == ("test", 1, "train")
    write_images(tmp_path, "val/a/1.jpg", "train/a/1.jpg")
    with pytest.raises(DataError, match=r"val: beside train/, is this a class or a split\?"):
        open_dataset("folder", tmp_path)


ROWS = [
    {"file_name": "a/1.jpg", "box": [1, 2, 11.5, 12], "caption": "a grey, long-billed wader", "class_name": "willet"},
    {"file_name": "a/2.jpg", "xmin": 0, "ymin": 1, "xmax": 5, "ymax": 6, "label": 7},
    {"file_name": "3.jpg", "caption": 'said "kek"', "split": "unlabeled"},
    {"file_name": "gone.jpg", "class_name": "willet"},
]


def write_metadata(root, kind, rows):
    path = root / f"metadata.{kind}"
    if kind == "jsonl":
        return write_lines(path, [json.dumps(row) for row in rows])
    if kind == "parquet":
        columns = {name for row in rows for name in row}
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in sorted(columns)}), path)
        return path
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_gives_boxes_captions_classes_and_splits_in_three_formats(tmp_path, kind):
    write_images(tmp_path, "a/1.jpg", "a/2.jpg", "a/3.jpg", "3.jpg", "4.jpg")
    write_metadata(tmp_path, kind, ROWS)
    folder = open_dataset("folder", tmp_path, train_classes=["willet"])
    assert splits(folder) == {
        "a/1.jpg": ("train", 2, "willet"),
        "a/2.jpg": ("test", 0, "7"),
        "a/3.jpg": ("test", 1, "a"),
        "3.jpg": ("unlabeled", -1, ""),
        "4.jpg": ("unlabeled", -1, ""),
        "gone.jpg": ("train", 2, "willet"),
    }
    by_id = {s.id: s for s in folder.samples}
    assert by_id["a/1.jpg"].box == (1.0, 2.0, 11.5, 12.0)
    assert by_id["a/1.jpg"].caption == "a grey, long-billed wader"
    assert by_id["a/2.jpg"].box == (0.0, 1.0, 5.0, 6.0)
    assert by_id["3.jpg"].box is None
    assert by_id["3.jpg"].caption == 'said "kek"'
    assert {s.id for s in folder.samples if not scan_sample(folder, s).ok} == {"gone.jpg"}


def test_each_split_folder_may_have_its_own_metadata(tmp_path):
    write_images(tmp_path, "train/1.jpg", "train/2.jpg", "test/1.jpg")
    write_metadata(tmp_path / "train", "csv", [{"file_name": f"{k}.jpg", "label": f"bird {k}"} for k in (1, 2)])
    write_metadata(tmp_path / "test", "jsonl", [{"file_name": "1.jpg", "label": "bird 3"}])
    assert splits(open_dataset("folder", tmp_path)) == {
        "train/1.jpg": ("train", 0, "bird 1"),
        "train/2.jpg": ("train", 1, "bird 2"),
        "test/1.jpg": ("test", 2, "bird 3"),
    }


def test_a_split_column_alone_gives_the_protocol(tmp_path):
    write_images(tmp_path, "a/1.jpg", "b/1.jpg", "c/1.jpg")
    rows = [{"file_name": f"{name}/1.jpg", "split": "test" if name == "a" else "train"} for name in "abc"]
    write_metadata(tmp_path, "csv", rows)
    folder = open_dataset("folder", tmp_path)
    assert split_counts(folder.samples) == {"train": 2, "test": 1}
    assert folder.protocol == "train and test as given"
    write_metadata(tmp_path, "csv", rows[:2])
    with pytest.raises(DataError, match=r"c/1\.jpg: has no split while others have one"):
        open_dataset("folder", tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name,box\na.jpg,1\n", r" line 1: expected a header that names the column file_name"),
        ("file_name,box\na.jpg,[1 2 3]\n", r" line 2: box is not a list of four numbers"),
        ('file_name,box\na.jpg,"[1,2,3,NaN]"\n', r" line 2: 'nan' is not a number of pixels"),
        ('file_name,caption\na.jpg,"two\nlines"\nb.jpg\n', r" line 4: expected 2 fields, found 1"),
        ('file_name,caption\na.jpg,x\nb.jpg,"open\n', r" line 3: not CSV"),
        ("file_name,xmin,ymin,xmax\na.jpg,1,2,3\n", r" line 2: has no ymax"),
        ("file_name,split\na.jpg,dev\n", r" line 2: split 'dev' is none of train, unlabeled, test"),
        ("file_name,split\n../a.jpg,train\n", r" line 2: image path '\.\./a\.jpg' leads out"),
        ("file_name,split\n,train\n", r" line 2: has no file_name"),
        ("file_name,bbox\na.jpg,1\n", r" line 2: bbox has several meanings"),
        ("file_name,label\na.jpg,1\n\nb.jpg,2\na.jpg,3\n", r" line 5: a\.jpg is described by .*line 2 already"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, text, complaint):
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "metadata.csv")) + complaint):
        read_metadata(tmp_path)


def test_a_labelled_split_needs_a_class_and_an_image_one_metadata_file(tmp_path):
    write_images(tmp_path, "a/1.jpg", "b/1.jpg", "3.jpg")
    write_metadata(tmp_path, "csv", [{"file_name": "3.jpg", "split": "train"}])
    with pytest.raises(DataError, match=r"metadata\.csv line 2: 3\.jpg is in split train but has no class"):
        open_dataset("folder", tmp_path)
    write_metadata(tmp_path, "jsonl", [])
    with pytest.raises(DataError, match=r"has metadata\.csv and metadata\.jsonl; keep one"):
        open_dataset("folder", tmp_path)


values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.lists(st.floats(), max_size=5)
)
rows = st.lists(st.dictionaries(st.sampled_from([*COLUMNS, "other"]), values), max_size=3)


@many_examples
@given(
    st.tuples(st.just("jsonl"), rows.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()))
    | st.tuples(st.sampled_from(["csv", "jsonl", "parquet"]), st.binary(max_size=80))
    | st.tuples(st.just("csv"), st.binary(max_size=60).map(lambda data: b"file_name,box,split,caption,xmin\n" + data))
)
def test_any_metadata_is_read_or_an_error_that_names_the_file(tmp_path, content):
    for old in tmp_path.iterdir():
        old.unlink()
    kind, data = content
    path = tmp_path / f"metadata.{kind}"
    path.write_bytes(data)
    try:
        images, complaint = read_metadata(tmp_path), ""
    except DataError as error:
        images, complaint = {}, str(error)
    assert not complaint or complaint.startswith(str(path))
    assert all(not name.startswith("/") and ".." not in name.split("/") for name in images)


def test_links_to_folders_are_refused_and_links_to_outside_files_are_set_aside(tmp_path):
    root = write_images(tmp_path / "data", "a/1.jpg", "b/1.jpg", "b/2.jpg")
    save_image(tmp_path / "outside.jpg")
    (root / "a/2.jpg").symlink_to(tmp_path / "outside.jpg")
    (root / "a/3.jpg").symlink_to(root / "b/2.jpg")
    folder = open_dataset("folder", root)
    assert {s.id for s in folder.samples if not scan_sample(folder, s).ok} == {"a/2.jpg"}
    (root / "c").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"data/c: a link to a folder, which is not followed"):
        open_dataset("folder", root)


def test_a_folder_without_images_or_without_training_classes_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no image"):
        open_dataset("folder", tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        open_dataset("folder", tmp_path / "nowhere")
    write_images(tmp_path, "1.jpg", "2.jpg")
    with pytest.raises(DataError, match="class"):
        open_dataset("folder", tmp_path)
