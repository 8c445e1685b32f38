import numpy as np
import pytest

from trainer.errors import TrainError
from trainer.evaluation.intervals import class_bootstrap, paired_class_bootstrap, query_bootstrap


def clustered(classes: int, images: int, seed: int = 0, spread: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Scores of queries whose classes differ more than their images do."""
    random = np.random.default_rng(seed)
    means = 0.5 + spread * random.normal(size=classes)
    values = means[:, None] + 0.05 * random.normal(size=(classes, images))
    return values.ravel(), np.repeat(np.arange(classes), images)


def test_the_interval_over_classes_is_that_of_the_means_of_so_many_classes():
    values, classes = clustered(60, 20)
    found = class_bootstrap(values, classes)
    spread = values.reshape(60, 20).mean(1).std() / 60**0.5
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert found.low < found.value < found.high


def test_queries_of_a_class_are_alike_so_that_other_queries_tell_less_than_other_classes():
    values, classes = clustered(30, 50)
    over_classes, over_queries = class_bootstrap(values, classes), query_bootstrap(values)
    assert over_classes.high - over_classes.low > 3 * (over_queries.high - over_queries.low)


def test_a_large_class_weighs_as_much_as_it_has_queries_and_undefined_scores_weigh_nothing():
    values, classes = np.array([1.0, 1.0, 1.0, 0.0, np.nan]), np.array([7, 7, 7, 3, 9])
    found = class_bootstrap(values, classes)
    assert (found.value, found.low, found.high) == (0.75, 0.0, 1.0)


def test_the_same_scores_differ_by_nothing_and_those_of_other_queries_are_not_compared():
    values, classes = clustered(10, 5)
    same = paired_class_bootstrap(values, values, classes)
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    with pytest.raises(TrainError, match="of the same queries"):
        paired_class_bootstrap(values, values[:-1], classes[:-1])


def test_pairing_sees_a_difference_that_is_smaller_than_either_interval():
    values, classes = clustered(30, 20)
    better = values + 0.02 + 0.02 * np.random.default_rng(1).normal(size=len(values))
    apart = class_bootstrap(values, classes)
    found = paired_class_bootstrap(better, values, classes)
    assert found.low > 0
    assert found.high - found.low < (apart.high - apart.low) / 5
    assert found.p == pytest.approx(2 / 2001)


def test_no_difference_is_found_significant_about_as_often_as_the_level_says():
    found = []
    for seed in range(200):
        (a, classes), (b, _) = clustered(40, 4, 2 * seed), clustered(40, 4, 2 * seed + 1)
        found.append(paired_class_bootstrap(a, b, classes, resamples=400).p < 0.05)
    assert 0.01 <= np.mean(found) <= 0.1


def test_the_interval_is_the_same_at_every_call_and_whatever_the_block(monkeypatch):
    values, classes = clustered(20, 3)
    expected = class_bootstrap(values, classes)
    monkeypatch.setattr("trainer.evaluation.intervals._BLOCK", 50)
    assert class_bootstrap(values, classes) == expected
