"""The data sets keep to their open-set protocol and say which file is wrong."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dataset_layouts import save_image, write_cub, write_lines
from hypothesis import given
from hypothesis import strategies as st

import pipeline.datasets
from pipeline.datasets import DataError, DatasetOptionError, dataset_names, open_dataset, split_counts
from pipeline.datasets.base import Sample, check_open_set
from pipeline.datasets.bird_scenes import render_scene
from pipeline.datasets.birds import ATTRIBUTES, BirdAttributes, describe, random_attributes
from pipeline.datasets.demo import DemoConfig, DemoDataset, draw_classes
from pipeline.inputs.scan import scan_sample
from pipeline.inputs.views import object_view

attributes = st.builds(BirdAttributes, **{name: st.sampled_from(values) for name, values in ATTRIBUTES.items()})


@given(attributes, st.integers(0, 2**31))
def test_a_scene_is_a_pure_function_of_attributes_and_seed_and_its_box_lies_inside(bird, seed):
    image, box = render_scene(bird, seed)
    again, _ = render_scene(bird, seed)
    assert image.tobytes() == again.tobytes()
    x0, y0, x1, y1 = box
    assert 0 <= x0 < x1 <= image.width
    assert 0 <= y0 < y1 <= image.height


def test_a_box_is_loose_but_holds_the_bird():
    """Two birds that differ in colour only differ in few pixels outside the box, which is not much larger than they."""
    red = BirdAttributes("red", "red", "red", "plain", "plain", "long", "long")
    blue = BirdAttributes("blue", "blue", "blue", "plain", "plain", "long", "long")
    tight = []
    for seed in range(30):
        (a, box), (b, _) = render_scene(red, seed), render_scene(blue, seed)
        rows, columns = np.nonzero((np.asarray(a) != np.asarray(b)).any(-1))
        inside = (columns >= box[0] - 1) & (columns < box[2]) & (rows >= box[1] - 1) & (rows < box[3])
        assert inside.mean() > 0.85
        tight.append(np.ptp(columns) * np.ptp(rows) / ((box[2] - box[0]) * (box[3] - box[1])))
    assert 0.5 < np.mean(tight) < 0.8
    assert np.ptp(tight) > 0.2


def test_what_lies_where_in_a_picture_hardly_tells_birds_of_the_same_colours_apart():
    """The nearest crop by its pixels is little better than a guess where birds differ in two attributes."""
    birds = [
        BirdAttributes("grey", "blue", "red", "plain", "streaked", "long", "forked"),
        BirdAttributes("grey", "blue", "red", "plain", "banded", "thick", "forked"),
    ]
    crops, labels = [], []
    for label, bird in enumerate(birds):
        for seed in range(40):
            image, box = render_scene(bird, [label, seed])
            crops.append(np.asarray(object_view(image, box, 24), dtype=np.float32).ravel())
            labels.append(label)
    seen = np.stack(crops) - np.mean(crops, axis=0)
    seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    likeness = seen @ seen.T
    np.fill_diagonal(likeness, -1)
    found = np.array(labels)[likeness.argmax(axis=1)] == labels
    assert found.mean() < 0.7


@given(attributes, st.integers(0, 1000))
def test_a_caption_names_attributes_but_never_the_whole_class(bird, seed):
    caption = describe(bird, np.random.default_rng(seed))
    assert len(caption.split(", ")) == 3
    assert bird.name not in caption
    assert caption.isascii()
    assert len(caption) < 60


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


def test_an_unknown_data_set_is_answered_with_the_known_ones():
    with pytest.raises(DataError, match="unknown data set 'cats'; known are cars, cub, demo, dogs, folder, nabirds"):
        open_dataset("cats")


@pytest.mark.parametrize("name", sorted(set(dataset_names()) - {"folder"}))
@pytest.mark.parametrize("option", [{"train_ratio": 0.5}, {"train_classes": ["a"]}, {"superclass": "bird"}])
def test_a_data_set_with_a_protocol_of_its_own_takes_no_other(tmp_path, name, option):
    with pytest.raises(DatasetOptionError, match=rf"data set {name} has a protocol of its own and does not take --"):
        open_dataset(name, tmp_path, **option)


def test_the_demo_data_set_reads_no_directory(tmp_path):
    with pytest.raises(DataError, match="leave out --data"):
        open_dataset("demo", tmp_path)


def test_the_limit_of_the_demo_data_set_counts_images_of_each_split(tiny_dataset):
    some = DemoDataset(tiny_dataset.config, limit=3)
    assert split_counts(some.samples) == {"train": 3, "unlabeled": 3, "test": 3}
    assert set(some.samples) < set(tiny_dataset.samples)


GOOD = [
    Sample("a", "train", 0, "finch", "a.jpg", None, "", ""),
    Sample("b", "test", 1, "gull", "b.jpg", None, "", ""),
    Sample("c", "unlabeled", -1, "", "c.jpg", None, "", ""),
]


@pytest.mark.parametrize(
    ("number", "change", "complaint"),
    [
        (0, {"label": 1}, "class 'gull' is in train and in test"),
        (0, {"split": "test"}, "no training image found"),
        (1, {"id": "a"}, "sample id 'a' occurs more than once"),
        (1, {"label": -1}, "b is in split test and has label -1"),
        (2, {"label": 2}, "c is in split unlabeled and has label 2"),
    ],
)
def test_a_data_set_that_is_not_open_set_is_refused(number, change, complaint):
    check_open_set(GOOD, "here")
    with pytest.raises(DataError, match=f"here: {complaint}"):
        check_open_set([replace(s, **change) if i == number else s for i, s in enumerate(GOOD)], "here")


README = Path(pipeline.datasets.__file__).with_name("README.md").read_text(encoding="utf-8")


def test_the_readmes_example_is_a_working_data_set(tmp_path):
    section = README.split("## Adding a data set")[1].split("\n## ")[0]
    example = re.search(r"```python\n(.*?)```", section, flags=re.S).group(1)
    assert len(example.splitlines()) <= 35
    module: dict = {}
    exec(compile(example, "README.md", "exec"), module)
    write_lines(
        tmp_path / "labels.txt", ["a.jpg 1 rose (red)", "b.jpg 51 lily", "c.jpg 52 iris", "d.jpg 102 crown vetch"]
    )
    for name in "abc":
        save_image(tmp_path / f"jpg/{name}.jpg")
    flowers = module["FlowersDataset"](root=tmp_path)
    assert [(s.split, s.class_name) for s in flowers.samples] == [
        ("train", "rose (red)"), ("train", "lily"), ("test", "iris"), ("test", "crown vetch"),
    ]  # fmt: skip
    assert [scan_sample(flowers, s).ok for s in flowers.samples] == [True, True, True, False]
    assert split_counts(module["FlowersDataset"](root=tmp_path, limit=1).samples) == {"train": 1, "test": 1}
    write_lines(tmp_path / "labels.txt", ["a.jpg 1 rose", "b.jpg none lily"])
    with pytest.raises(DataError, match=r"labels\.txt line 2: class id 'none' is not a whole number"):
        module["FlowersDataset"](root=tmp_path)


def test_the_readme_gives_the_layout_of_every_data_set():
    section = README.split("\n## ")[0]
    assert all(f"| `{name}` |" in section for name in dataset_names())


def test_a_built_in_layout_is_found_by_its_default_place(tmp_path, monkeypatch):
    write_cub(tmp_path / "data/cub")
    monkeypatch.chdir(tmp_path)
    assert len(open_dataset("cub").samples) == 4
