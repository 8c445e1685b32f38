import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.features import FeatureNeed, Needs, open_sources
from trainer.data.images import ImageStore
from trainer.data.splits import select_split
from trainer.errors import TrainError
from trainer.evaluation import worth
from trainer.evaluation.embed import TestSplit
from trainer.evaluation.worth import Worth, measure_worth, not_followed

CPU = torch.device("cpu")


@pytest.fixture
def measure(cache):
    """`measure(cache, shuffled=0)`: with a student that sees the mean colour of an image."""

    class Mean(torch.nn.Module):
        def forward(self, images):
            return images.float().mean((2, 3))

    def run(cache=cache, **need):
        split = select_split(cache, "train", need_features=True)
        source = open_sources(cache, Needs({"teacher": FeatureNeed(None, None, **need)}))["teacher"]
        return measure_worth(Mean(), source, TestSplit(cache, split, ImageStore(cache, 24, split.rows)), CPU)

    return run


def test_features_that_say_the_class_are_worth_following(measure):
    found = measure()
    assert (found.teacher, found.followed) == (1.0, True)


def test_features_of_other_images_are_not_where_the_student_tells_images_apart_itself(measure, make_cache):
    found = measure(make_cache(per_class=12), shuffled=0)
    assert found.teacher < 0.7 < found.student
    assert not found.followed


def test_channels_hundreds_of_times_larger_than_the_rest_do_not_hide_what_the_rest_say():
    random = np.random.default_rng(0)
    labels = torch.arange(10).repeat(20)
    said = torch.from_numpy(random.normal(size=(10, 6)))[labels] + 0.3 * torch.from_numpy(random.normal(size=(200, 6)))
    massive = 1000 + 30 * torch.from_numpy(random.normal(size=(200, 2)))
    hits = worth._hits(lambda: torch.cat([said, massive], 1).float().unsqueeze(1), labels, CPU)
    assert hits.mean() > 0.9


def test_what_is_the_same_for_most_images_finds_none_of_them():
    hits = worth._hits(lambda: worth.refuse_untelling(torch.ones(20, 1, 4), "the teacher"), torch.arange(20) // 10, CPU)
    assert hits.tolist() == [0.0] * 20


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_one_sample_of_features_that_are_not_finite_is_named_and_is_no_reason_to_leave_the_teacher(
    measure, make_cache, break_features, broken
):
    cache = break_features(make_cache(), "train-1-3", broken)
    with pytest.raises(TrainError) as caught:
        measure(cache)
    assert str(caught.value).startswith("the cached features 'hidden' of sample 'train-1-3' are not finite; ")
    assert str(caught.value).endswith(f"dit-cache verify {cache.root}")


def test_a_part_of_many_images_is_looked_at(measure, monkeypatch, make_cache):
    cache = make_cache(per_class=20)
    seen = []
    monkeypatch.setattr(worth, "MOST", 30)
    score = worth.score_queries
    monkeypatch.setattr(worth, "score_queries", lambda x, labels: seen.append(labels.tolist()) or score(x, labels))
    assert measure(cache).followed
    assert {len(labels) for labels in seen} == {30}
    assert set(seen[0]) == {0, 1, 2}


def test_nothing_is_said_of_features_that_are_not_of_the_images_as_they_are_stored(measure, make_cache):
    assert measure(make_cache(views=("hflip",))) is None


@given(*[st.floats(-1, 1) for _ in range(4)])
def test_what_a_result_says_of_it_can_be_read_again(teacher, student, low, high):
    found = Worth(teacher, student, low, high)
    said = json.loads(json.dumps(found.as_json()))
    assert Worth.from_json(said) == found
    assert (not_followed({"method": "baseline", "worth": said}) is None) == found.followed == (high >= 0)


def test_a_result_that_does_not_say_what_a_teacher_was_worth_followed_it():
    assert not_followed({"method": "gcd"}) is None
