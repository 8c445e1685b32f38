"""A probe measures what it says, and recommends what measured best."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_teachers import direct_features

from cache_schema.errors import DitDistillError
from pipeline.build.config import BuildConfig
from pipeline.curriculum import DEFAULT_TIMESTEPS
from pipeline.inputs.condition_store import ConditionStore
from pipeline.inputs.feature_source import DiffusionSource, Wanted
from pipeline.probe.run import ProbeConfig, Usual, advise, choose_samples, probe, render_table, score_all
from pipeline.probe.scores import Score, high_frequency_ratio, linear_accuracy, pool_cells, recall_at_1, standardise
from pipeline.teachers.base import TeacherError

TINY = ProbeConfig(timesteps=(10, 28), images=12, per_class=3, batch=5)


def test_recall_counts_images_whose_nearest_other_image_is_of_their_class():
    features = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [0.95, 0.05]], dtype=np.float32)
    assert recall_at_1(features, np.array([0, 0, 1, 1, 0])) == 1.0
    assert recall_at_1(features, np.array([0, 0, 1, 1, 1])) == pytest.approx(2 / 5)


def test_the_left_out_predictions_are_those_of_models_fitted_without_the_image():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 6)
    features = standardise(rng.normal(size=(18, 40)).astype(np.float32) + labels[:, None] * 0.4)
    targets = np.eye(3)[labels] - 1 / 3
    right = 0
    for left in range(18):
        kept = np.arange(18) != left
        X, Y = features[kept].astype(np.float64) / np.sqrt(40), targets[kept]
        weights = np.linalg.solve(X.T @ X + np.eye(40), X.T @ Y)
        right += (features[left] / np.sqrt(40) @ weights).argmax() == labels[left]
    assert linear_accuracy(features, labels) == pytest.approx(right / 18)


def test_a_few_huge_channels_do_not_decide():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 4)
    features = (np.eye(5)[labels] + rng.normal(size=(20, 5)) / 10).astype(np.float32)
    huge = np.concatenate([features, 1000 * rng.normal(size=(20, 2))], axis=1).astype(np.float32)
    assert recall_at_1(huge, labels) < 0.6
    assert recall_at_1(standardise(huge), labels) == 1.0


def test_a_chequerboard_is_high_frequency_and_a_slope_is_not():
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    board = ((rows + columns) % 2).float().reshape(1, 64, 1)
    wave = torch.cos(2 * torch.pi * rows / 8).reshape(1, 64, 1)
    flat = torch.ones(1, 64, 1)
    ratios = [high_frequency_ratio(t, (8, 8)).item() for t in (board, wave, flat, 1000 * board)]
    assert ratios == pytest.approx([1.0, 0.0, 0.0, 1.0], abs=1e-6)


def test_pooling_averages_over_cells_and_never_invents_any():
    tokens = torch.arange(16.0).reshape(1, 16, 1)
    assert pool_cells(tokens, (4, 4), 2).tolist() == [[2.5, 4.5, 10.5, 12.5]]
    assert pool_cells(tokens, (4, 4), 8).tolist() == [tokens.flatten().tolist()]


def test_what_is_probed_is_what_a_build_would_cache(teacher, tiny_dataset, tmp_path):
    samples = choose_samples(tiny_dataset, TINY)
    store = ConditionStore(tmp_path, teacher, tiny_dataset)
    store.prepare(samples)

    def source_at(sigma: float) -> DiffusionSource:
        return DiffusionSource(teacher, store, Wanted(("single.0",), ("canonical",), (sigma,)))

    (score,) = score_all(teacher, source_at, samples, ["single.0"], ProbeConfig(timesteps=(22,), cells=2, batch=4))
    config = BuildConfig(taps=("single.0",), timesteps=(22,))
    sigmas = [teacher.sigmas(28)[21]]
    built = direct_features(teacher, tiny_dataset, samples, config, sigmas)["single.0"][:, 0, 0]
    pooled = standardise(pool_cells(built, teacher.grid, 2).half().numpy().astype(np.float32))
    labels = np.array([s.label for s in samples])
    assert score.recall_at_1 == recall_at_1(pooled, labels)
    assert score.high_frequency == pytest.approx(high_frequency_ratio(built, teacher.grid).mean().item(), rel=1e-4)


def test_every_tap_at_every_timestep_is_scored_and_written(teacher, tiny_dataset, tmp_path):
    said = []
    record = probe(teacher, tiny_dataset, TINY, tmp_path, log=said.append)
    taps = ["double.0", "double.1", "single.0", "hidden", "velocity"]
    assert [(s["tap"], s["timestep"]) for s in record["scores"]] == [(t, p) for p in (10, 28) for t in taps]
    assert json.loads((tmp_path / "probe.json").read_text()) == json.loads(json.dumps(record))
    assert Image.open(tmp_path / "probe.png").width > 400
    assert any(line.startswith("recommended: --taps ") for line in said)


class Separable:
    """Features that tell the classes apart, beside a channel far beyond what float16 can hold."""

    def __init__(self, worst: float = 70_000.0):
        self.worst = worst

    def prepare(self, samples, digests=None, check=None, log=None):
        return 0.0

    def read(self, samples):
        return samples

    def compute(self, samples, given):
        one_hot = torch.eye(64)[[s.label for s in samples]]
        tokens = torch.cat([one_hot, torch.full((len(samples), 1), self.worst)], dim=1)
        return {"hidden": tokens[:, None, None, None].expand(-1, 1, 1, 16, -1)}  # (B, V, T, L, C)


def test_channels_beyond_float16_do_not_make_every_score_chance(teacher, tiny_dataset):
    samples = choose_samples(tiny_dataset, TINY)
    scores = score_all(teacher, lambda sigma: Separable(), samples, ["hidden"], TINY)
    assert {score.recall_at_1 for score in scores} == {1.0}
    assert {score.linear for score in scores} == {1.0}


@pytest.mark.parametrize("worst", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_named_with_their_image(worst, teacher, tiny_dataset):
    samples = choose_samples(tiny_dataset, TINY)
    with pytest.raises(DitDistillError, match="NaN or infinite: tap hidden at timestep 10") as caught:
        score_all(teacher, lambda sigma: Separable(worst), samples, ["hidden"], TINY)
    assert str(caught.value).startswith(f"{samples[0].source}: ")


def test_images_are_evenly_chosen_from_classes_that_have_enough(tiny_dataset):
    chosen = choose_samples(tiny_dataset, TINY)
    labels = [s.label for s in chosen]
    assert len({s.id for s in chosen}) == 12
    assert all(labels.count(label) == 3 for label in set(labels))
    assert {s.split for s in chosen} == {"train"}
    with pytest.raises(DitDistillError, match="choose a smaller --per-class"):
        choose_samples(tiny_dataset, ProbeConfig(per_class=6))


def scores(**recalls: dict[int, float]) -> list[Score]:
    return [Score(tap, p, value, 0.0, 0.0) for tap, row in recalls.items() for p, value in row.items()]


def test_the_best_tap_and_its_best_timesteps_are_recommended_from_coarse_to_fine():
    config = ProbeConfig(timesteps=DEFAULT_TIMESTEPS, recommend=2)
    table = scores(hidden={10: 0.2, 16: 0.3, 22: 0.5, 28: 0.5}, velocity={10: 0.1, 16: 0.9, 22: 0.1, 28: 0.8})
    advice = advise(table, config, images=100)
    assert (advice.tap, advice.timesteps) == ("velocity", (16, 28))
    assert advice.warning is not None
    assert "hidden" in advice.warning
    assert "37.5 %" in advice.warning


def test_a_difference_within_the_error_of_sampling_is_no_reason_to_warn():
    config = ProbeConfig(timesteps=DEFAULT_TIMESTEPS, recommend=4)
    table = scores(hidden=dict.fromkeys(DEFAULT_TIMESTEPS, 0.50), velocity=dict.fromkeys(DEFAULT_TIMESTEPS, 0.52))
    advice = advise(table, config, images=100)
    assert advice.tap == "velocity"
    assert advice.warning is None


@pytest.mark.parametrize(
    ("bad", "said"), [({"images": 1}, "--images"), ({"split": "x"}, "--split x"), ({"cells": 0}, "--cells")]
)
def test_a_setting_that_makes_no_sense_is_named(bad, said):
    with pytest.raises(DitDistillError, match=said):
        ProbeConfig(**bad)


def test_an_unknown_tap_is_refused_before_any_image_is_read(teacher, tiny_dataset, tmp_path):
    with pytest.raises(TeacherError, match="has no tap"):
        probe(teacher, tiny_dataset, ProbeConfig(taps=("double.9",)), tmp_path, log=str)


class Drowned(Separable):
    """The same beside a channel that says nothing about the class and is far larger, as massive ones are."""

    def compute(self, samples, given):
        rng = np.random.default_rng([ord(letter) for s in samples for letter in s.id])
        one_hot = torch.eye(64)[[s.label for s in samples]] + 0.1
        massive = torch.from_numpy(1000 * rng.normal(size=(len(samples), 1)).astype(np.float32))
        tokens = torch.cat([one_hot[:, :31], massive], dim=1)
        return {"hidden": tokens[:, None, None, None].expand(-1, 1, 1, 16, -1)}


def test_massive_channels_are_compared_kept_removed_and_standardised(teacher, tiny_dataset):
    config = ProbeConfig(timesteps=(10,), images=12, per_class=3, massive_channels=("keep", "remove", "standardize"))
    samples = choose_samples(tiny_dataset, config)
    found = score_all(teacher, lambda sigma: Drowned(), samples, ["hidden"], config)
    assert [score.name for score in found] == ["hidden", "hidden (remove)", "hidden (standardize)"]
    kept, removed, _ = (score.plain_recall_at_1 for score in found)
    assert kept < removed == 1.0
    advice = advise(found, config, len(samples))
    assert advice.options.startswith("--taps hidden --timesteps 10")
    assert "hidden (remove)" in render_table(found)


def test_modulated_taps_are_probed_beside_the_raw_ones(teacher, tiny_dataset, tmp_path):
    config = ProbeConfig(timesteps=(28,), images=6, per_class=3, modulated=True)
    record = probe(teacher, tiny_dataset, config, tmp_path, log=str)
    assert [s["tap"] for s in record["scores"]] == teacher.taps(modulated=True)


def test_the_tap_that_a_build_would_take_is_always_compared_and_is_what_the_advice_is_held_against(
    teacher, tiny_dataset, tmp_path
):
    config = ProbeConfig(timesteps=(22, 28), images=4, per_class=2, cells=1, recommend=1)
    usual = Usual(("single.0.modulated",), (28,))
    record = probe(teacher, tiny_dataset, config, tmp_path, usual=usual, log=lambda _: None)
    names = list(dict.fromkeys(score["tap"] for score in record["scores"]))
    assert names == ["double.0", "double.1", "single.0.modulated", "single.0", "hidden", "velocity"]
    at_28 = next(s for s in record["scores"] if (s["tap"], s["timestep"]) == ("single.0.modulated", 28))
    assert record["advice"]["default_recall"] == at_28["recall_at_1"]
    table = scores(**{"hidden": {22: 0.9, 28: 0.9}, "single.0.modulated": {22: 0.9, 28: 0.5}})
    warning = advise(table, config, 100, usual).warning
    assert warning is not None
    assert warning.startswith("the default --taps single.0.modulated --timesteps 28 has a mean R@1 of 50.0 %")


def test_what_is_to_be_done_to_massive_channels_is_one_of_three():
    with pytest.raises(DitDistillError, match="--massive-factor 5: massive channels are only kept"):
        ProbeConfig(massive_factor=5)
    with pytest.raises(DitDistillError, match="--massive-channels drop: name one or more of keep, remove, standardize"):
        ProbeConfig(massive_channels=("drop",))
