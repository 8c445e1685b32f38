"""Runs followed in other people's trackers, by accelerate's adapters."""

import importlib.util

import pytest
from accelerate import tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.errors import TrainError
from trainer.training.logs import MetricsLog
from trainer.training.loop import train
from trainer.training.trackers import PROJECT, Trackers


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_said_in_a_line_before_anything_is_made(cache, tiny_config, tmp_path, name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(TrainError, match=f"track: {name} is not installed: pip install {name}"):
        train(tiny_config(f"track={name}"), cache, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tracker_is_told_the_config_and_every_number_of_the_log(tiny_config, tmp_path):
    # The adapter that needs no account and no other package stands for the others: they have one interface.
    assert isinstance(tracking.LOGGER_TYPE_TO_CLASS["wandb"], type(tracking.LOGGER_TYPE_TO_CLASS["tensorboard"]))
    trackers = Trackers(tiny_config("loss.alpha=2"), tmp_path, ["tensorboard"])
    with MetricsLog(tmp_path, trackers=trackers) as log:
        log.write(1, losses={"loss": 3.0}, lr=0.1)
        log.write(2, losses={"loss": 2.0}, lr=0.1)
    (hyperparameters,) = (tmp_path / PROJECT).rglob("hparams.yml")
    assert "loss.alpha: 2.0" in hyperparameters.read_text()
    events = EventAccumulator(str(tmp_path / PROJECT)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("losses/loss")] == [(1, 3.0), (2, 2.0)]


@pytest.mark.parametrize(
    ("name", "left"), [("wandb", "wandb/offline-run-*/run-*.wandb"), ("mlflow", "mlruns/*/*/metrics/lr")]
)
def test_a_tracker_that_is_installed_has_the_numbers_of_a_run(cache, tiny_config, tmp_path, monkeypatch, name, left):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "run" / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    train(tiny_config(f"track={name}", updates=1, mode="baseline"), cache, tmp_path / "run")
    (kept,) = (tmp_path / "run").glob(left)
    assert kept.stat().st_size > 0
