"""Stanford Cars in both of its official layouts."""

import io
import re

import pytest
from dataset_layouts import car, write_annotations, write_cars, write_cars_in_one_file
from PIL import Image

from pipeline.datasets import DataError, open_dataset, split_counts
from pipeline.inputs.scan import scan_sample


def test_cars_merges_both_halves_and_splits_by_class(tmp_path):
    cars = open_dataset("cars", write_cars(tmp_path))
    assert [(s.id, s.split, s.label) for s in cars.samples] == [
        ("cars_train/00001", "train", 0),
        ("cars_train/00002", "train", 97),
        ("cars_train/00003", "test", 98),
        ("cars_train/00004", "test", 195),
        ("cars_test/00001", "train", 0),
        ("cars_test/00002", "test", 119),
    ]
    assert cars.samples[1].class_name == "Make 98"
    assert Image.open(io.BytesIO(cars.read(cars.samples[0]))).size == (24, 16)


def test_cars_works_without_the_test_half(tmp_path):
    cars = open_dataset("cars", write_cars(tmp_path, test_half=False))
    assert split_counts(cars.samples) == {"train": 2, "test": 2}
    assert "official train half only" in cars.protocol


def test_boxes_count_pixels_from_one_and_include_the_last_as_matlab_does(tmp_path):
    """A box of 1, 1, width, height is the whole image; one of 3, 5, 3, 5 is a single pixel."""
    write_cars(tmp_path, test_half=False)
    rows = [car(1, "00001.jpg", (1, 1, 24, 16)), car(2, "00002.jpg", (3, 5, 3, 5))]
    write_annotations(tmp_path / "devkit/cars_train_annos.mat", rows)
    assert [s.box for s in open_dataset("cars", tmp_path).samples] == [(0.0, 0.0, 24.0, 16.0), (2.0, 4.0, 3.0, 5.0)]


def test_missing_cars_say_where_was_looked_what_belongs_there_and_where_it_is_published(tmp_path):
    with pytest.raises(DataError) as caught:
        open_dataset("cars", tmp_path / "nowhere")
    message = str(caught.value)
    assert str(tmp_path / "nowhere") in message
    assert "devkit/cars_meta.mat" in message
    assert "stanford.edu" in message
    assert "\n" not in message


def test_a_test_half_without_labels_is_refused(tmp_path):
    write_cars(tmp_path)
    (tmp_path / "devkit/cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(DataError, match=r"cars_test_annos_withlabels\.mat is not"):
        open_dataset("cars", tmp_path)


def test_a_truncated_matlab_file_is_named(tmp_path):
    file = write_cars(tmp_path) / "devkit/cars_train_annos.mat"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"cars_train_annos\.mat"):
        open_dataset("cars", tmp_path)


def test_an_annotation_with_an_impossible_class_is_named_with_its_row(tmp_path):
    write_cars(tmp_path)
    write_annotations(tmp_path / "devkit/cars_train_annos.mat", [car(1, "00001.jpg"), car(197, "00002.jpg")])
    with pytest.raises(DataError, match=r"annotation 2 \(00002.jpg\): class 197 is not in 1–196"):
        open_dataset("cars", tmp_path)


def test_annotations_without_classes_are_refused(tmp_path):
    """cars_test_annos.mat of the devkit has no classes; giving it the other file's name does not help."""
    unlabelled = car(1, "00001.jpg")
    unlabelled.pop("class")
    write_annotations(write_cars(tmp_path) / "devkit/cars_test_annos_withlabels.mat", [unlabelled])
    with pytest.raises(DataError, match=r"annotation 1: has no class; this is not cars_test_annos_withlabels\.mat"):
        open_dataset("cars", tmp_path)


def test_the_labels_of_the_test_half_may_lie_beside_the_devkit(tmp_path):
    write_cars(tmp_path)
    expected = open_dataset("cars", tmp_path).samples
    name = "cars_test_annos_withlabels.mat"
    (tmp_path / "devkit" / name).rename(tmp_path / name)
    assert open_dataset("cars", tmp_path).samples == expected


def test_the_layout_of_one_annotation_file_is_read_too(tmp_path):
    cars = open_dataset("cars", write_cars_in_one_file(tmp_path))
    assert [(s.id, s.split, s.class_name) for s in cars.samples] == [
        ("car_ims/000001", "train", "Make 1"),
        ("car_ims/000002", "train", "Make 98"),
        ("car_ims/000003", "test", "Make 99"),
        ("car_ims/000004", "test", "Make 196"),
    ]
    assert all(scan_sample(cars, s).ok for s in cars.samples)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (car(1, "../../etc/passwd"), "annotation 1: image path 'cars_train/../../etc/passwd' leads out"),
        (car(1, "a.jpg", (1, float("nan"), 2, 2)), "annotation 1: 'nan' is not a number of pixels"),
        (car(1, "a.jpg", (1, "one", 2, 2)), "annotation 1: 'one' is not a number of pixels"),
        (car(1.5, "a.jpg"), "annotation 1: '1.5' is not a whole number"),
        (car(0, "a.jpg"), "annotation 1 (a.jpg): class 0 is not in 1–196"),
    ],
)
def test_a_wrong_annotation_is_named(tmp_path, wrong, complaint):
    write_annotations(write_cars(tmp_path) / "devkit/cars_train_annos.mat", [wrong])
    with pytest.raises(DataError) as caught:
        open_dataset("cars", tmp_path)
    assert complaint in str(caught.value)
    assert str(tmp_path / "devkit/cars_train_annos.mat") in str(caught.value)


@pytest.mark.parametrize("position", [200, 1481])
def test_a_damaged_matlab_file_is_named_even_where_it_crashes_its_reader(tmp_path, position):
    """One wrong byte in the tag of an element is a segmentation fault in scipy 1.17."""
    file = write_cars(tmp_path, test_half=False) / "devkit/cars_train_annos.mat"
    data = bytearray(file.read_bytes())
    data[position] = 254
    file.write_bytes(data)
    with pytest.raises(DataError, match=rf"{re.escape(str(tmp_path))}.*cars_train_annos\.mat: "):
        open_dataset("cars", tmp_path)
