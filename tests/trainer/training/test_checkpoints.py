"""What of a run stays to go on from, and to be scored: the last checkpoints, the best student, the last one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cache_schema.errors import CacheStorageError
from trainer.cli import app
from trainer.errors import TrainError
from trainer.methods.settings import make_config
from trainer.models.student import load_student
from trainer.runs import load_result, read_metrics
from trainer.training import best, loop
from trainer.training.best import Best, best_so_far, keep_best
from trainer.training.checkpoint import Progress, latest_checkpoint, load_checkpoint, save_checkpoint
from trainer.training.chosen import run_at
from trainer.training.loop import train

FOLLOWED = ("validation_classes=0.4", "eval_every=1", "gim.mask_student=0.5", "optim.ema=0.5", "epochs=4")


def weights(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def names(run):
    return sorted(folder.name for folder in (run / "checkpoints").iterdir())


def recalls(run):
    return {
        r["update"]: r["eval"]["student"]["recall_at_1"] for r in read_metrics(run / "metrics.jsonl") if "eval" in r
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_settings, wide_cache):
    """A run that died in its last epoch, and what it would have been."""
    config = make_config("paper", [*tiny_settings[1::2], *FOLLOWED], cache=str(wide_cache.root))
    place = tmp_path_factory.mktemp("runs")
    train(config, wide_cache, place / "whole")
    train_until(7, config, wide_cache, place / "run")
    return config, place


def train_until(update, config, cache, run):
    """Train, and die when the given update is about to be made."""
    step = loop.train_step

    def step_and_die(*given):
        if given[-1].update == update:
            raise MemoryError
        return step(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step_and_die)
        with pytest.raises(MemoryError):
            train(config, cache, run)


@pytest.fixture
def stopped(made, tmp_path):
    config, place = made
    shutil.copytree(place / "run", tmp_path / "run")
    return config, tmp_path / "run", place / "whole"


def test_the_last_checkpoints_and_the_best_student_stay_and_the_run_resumes_to_the_very_same_end(stopped, wide_cache):
    config, run, whole = stopped
    assert names(run) == ["update-00000004", "update-00000006"]
    scored = recalls(run)
    first_best = max(scored, key=lambda update: (scored[update], -update))
    assert best_so_far(run) == Best(scored[first_best], first_best)
    train(config, wide_cache, run, resume=True)
    assert not (run / "checkpoints").exists()
    assert weights(run) == weights(whole)
    assert weights(run / "best") == weights(whole / "best")
    assert load_result(run)["best"] == load_result(whole)["best"] == load_result(run / "best")["best"]


def test_a_damaged_checkpoint_may_be_removed_to_go_on_from_the_one_before(stopped, wide_cache):
    config, run, whole = stopped
    (run / "checkpoints/update-00000006/optimizer.pt").write_bytes(b"")
    with pytest.raises(TrainError, match=r"remove it to go on from update-00000004, or start anew with --overwrite"):
        train(config, wide_cache, run, resume=True)
    for file in (run / "checkpoints/update-00000006").iterdir():
        file.unlink()
    (run / "checkpoints/update-00000006").rmdir()
    train(config, wide_cache, run, resume=True)
    assert weights(run) == weights(whole)


def test_a_run_does_not_go_on_with_the_other_rows_of_a_cache_that_grew(build_tiny, tiny_config, tmp_path):
    config, run = tiny_config("batch_size=8", "epochs=2", mode="baseline"), tmp_path / "run"
    grow = {"path": tmp_path / "cache", "per_class": 9, "seal": False}
    train_until(4, config, build_tiny(**grow, shards=3), run)
    grown = build_tiny(**grow, shards=1)  # more images of the same classes
    with pytest.raises(TrainError, match=r"was trained on other rows of cache tiny-\w+ than have features now: it has"):
        train(config, grown, run, resume=True)
    file = run / "checkpoints/update-00000003/progress.json"
    progress = json.loads(file.read_text())
    file.write_text(json.dumps({**progress, "classes": 2, "rows": ""}))
    with pytest.raises(TrainError, match="was trained on other rows"):
        train(config, grown, run, resume=True)
    # As older versions wrote it, whose runs go on.
    file.write_text(json.dumps({n: value for n, value in progress.items() if n not in ("rows", "held_out", "classes")}))
    assert train(config, grown, run, resume=True)["train_images"] == 27


def evaluated(run, cache, *options):
    done = CliRunner().invoke(
        app, ["eval", str(run), "--cache", str(cache.root), "--device", "cpu", "--split", "validation", *options]
    )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_any_checkpoint_the_best_student_and_the_last_can_be_scored(stopped, wide_cache):
    config, run, _ = stopped
    scored = recalls(run)
    for name, update in (("update-00000004", 4), ("last", 6), (str(run / "checkpoints/update-00000006"), 6)):
        found = json.loads(evaluated(run, wide_cache, "--checkpoint", name, "--json"))
        assert found["student"]["recall_at_1"] == scored[update]
        assert found["auxiliary"] is not None
    assert not list(run.glob("eval*"))
    assert "the scores are in" in evaluated(run, wide_cache, "--checkpoint", "best")
    kept = json.loads((run / "best/eval-validation.json").read_text())
    assert kept["student"]["recall_at_1"] == max(scored.values())
    with pytest.raises(TrainError, match=r"which has update-00000004, update-00000006; or say best or last"):
        evaluated(run, wide_cache, "--checkpoint", "update-00000005")
    train(config, wide_cache, run, resume=True)
    last = json.loads(evaluated(run, wide_cache, "--checkpoint", "last", "--json"))
    assert last["student"] == load_result(run)["validation"]["student"]
    with pytest.raises(TrainError, match="keeps checkpoints until it is finished, and has none"):
        evaluated(run, wide_cache, "--checkpoint", "update-00000006")


def test_a_checkpoint_is_scored_on_another_cache_with_images_as_it_was_trained_on_them(stopped, make_cache):
    _, run, _ = stopped
    tall = make_cache(shape=("aspect", 16), picture=(24, 36))  # by which images would be cropped
    with run_at(run, "last", tall) as folder:
        assert load_student(folder).fit == "squash"


def test_a_run_that_follows_no_recall_says_how_to_keep_the_best(tiny_config, cache, tmp_path):
    train(tiny_config(updates=1, mode="baseline"), cache, tmp_path / "run")
    assert not (tmp_path / "run/best").exists()
    with pytest.raises(TrainError, match=r"kept no best student: train it with --validation-classes 0\.2 --eval-every"):
        evaluated(tmp_path / "run", cache, "--checkpoint", "best")


def test_as_many_checkpoints_stay_as_are_asked_for_and_none_of_another_course(tmp_path):
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(module.parameters())
    for update in (1, 2, 3, 4):
        save_checkpoint(tmp_path, module, optimizer, Progress(update, 0.0, "id"), keep=3)
    assert names(tmp_path) == ["update-00000002", "update-00000003", "update-00000004"]
    (tmp_path / "checkpoints/.tmp-1-update-00000009").mkdir()
    save_checkpoint(tmp_path, module, optimizer, Progress(3, 0.0, "id"), keep=2)
    assert names(tmp_path) == ["update-00000002", "update-00000003"]
    assert load_checkpoint(latest_checkpoint(tmp_path), module, optimizer, torch.device("cpu")).update == 3
    save_checkpoint(tmp_path, module, optimizer, Progress(5, 0.0, "id"), keep=1)
    assert names(tmp_path) == ["update-00000005"]


@pytest.mark.parametrize("at", range(3))
def test_a_kill_while_the_best_student_is_replaced_leaves_one_whole(stopped, monkeypatch, tmp_path, at):
    config, run, _ = stopped
    method = type("Kept", (), {"student": None, "save": lambda self, folder: None})()
    monkeypatch.setattr(
        best, "save_student", lambda student, folder: (folder / "student.safetensors").write_text("new")
    )
    calls, rename = [], Path.rename

    def dies(path, *given):
        if len(calls) == at:
            raise KeyboardInterrupt
        calls.append(path)
        return rename(path, *given)

    monkeypatch.setattr(Path, "rename", dies)
    result = {**load_result(run / "best"), "best": {"recall_at_1": 2.0, "update": 8}}
    (run / ".tmp-1-best").mkdir()  # of another process that was killed
    before = best_so_far(run)
    assert not (run / ".tmp-1-best").exists()
    if at < 2:
        with pytest.raises(KeyboardInterrupt):
            keep_best(run, method, config, result)
    else:
        keep_best(run, method, config, result)
    monkeypatch.undo()
    assert best_so_far(run) == (before if at < 2 else Best(2.0, 8))


def test_a_checkpoint_that_finds_no_room_says_so_and_leaves_the_one_before(tmp_path, no_large_files):
    module = torch.nn.Linear(100, 200)  # its weights fit in what a file may hold, Adam's two moments of them do not
    optimizer = torch.optim.Adam(module.parameters())
    save_checkpoint(tmp_path, module, optimizer, Progress(1, 0.0, "id"))
    module(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    with pytest.raises(CacheStorageError, match=r"cannot write .*optimizer\.pt: File too large; raise the file size"):
        save_checkpoint(tmp_path, module, optimizer, Progress(2, 0.0, "id"))
    assert latest_checkpoint(tmp_path).name == "update-00000001"
