"""The data sets keep to their open-set protocol and say which file is wrong."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from pipeline.datasets import DataError, open_dataset, split_counts
from pipeline.datasets.birds import ATTRIBUTES, BirdAttributes, describe, random_attributes, render_scene
from pipeline.datasets.demo import DemoConfig, DemoDataset, draw_classes

attributes = st.builds(BirdAttributes, **{name: st.sampled_from(values) for name, values in ATTRIBUTES.items()})


@settings(max_examples=25, deadline=None)
@given(attributes, st.integers(0, 2**31))
def test_a_scene_is_a_pure_function_of_attributes_and_seed_and_its_box_lies_inside(bird, seed):
    image, box = render_scene(bird, seed)
    again, _ = render_scene(bird, seed)
    assert image.tobytes() == again.tobytes()
    x0, y0, x1, y1 = box
    assert 0 <= x0 < x1 <= image.width
    assert 0 <= y0 < y1 <= image.height


def test_the_box_is_where_the_bird_is():
    """Two birds that differ in colour only differ in no pixel outside the box."""
    red = BirdAttributes("red", "red", "red", "plain", "plain", "long", "long")
    blue = BirdAttributes("blue", "blue", "blue", "plain", "plain", "long", "long")
    for seed in range(10):
        (a, box), (b, _) = render_scene(red, seed), render_scene(blue, seed)
        rows, columns = np.nonzero((np.asarray(a) != np.asarray(b)).any(-1))
        assert columns.min() >= np.floor(box[0]) - 1
        assert columns.max() <= np.ceil(box[2])
        assert rows.min() >= np.floor(box[1]) - 1
        assert rows.max() <= np.ceil(box[3])


@settings(max_examples=50)
@given(attributes, st.integers(0, 1000))
def test_a_caption_names_attributes_but_never_the_whole_class(bird, seed):
    caption = describe(bird, np.random.default_rng(seed))
    assert len(caption.split(", ")) == 3
    assert bird.name not in caption
    assert caption.isascii()
    assert len(caption) < 60


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_no_test_combination_is_seen_in_training_with_or_without_a_label(seed):
    train, test, unlabeled = draw_classes(DemoConfig(seed=seed, unlabeled=100))
    assert len(train) == len(test) == 40
    assert len(unlabeled) == 100
    assert not set(test) & (set(train) | set(unlabeled))
    assert not set(train) & set(unlabeled)
    everyone = [*train, *test]
    assert min(a.distance(b) for i, a in enumerate(everyone) for b in everyone[:i]) >= 2


def test_train_and_test_share_the_coarse_colours_so_only_details_tell_classes_apart():
    train, test, _ = draw_classes(DemoConfig(unlabeled=0))
    assert {(c.body, c.wing) for c in train} == {(c.body, c.wing) for c in test}


def test_the_demo_data_set_is_the_same_every_time(tiny_dataset):
    again = DemoDataset(tiny_dataset.config)
    assert again.samples == tiny_dataset.samples
    assert all(again.read(s) == tiny_dataset.read(s) for s in again.samples[:5])
    assert split_counts(again.samples) == {"train": 20, "unlabeled": 6, "test": 20}
    assert all(s.label == -1 and not s.class_name for s in again.samples if s.split == "unlabeled")


def test_random_attributes_cover_every_value():
    rng = np.random.default_rng(0)
    drawn = [random_attributes(rng) for _ in range(400)]
    assert all({getattr(d, name) for d in drawn} == set(values) for name, values in ATTRIBUTES.items())


# --- Stanford Cars -----------------------------------------------------------------------------------------------


def write_annotations(path: Path, rows, with_class=True):
    names = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", *(["class"] if with_class else []), "fname"]
    table = np.zeros((1, len(rows)), dtype=[(n, object) for n in names])
    for i, row in enumerate(rows):
        for name in names:
            table[0, i][name] = row[name]
    savemat(path, {"annotations": table})


def row(label, name, box=(1, 1, 20, 16)):
    return dict(zip(["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"], [*box, label, name], strict=True))


def write_cars(root: Path, test_half=True) -> Path:
    """Stanford Cars in its official layout: 196 names, 1-based classes and boxes, two halves."""
    (root / "devkit").mkdir(parents=True)
    savemat(
        root / "devkit/cars_meta.mat", {"class_names": np.array([[f"Make {i}" for i in range(1, 197)]], dtype=object)}
    )
    halves = {"cars_train": [1, 98, 99, 196]} | ({"cars_test": [1, 120]} if test_half else {})
    for folder, labels in halves.items():
        (root / folder).mkdir()
        rows = []
        for i, label in enumerate(labels, start=1):
            rows.append(row(label, f"{i:05d}.jpg"))
            Image.new("RGB", (24, 16), (label, 0, 0)).save(root / folder / f"{i:05d}.jpg")
        name = "cars_train_annos.mat" if folder == "cars_train" else "cars_test_annos_withlabels.mat"
        write_annotations(root / "devkit" / name, rows)
    return root


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


def test_matlab_boxes_become_zero_based_and_half_open(tmp_path):
    assert open_dataset("cars", write_cars(tmp_path)).samples[0].box == (0.0, 0.0, 20.0, 16.0)


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
    write_annotations(tmp_path / "devkit/cars_train_annos.mat", [row(1, "00001.jpg"), row(197, "00002.jpg")])
    with pytest.raises(DataError, match=r"annotation 2 \(00002.jpg\): class 197 is not in 1–196"):
        open_dataset("cars", tmp_path)


def test_annotations_without_classes_are_refused(tmp_path):
    write_cars(tmp_path)
    write_annotations(tmp_path / "devkit/cars_train_annos.mat", [row(1, "00001.jpg")], with_class=False)
    with pytest.raises(DataError, match="annotation 1"):
        open_dataset("cars", tmp_path)


def test_an_unknown_data_set_is_answered_with_the_known_ones():
    with pytest.raises(DataError, match="unknown data set 'cats'; known are cars, cub, demo, dogs, folder, nabirds"):
        open_dataset("cats")
