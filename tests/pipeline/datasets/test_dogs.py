"""Stanford Dogs in its official layout: numbered lists, an XML file of boxes per image."""

import re

import pytest
from cache_building import many_examples
from dataset_layouts import dog_annotation, write_dog_list, write_dogs
from hypothesis import given
from hypothesis import strategies as st

from pipeline.datasets import DataError, open_dataset
from pipeline.datasets.dogs import read_annotation
from pipeline.inputs.scan import scan_sample

EXPECTED = {
    ("n02085620-Chihuahua/n02085620_1", "train", 0, "Chihuahua"),
    ("n02096437-Dandie_Dinmont/n02096437_60", "train", 59, "Dandie Dinmont"),
    ("n02096585-Boston_bull/n02096585_61", "test", 60, "Boston bull"),
    ("n02116738-African_hunting_dog/n02116738_120", "test", 119, "African hunting dog"),
}


@pytest.mark.parametrize("lists", [True, False])
def test_dogs_merges_the_official_lists_and_splits_by_class_with_or_without_them(tmp_path, lists):
    dogs = open_dataset("dogs", write_dogs(tmp_path, lists=lists))
    assert {(s.id, s.split, s.label, s.class_name) for s in dogs.samples} == EXPECTED
    assert {s.box for s in dogs.samples} == {(2.0, 3.0, 20.0, 14.0)}
    assert all(scan_sample(dogs, s).ok for s in dogs.samples)


def test_one_list_of_all_files_is_enough_and_may_lie_in_the_data_sets_folder(tmp_path):
    write_dogs(tmp_path, lists=False)
    ids = sorted(EXPECTED)
    write_dog_list(tmp_path / "file_list.mat", [f"{row[0]}.jpg" for row in ids], [row[2] + 1 for row in ids])
    assert {(s.id, s.split, s.label, s.class_name) for s in open_dataset("dogs", tmp_path).samples} == EXPECTED


def test_half_of_the_lists_is_refused(tmp_path):
    (write_dogs(tmp_path) / "lists/test_list.mat").unlink()
    with pytest.raises(DataError, match=r"test_list\.mat: missing, while its other half is there"):
        open_dataset("dogs", tmp_path)


def test_without_lists_every_class_folder_is_needed_to_number_them(tmp_path):
    (write_dogs(tmp_path, lists=False) / "Images/n02116738-African_hunting_dog").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="has 119 of 120 class folders and there is no lists/"):
        open_dataset("dogs", tmp_path)


@pytest.mark.parametrize(
    ("files", "labels", "complaint"),
    [
        (["a/b.jpg", "../b.jpg"], [1, 2], r"train_list\.mat entry 2: image path '\.\./b\.jpg' leads out"),
        (["a/b.jpg", "a/c.jpg"], [1, 121], r"train_list\.mat entry 2: .*found 'a/c\.jpg' and 121"),
        (["a/b.jpg", "c.jpg"], [1, 2], r"train_list\.mat entry 2: expected a path like n02085620-Chihuahua/"),
        (["a/b.jpg", "a/c.jpg"], [1, 2, 3], r"file_list has 2 entries, labels has 3"),
    ],
)
def test_a_wrong_list_entry_is_named(tmp_path, files, labels, complaint):
    write_dog_list(write_dogs(tmp_path) / "lists/train_list.mat", files, labels)
    with pytest.raises(DataError, match=complaint):
        open_dataset("dogs", tmp_path)


def test_the_largest_of_several_dogs_is_the_object(tmp_path):
    root = write_dogs(tmp_path)
    annotation = root / "Annotation/n02085620-Chihuahua/n02085620_1"
    annotation.write_text(dog_annotation((0, 0, 5, 5), (1, 2, 22, 15), (3, 3, 9, 9)))
    boxes = {s.id: s.box for s in open_dataset("dogs", root).samples}
    assert boxes["n02085620-Chihuahua/n02085620_1"] == (1.0, 2.0, 22.0, 15.0)


def test_annotations_beyond_the_limit_are_not_opened(tmp_path):
    root = write_dogs(tmp_path)
    for k in (60, 120):
        next(root.glob(f"Annotation/*/*_{k}")).unlink()
    assert len(open_dataset("dogs", root, limit=1).samples) == 2
    with pytest.raises(DataError, match=r"n02096437_60: cannot be read: No such file.*annotation\.tar"):
        open_dataset("dogs", root)


ANNOTATION = dog_annotation((1, 2, 3, 4))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (ANNOTATION.replace("<xmin>1</xmin>", "<xmin>one</xmin>"), r" line \d+: 'one' is not a number of pixels"),
        (ANNOTATION.replace("<xmin>1</xmin>", "<xmin>nan</xmin>"), r" line \d+: 'nan' is not a number of pixels"),
        (ANNOTATION.replace("<ymax>4</ymax>", ""), r" line \d+: bndbox without ymax; expected xmin, ymin, xmax, ymax"),
        (ANNOTATION[:-30], r" line \d+: not well-formed XML"),
        ("", r" line \d+: not well-formed XML"),
        (dog_annotation(), r": holds no object with a bndbox"),
        ('<!DOCTYPE a [<!ENTITY b "x">]>\n' + ANNOTATION, r" line 1: declares a document type"),
        (ANNOTATION + " " * 1_000_000, r": larger than 1000000 bytes"),
        ("<a>" * 100_000, r" line 1: "),
    ],
)
def test_a_wrong_annotation_is_named_with_its_line(tmp_path, text, complaint):
    (tmp_path / "n02085620_1").write_text(text)
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "n02085620_1")) + complaint):
        read_annotation(tmp_path / "n02085620_1")


pixels = st.integers(0, 9999) | st.floats(0, 9999)


@many_examples
@given(st.lists(st.tuples(pixels, pixels, pixels, pixels), min_size=1, max_size=4))
def test_every_box_that_is_written_is_read_back(tmp_path, boxes):
    (tmp_path / "a").write_text(dog_annotation(*boxes))
    assert read_annotation(tmp_path / "a") == boxes


@many_examples
@given(
    st.binary(max_size=60)
    | st.builds(
        lambda at, junk: ANNOTATION.encode()[:at] + junk + ANNOTATION.encode()[at + len(junk) :],
        st.integers(0, len(ANNOTATION)),
        st.binary(max_size=8),
    )
)
def test_any_bytes_are_an_annotation_or_an_error_that_names_the_file(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    try:
        boxes, complaint = read_annotation(tmp_path / "a"), ""
    except DataError as error:
        boxes, complaint = [], str(error)
    assert bool(boxes) != bool(complaint)
    assert boxes or complaint.startswith(str(tmp_path / "a"))
