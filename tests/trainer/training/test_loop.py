import json
import os
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cache_schema import open_cache
from cache_schema.care.convert import convert
from trainer.cli import app
from trainer.config import OptimConfig
from trainer.data.batches import TrainingBatches
from trainer.errors import TrainError
from trainer.methods.settings import with_absolute_paths
from trainer.runs import load_result, read_metrics
from trainer.training import loop
from trainer.training.checkpoint import latest_checkpoint, load_checkpoint
from trainer.training.loop import train
from trainer.training.optim import learning_rate
from trainer.training.run_folder import prepare_run
from trainer.training.step import train_step

# Everything that draws random numbers while training is switched on.
RANDOM = (
    "augment.color=0.3",
    "gim.mask_student=0.5",
    "student.drop_path_rate=0.2",
    "unlabeled_per_batch=1",
    "timesteps_per_step=1",
    "optim.warmup=0.2",
    "optim.ema=0.5",
)
BASELINE_RANDOM = ("augment.color=0.3", "student.drop_path_rate=0.2", "optim.warmup=0.2", "optim.accumulate=2")


def weights(run):
    return {file.name: file.read_bytes() for file in sorted(run.glob("*.safetensors"))}


def log_without_speed(run):
    records = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in ("images_per_second", "data_wait")} for r in records]


