"""Batches balanced by class, as a run is told to make them."""

from collections import Counter

import pytest
from typer.testing import CliRunner

from trainer.cli import app
from trainer.data.batches import TrainingBatches
from trainer.errors import TrainError
from trainer.methods.registry import find_method
from trainer.methods.settings import make_config
from trainer.training import loop
from trainer.training.loop import train

BALANCED = ("sampler=balanced", "classes_per_batch=2", "images_per_class=3")


def batches_of(cache, config):
    return TrainingBatches(cache, config, 24, find_method(config.method).needs(config))


def test_a_run_has_classes_times_images_in_a_batch_whatever_its_batch_size(cache, tiny_config):
    batches = batches_of(cache, tiny_config(*BALANCED, "batch_size=50", "unlabeled_per_batch=1"))
    assert (batches.batch_rows, batches.per_epoch) == (7, 2)
    for update in range(6):
        labels = batches[update].labels
        assert sorted(Counter(labels[:6].tolist()).values()) == [3, 3]
        assert labels[6] == -1


def test_without_a_number_of_classes_they_fill_the_batch_size(cache, tiny_config):
    assert tiny_config("sampler=balanced", "batch_size=8").balanced == (2, 4)
    batches = batches_of(cache, tiny_config("sampler=balanced", "images_per_class=2"))
    assert sorted(Counter(batches[0].labels.tolist()).values()) == [2, 2, 2]


def test_an_interrupted_run_of_balanced_batches_resumes_to_the_very_same_end(cache, tiny_config, tmp_path, monkeypatch):
    config, step = tiny_config(*BALANCED, "augment.color=0.3", mode="baseline"), loop.train_step
    train(config, cache, tmp_path / "whole")

    def step_and_die(*given):
        if given[-1].update == 3:
            raise MemoryError
        return step(*given)

    monkeypatch.setattr(loop, "train_step", step_and_die)
    with pytest.raises(MemoryError):
        train(config, cache, tmp_path / "run")
    monkeypatch.setattr(loop, "train_step", step)
    train(config, cache, tmp_path / "run", resume=True)
    whole, run = (tmp_path / name / "student.safetensors" for name in ("whole", "run"))
    assert run.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["classes_per_batch=2"], r"are of sampler balanced: add --sampler balanced"),
        (["images_per_class=2"], r"are of sampler balanced: add --sampler balanced"),
        (["sampler=balanced", "batch_size=30"], r"batch_size 30 is no multiple of 4 images per class"),
        (["sampler=random"], r"sampler: .*'shuffled' or 'balanced'"),
    ],
)
def test_settings_of_samplers_that_do_not_go_together_are_refused_in_one_line(settings, message):
    with pytest.raises(TrainError, match=message) as caught:
        make_config("paper", settings)
    assert "\n" not in str(caught.value)


def test_more_classes_than_are_trained_on_are_refused(cache, tiny_config):
    with pytest.raises(TrainError, match=r"4 classes per batch are more than the 3 that are trained on; lower --cl"):
        batches_of(cache, tiny_config("sampler=balanced", "classes_per_batch=4"))


def test_the_options_of_samplers_are_those_of_the_command(tmp_path):
    command = ["run", "--sampler", "balanced", "--classes-per-batch", "8", "--images-per-class", "4", "--print-config",
               "--preset", "small", "--output", str(tmp_path / "run")]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert '"classes_per_batch": 8' in done.output
