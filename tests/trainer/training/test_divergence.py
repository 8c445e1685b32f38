"""A run that diverges says which part is not finite, since when, on which images, and what is left of it."""

import json

import pytest
import torch

from trainer.errors import TrainError
from trainer.training.checkpoint import latest_checkpoint, load_checkpoint
from trainer.training.loop import train


def message_of(config, cache, run) -> str:
    with pytest.raises(TrainError) as caught:
        train(config, cache, run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_features_that_are_not_finite_are_named_by_sample_and_the_learning_rate_is_not_blamed(
    make_cache, break_features, tiny_config, tmp_path
):
    broken = break_features(make_cache(), "train-1-3")
    run, config = tmp_path / "run", tiny_config("views=canonical", "verify_reads=false", "epochs=9")
    said = message_of(config, broken, run)
    assert "the cached features 'teacher' of sample 'train-1-3' are not finite" in said
    assert f"dit-cache verify {broken.root}" in said
    assert "--lr" not in said
    about = json.loads((run / "diverged.json").read_text())
    assert "train-1-3" in about["samples"]
    assert len(about["samples"]) == 6


@pytest.mark.parametrize("settings", [("regression.weight=1",), ("gim.residual=pca",)])
def test_features_that_are_not_finite_are_named_where_they_are_measured_before_the_first_update(
    make_cache, break_features, tiny_config, tmp_path, settings
):
    broken = break_features(make_cache(), "train-1-3")
    config = tiny_config("views=canonical", "verify_reads=false", *settings)
    said = message_of(config, broken, tmp_path / "run")
    assert said.startswith("the cached features 'teacher' of sample 'train-1-3' are not finite")
    assert said.endswith(f"dit-cache verify {broken.root}")


def test_weights_that_an_update_broke_are_named_by_part_with_that_updates_images(tiny_config, cache, tmp_path):
    said = message_of(tiny_config(optim__lr=1e38), cache, tmp_path / "run")
    assert "not finite at update 2 (loss nan" in said
    assert "58 of the 59 tensors are not finite after update 1" in said
    assert "(18 of student, 39 of gim, 1 of drc)" in said
    assert "update 1 was of samples " in said
    assert "lower --lr" in said


def test_finite_weights_and_features_leave_the_module_that_overflows(tiny_config, cache, tmp_path):
    said = message_of(tiny_config(optim__lr=1e30), cache, tmp_path / "run")
    assert "weights and features are finite, the output of student.network.blocks.0.norm1 is not" in said


def test_the_last_checkpoint_of_a_run_that_diverged_is_good_and_named(tiny_config, cache, tmp_path, monkeypatch):
    from trainer.training import loop

    def rate(update, total, config):
        return 1e38 if update >= 3 else 1e-3

    monkeypatch.setattr(loop, "learning_rate", rate)
    run = tmp_path / "run"
    said = message_of(tiny_config("checkpoint_every=1", mode="baseline"), cache, run)
    assert "after update 4, for example student." in said
    assert "last good checkpoint: update-00000002" in said
    kept = latest_checkpoint(run)
    assert json.loads((run / "diverged.json").read_text())["checkpoint"] == str(kept)
    parts = loop.assemble(tiny_config(mode="baseline"), cache)
    load_checkpoint(kept, parts.method, parts.optimizer, torch.device("cpu"))
    assert all(value.isfinite().all() for value in parts.method.state_dict().values())