@pytest.fixture
def run_of(cache, tmp_path):
    def make(config, name):
        train(config, cache, tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("mode", ["baseline", "distill"])
def test_a_run_leaves_a_student_a_log_and_a_result_and_no_checkpoints(run_of, tiny_config, cache, mode):
    run = run_of(tiny_config(mode=mode), "run")
    result = json.loads((run / "result.json").read_text())
    assert (result["mode"], result["student_updates"], result["images_seen"]) == (mode, 6, 36)
    assert result["cache_id"] == cache.manifest.cache_id
    assert set(result["final_losses"]) == {"loss", "drc_student"} if mode == "baseline" else {"loss", "drc", "cal"}
    assert (run / "gim.safetensors").is_file() == (mode == "distill")
    assert [record["update"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize("mode", ["baseline", "distill"])
def test_training_lowers_the_loss(run_of, tiny_config, mode):
    log = read_metrics(run_of(tiny_config(mode=mode, updates=40), "run") / "metrics.jsonl")
    assert sum(r["losses"]["loss"] for r in log[-5:]) < 0.7 * sum(r["losses"]["loss"] for r in log[:5])


def test_a_student_is_trained_without_cudnns_attention(run_of, tiny_config, monkeypatch):
    seen = []

    def spy(*arguments):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return train_step(*arguments)

    monkeypatch.setattr("trainer.training.loop.train_step", spy)
    run_of(tiny_config(updates=1), "run")
    assert seen == [False]


def test_one_seed_gives_one_student_and_another_seed_another(run_of, tiny_config):
    a, b, c = (run_of(tiny_config(seed=seed), name) for seed, name in ((0, "a"), (0, "b"), (1, "c")))
    assert weights(a) == weights(b)
    assert weights(a) != weights(c)


@pytest.mark.parametrize("mode", ["baseline", "distill"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_resumes_to_the_very_same_end(run_of, tiny_config, cache, tmp_path, cut, mode, number):
    config = tiny_config(*(BASELINE_RANDOM if mode == "baseline" else RANDOM), mode=mode)
    whole = run_of(config, "whole")
    run = tmp_path / "interrupted"
    cut(config, cache, run, 2, number)  # in the middle of an epoch, in the middle of an update
    assert latest_checkpoint(run).name == "update-00000003"
    assert not (run / "result.json").exists()
    train(config, cache, run, resume=True)
    assert weights(run) == weights(whole)
    assert log_without_speed(run) == log_without_speed(whole)


def test_a_run_that_is_interrupted_while_no_batch_comes_is_saved_and_resumes_to_the_very_same_end(
    run_of, tiny_config, cache, tmp_path, monkeypatch
):
    config = tiny_config(*RANDOM)
    whole = run_of(config, "whole")
    step, iterate, read, done = loop.train_step, loop.iterate, TrainingBatches.__getitem__, []
    hangs, end = threading.Event(), threading.Event()

    def hang(batches, update):
        if update == 2:  # which may have its turn before 1
            hangs.set()
            end.wait()
        return read(batches, update)

    def interrupted(batches, start, stop, workers, unless):
        def wait_no_longer():
            if hangs.is_set():
                hangs.clear()
                os.kill(os.getpid(), signal.SIGINT)
            return unless()

        return iterate(batches, start, stop, workers, wait_no_longer)

    with monkeypatch.context() as changed:
        changed.setattr("cache_schema.read_ahead._GRACE", 0.05)
        changed.setattr(TrainingBatches, "__getitem__", hang)
        changed.setattr(loop, "iterate", interrupted)
        changed.setattr(loop, "train_step", lambda *given: (done.append(None), step(*given))[1])
        with pytest.raises(KeyboardInterrupt):
            train(config, cache, tmp_path / "run")
        end.set()
    assert 0 < len(done) < 3
    assert latest_checkpoint(tmp_path / "run").name == f"update-{len(done):08}"
    train(config, cache, tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(whole)


def test_a_run_that_died_resumes_from_its_last_epoch_to_the_very_same_end(
    run_of, tiny_config, cache, tmp_path, monkeypatch
):
    config = tiny_config(*RANDOM)
    whole = run_of(config, "whole")
    step = loop.train_step

    def step_and_die(method, optimizer, batch, rate, config, moment):
        if moment.update == 5:
            raise MemoryError
        return step(method, optimizer, batch, rate, config, moment)

    monkeypatch.setattr(loop, "train_step", step_and_die)
    run = tmp_path / "died"
    with pytest.raises(MemoryError):
        train(config, cache, run)
    assert latest_checkpoint(run).name == "update-00000004"
    monkeypatch.setattr(loop, "train_step", step)
    train(config, cache, run, resume=True)
    assert weights(run) == weights(whole)
    assert log_without_speed(run) == log_without_speed(whole)


def test_evaluating_during_training_changes_nothing_but_the_log(wide_cache, tiny_config, tmp_path):
    held, plain, watched = (*RANDOM, "validation_classes=0.4"), tmp_path / "plain", tmp_path / "watched"
    train(tiny_config(*held), wide_cache, plain)
    train(tiny_config(*held, "eval_every=1"), wide_cache, watched)
    assert weights(plain) == weights(watched)
    measured = [record for record in read_metrics(watched / "metrics.jsonl") if "eval" in record]
    assert [record["epoch"] for record in measured] == [1, 2]
    assert set(measured[0]["eval"]) == {"student", "auxiliary", "auxiliary_names", "scored"}


def test_worker_processes_do_not_change_the_result(run_of, tiny_config):
    assert weights(run_of(tiny_config(*RANDOM), "a")) == weights(run_of(tiny_config(*RANDOM, "workers=2"), "b"))


def test_a_copy_of_the_cache_in_tars_gives_the_very_same_student(run_of, tiny_config, cache, tmp_path):
    convert(cache.root, tmp_path / "tars", "webdataset")
    config = tiny_config(*RANDOM)
    train(config.model_copy(update={"cache": str(tmp_path / "tars")}), open_cache(tmp_path / "tars"), tmp_path / "b")
    assert weights(run_of(config, "a")) == weights(tmp_path / "b")


def test_standardized_tokens_take_their_scale_from_the_cache(run_of, tiny_config):
    gim = load_file(run_of(tiny_config("gim.token_norm=standardize", updates=1), "run") / "gim.safetensors")
    assert gim["tokens.scale"].shape == (2, 1, 6)
    assert gim["tokens.shift"][:, 0, 2].tolist() == pytest.approx([10, 22])


def test_a_loss_that_is_not_finite_stops_the_run_with_advice(tiny_config, cache, tmp_path):
    config = tiny_config(optim__lr=1e30)
    with pytest.raises(TrainError, match=r"not finite at update \d+ .*lower --lr"):
        train(config, cache, tmp_path / "run")


def test_a_run_whose_last_update_broke_the_weights_is_not_finished(tiny_config, cache, tmp_path):
    with pytest.raises(TrainError, match=r"tensors are not finite after the last update, for example .*lower --lr"):
        train(tiny_config(optim__lr=1e38, updates=1), cache, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_run_is_not_continued_on_another_cache(tiny_config, cache, make_cache, tmp_path, monkeypatch):
    config = tiny_config()
    run = tmp_path / "run"
    monkeypatch.setattr(loop, "finish_run", lambda *_: None)
    train(config, cache, run)
    with pytest.raises(TrainError, match=r"was trained on cache \w{8}, not on tiny-\w{8}"):
        train(config, make_cache(per_class=6), run, resume=True)


def test_a_damaged_checkpoint_is_reported_with_its_place(tmp_path):
    module = torch.nn.Linear(2, 2)
    with pytest.raises(TrainError, match=r"cannot resume from .*update-1"):
        load_checkpoint(tmp_path / "update-1", module, torch.optim.Adam(module.parameters()), torch.device("cpu"))


def test_a_directory_holds_one_run_until_overwrite_is_asked_for(run_of, tiny_config, tmp_path):
    run = run_of(tiny_config(), "run")
    other = tiny_config("loss.tau=0.1")
    (run / "notes.txt").write_text("kept")
    with pytest.raises(TrainError, match=r"holds a finished run.*--overwrite"):
        prepare_run(run, other)
    with pytest.raises(TrainError, match=r"started with another loss\.tau"):
        prepare_run(run, other, resume=True)
    prepare_run(run, other, overwrite=True)
    assert sorted(file.name for file in run.iterdir()) == ["config.json", "notes.txt"]
    with pytest.raises(TrainError, match="not finished: continue it with --resume"):
        load_result(run)


def test_the_learning_rate_warms_up_and_anneals_along_a_cosine():
    config = OptimConfig(lr=1.0, warmup=0.1, final_lr_ratio=0.1)
    rates = [learning_rate(update, 100, config) for update in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.1, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_what_a_run_reads_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def config(cache, features):
        named = "--cache", cache, "--set", f"features={features}", "--against", "base", "--student-weights", "w"
        return json.loads(CliRunner().invoke(app, ["run", *named, "--print-config"]).stdout)

    found = config("cache", "more/cache")
    read = *(found[name] for name in ("cache", "features", "against")), found["student"]["weights"]
    assert read == tuple(str(tmp_path / name) for name in ("cache", "more/cache", "base", "w"))
    found = config("file:///a/b", "file:///a/c")
    assert (found["cache"], found["features"]) == ("file:///a/b", "file:///a/c")


def test_a_run_that_names_its_features_by_a_relative_path_is_resumed(tmp_path, monkeypatch, tiny_config):
    monkeypatch.chdir(tmp_path)
    config = tiny_config("features=b")
    prepare_run(tmp_path / "run", config)
    prepare_run(tmp_path / "run", with_absolute_paths(config), resume=True)
    with pytest.raises(TrainError, match="was started with another features"):
        prepare_run(tmp_path / "run", tiny_config("features=c"), resume=True)
