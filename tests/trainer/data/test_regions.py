"""Where the student's image lies in the teacher's picture."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.features import FeatureNeed, Needs, open_sources
from trainer.data.regions import Regions
from trainer.errors import TrainError

NEEDS = Needs({"teacher": FeatureNeed(None)}, places=True)
ALL = np.array([[0.0, 0.0, 1.0, 1.0]])


def regions_of(cache, views=("canonical",)) -> Regions:
    return Regions(cache, open_sources(cache, NEEDS), views)


def test_a_teacher_without_a_box_saw_the_whole_image(cache):
    box = np.array([[0.2, 0.1, 0.6, 0.9]])
    assert np.allclose(regions_of(cache).seen(np.array([0]), box, np.array([False])), box)


def test_a_mirrored_image_shows_the_other_side(cache):
    seen = regions_of(cache).seen(np.array([0]), np.array([[0.2, 0.1, 0.6, 0.9]]), np.array([True]))
    assert np.allclose(seen, [[0.4, 0.1, 0.8, 0.9]])


@given(st.tuples(*[st.floats(0, 0.4)] * 2, *[st.floats(0.6, 1)] * 2), st.booleans())
def test_what_an_object_view_shows_is_found_in_it(make_frames, frame, mirrored):
    """The whole photograph reaches as far beyond the object's box as the box lies inside the photograph."""
    regions = make_frames(np.array([frame]))
    left, top, right, bottom = regions.seen(np.array([0]), ALL, np.array([mirrored]))[0]
    width, height = frame[2] - frame[0], frame[3] - frame[1]
    assert np.allclose([right - left, bottom - top], [1 / width, 1 / height])
    assert np.isclose(-left * width, 1 - frame[2] if mirrored else frame[0])
    assert np.isclose(-top * height, frame[1])
    box = np.array([frame])
    assert np.allclose(regions.seen(np.array([0]), box, np.array([mirrored])), ALL)


@pytest.fixture(scope="module")
def make_frames(cache_path):
    from cache_schema import open_cache

    def make(frames):
        regions = regions_of(open_cache(cache_path))
        regions._frames = frames
        return regions

    return make


def test_mirrored_images_without_mirrored_features_are_refused(make_cache):
    with pytest.raises(TrainError, match="lacks view hflip, and features are compared place by place: build it with"):
        regions_of(make_cache(views=("canonical",)), ("canonical", "hflip"))


def test_features_of_another_cache_are_of_the_boxes_of_that_cache(build_tiny, tmp_path):
    boxes = {"own": [0, 0, 12, 12], "other": [12, 12, 24, 24]}  # two corners of the photograph
    own, other = (
        build_tiny(tmp_path / name, per_class=2, about=lambda *_, box=box: {"box": box, "box_source": "dataset"})
        for name, box in boxes.items()
    )
    sources = open_sources(own, Needs({"teacher": FeatureNeed(None, cache=str(other.root))}, places=True))
    seen = Regions(own, sources, ("canonical",)).seen(np.array([0]), ALL, np.array([False]))
    assert np.allclose(seen, [[-1.0, -1.0, 1.0, 1.0]])
    both = {**sources, "too": open_sources(own, NEEDS)["teacher"]}
    with pytest.raises(TrainError, match="one teacher saw other boxes than another"):
        Regions(own, both, ("canonical",))


def test_a_teacher_that_was_shown_squares_saw_more_than_the_box(build_tiny, tmp_path):
    cache = build_tiny(tmp_path / "c", about=lambda *_: {"box": [0, 6, 24, 12], "box_source": "dataset"})
    teacher = cache.manifest.teacher.model_copy(update={"crop": "square"})
    (source,) = (sources := open_sources(cache, NEEDS)).values()
    source.cache.manifest = cache.manifest.model_copy(update={"teacher": teacher})
    seen = Regions(cache, sources, ("canonical",)).seen(np.array([0]), ALL, np.array([False]))
    # The square is 24 pixels wide and high and begins 3 above the image.
    assert np.allclose(seen, [[0.0, 3 / 24, 1.0, 27 / 24]])
