"""What a run writes while it goes and when it is done: losses, rates and scores, for scripts and for people."""

import json
import shutil
import tempfile
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.methods.settings import make_config
from trainer.runs import load_result, read_metrics
from trainer.training import loop, pace
from trainer.training.checkpoint import Progress
from trainer.training.logs import MetricsLog
from trainer.training.loop import train
from trainer.training.pace import Pace, Timing
from trainer.training.summary import summary


def scalars(run):
    """{name: [(update, value), …]} of a run's TensorBoard events."""
    with tempfile.TemporaryDirectory() as folder:
        # Two processes never begin in one second; here their files' names may, and would be read in any order.
        files = sorted((run / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns)
        for number, file in enumerate(files):
            shutil.copy(file, f"{folder}/events.out.tfevents.{number:010d}")
        board = EventAccumulator(folder)
        board.Reload()
    return {name: [(e.step, e.value) for e in board.Scalars(name)] for name in board.Tags()["scalars"]}


@pytest.fixture(scope="module")
def followed(tmp_path_factory, tiny_baseline_settings, wide_cache):
    """A run that measures recall on the way, interrupted after its fourth update and resumed."""
    settings = [*tiny_baseline_settings[1::2], "validation_classes=0.4", "eval_every=1"]
    config = make_config("paper", settings, cache=str(wide_cache.root), method="baseline")
    run = tmp_path_factory.mktemp("followed") / "run"
    step, saved = loop.train_step, pytest.MonkeyPatch()

    def step_and_die(*given):
        if given[-1].update == 4:
            raise MemoryError
        return step(*given)

    saved.setattr(loop, "train_step", step_and_die)
    with pytest.raises(MemoryError):
        train(config, wide_cache, run)
    saved.undo()
    train(config, wide_cache, run, resume=True)
    return run


def test_every_record_tells_losses_learning_rate_speed_and_the_share_of_waiting(followed):
    records = [record for record in read_metrics(followed / "metrics.jsonl") if "losses" in record]
    assert [record["update"] for record in records] == list(range(1, 1 + load_result(followed)["student_updates"]))
    for record in records:
        assert record["images_per_second"] > 0
        assert 0 <= record["data_wait"] <= 1
        assert record["lr"] > 0


def test_tensorboard_shows_what_the_log_says_once_for_each_update_of_an_interrupted_run(followed):
    shown = scalars(followed)
    records = read_metrics(followed / "metrics.jsonl")
    trained = [record for record in records if "losses" in record]
    for name, of in (("losses/loss", lambda r: r["losses"]["loss"]), ("lr", lambda r: r["lr"])):
        assert [update for update, _ in shown[name]] == [record["update"] for record in trained]
        assert [value for _, value in shown[name]] == pytest.approx([of(record) for record in trained])
    assert {"losses/drc_student", "images_per_second", "data_wait"} <= shown.keys()
    measured = [(r["update"], r["eval"]["student"]["recall_at_1"]) for r in records if "eval" in r]
    assert dict(shown["eval/student/recall_at_1"]) == pytest.approx(dict(measured))


def test_a_result_tells_the_best_recall_the_speed_the_wait_and_the_peak_of_memory(followed):
    result = load_result(followed)
    measured = [(r["eval"]["student"]["recall_at_1"], -r["update"])
                for r in read_metrics(followed / "metrics.jsonl") if "eval" in r]  # fmt: skip
    last = (result["validation"]["student"]["recall_at_1"], -result["student_updates"])
    best = max([*measured, last])
    assert (result["best"]["recall_at_1"], -result["best"]["update"]) == best
    assert result["images_per_second"] > 0
    assert 0 <= result["data_wait"] <= 1
    assert result["peak_memory_gb"] > 0.01
    said = summary(result, "tiny-0123")
    assert f"{100 * best[0]:.1f} % on 2 validation classes (the best, after update {-best[1]} of" in said
    for words in ("images/s in training", "waiting for data", "GB of the process at most", result["cache_id"]):
        assert words in said
    assert "not measured in training" in summary({**result, "best": None, "device": "cuda:0"}, "tiny")


def test_overwriting_a_run_removes_its_events(followed, tiny_config, wide_cache):
    before = set((followed / "tensorboard").iterdir())
    train(tiny_config(mode="baseline", updates=1), wide_cache, followed, overwrite=True)
    assert not before & set((followed / "tensorboard").iterdir())


def test_a_log_goes_on_from_the_update_that_a_run_continues_from(tmp_path):
    for keep in (0, 2):
        with MetricsLog(tmp_path, keep) as log:
            for update in range(keep + 1, keep + 4):
                log.write(update, losses={"loss": 1.0 * keep}, words={"ignored": "text", "flag": True})
    assert [record["update"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert scalars(tmp_path) == {"losses/loss": [(1, 0), (2, 0), (3, 2), (4, 2), (5, 2)]}


def test_the_clock_of_a_run_stands_still_before_it_begins_and_while_it_is_scored(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now[0]))
    feed = SimpleNamespace(waited=0.0)
    clock = Pace(feed, Timing(updates=10, seconds=20.0, waited=1.0))
    now[0] += 50  # workers start
    for _ in range(4):
        clock.begin()
        now[0] += 2
        feed.waited += 0.5
        clock.end()
    assert clock.lap().rates(rows=3) == {"images_per_second": 1.5, "data_wait": 0.25}
    with clock.stopped():
        now[0] += 1000
    now[0] += 1
    assert clock.lap() == Timing(0, 1.0, 0.0)
    assert clock.whole == Timing(14, 29.0, 3.0)


def test_progress_survives_its_json_and_that_of_older_checkpoints_is_read():
    progress = Progress(7, 1.5, "id", {"teacher": "other"}, Timing(7, 1.0, 0.1), 3, 42)
    assert Progress.from_json(json.loads(json.dumps(asdict(progress)))) == progress
    assert Progress.from_json({"update": 1, "seconds": 2.0, "cache_id": "id"}) == Progress(1, 2.0, "id")
