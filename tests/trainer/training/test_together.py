"""Two processes that train one student, as torchrun starts them on a CPU, against one process of the same batches."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cache_schema import open_cache
from trainer import processes
from trainer.config import save_config
from trainer.data.batches import TrainingBatches
from trainer.data.features import Needs
from trainer.errors import TrainError
from trainer.runs import read_metrics
from trainer.training.loop import train

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("together", HERE / "together.py")
assert _spec is not None
_script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_script)
save_gradients = _script.save_gradients
# By name: what is trained otherwise than tiny_config says. All that looks at the whole batch is among them.
RUNS = {
    "distilled": (
        "distill", ("unlabeled_per_batch=2", "loss.drc_on=both", "loss.align=memory", "loss.memory=16",
                    "loss.center=class", "loss.alpha_by=gradient_ratio", "regression.weight=1",
                    "augment.crop_scale=0.5,1", "optim.lr=1e-5")),
    "parts": ("distill", ("optim.accumulate=3", "optim.ema=0.9", "timesteps_per_step=1", "optim.grad_clip=1",
                          "optim.lr=1e-5")),
    "relational": ("relational", ("loss.components=4", "optim.lr=1e-5")),
}  # fmt: skip


@pytest.fixture(scope="module")
def together(tmp_path_factory, cache_path, tiny_settings, build_tiny, break_features):
    """The folder of runs of two processes, and the configs: one start of Python for all of them."""
    from trainer.methods.settings import make_config

    folder, configs = tmp_path_factory.mktemp("together"), {}
    for name, (mode, settings) in RUNS.items():
        tiny = [text for text in tiny_settings if text != "--set" and (mode == "distill" or "gim." not in text)]
        configs[name] = make_config("paper", [*tiny, "precision=float32", *settings], cache=str(cache_path), mode=mode)
    runs = {**configs, "cut": configs["parts"]}
    arguments = []
    for name, config in runs.items():
        save_config(config, folder / f"{name}.json")
        arguments.append(f"{folder / name}={folder / name}.json")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    broken = break_features(build_tiny(tmp_path_factory.mktemp("broken") / "cache"), "train-1-3")
    failing = ["run", "--cache", broken.root, "--output", folder / "diverged", "--preset", "small", *tiny_settings,
               "--set", "views=canonical", "--set", "verify_reads=false", "--set", "regression.weight=0"]  # fmt: skip
    arguments += ["--", *map(str, failing)]
    command = [*torchrun, str(HERE / "together.py"), str(cache_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    return folder, configs


def losses(run):
    return [record["losses"] for record in read_metrics(run / "metrics.jsonl") if "losses" in record]


@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_follow_the_losses_of_one(together, tmp_path, cache_path, name):
    folder, configs = together
    result = train(configs[name], open_cache(cache_path), tmp_path / "alone")
    ours, alone = losses(folder / name), losses(tmp_path / "alone")
    assert len(ours) == len(alone) == result["student_updates"]
    for found, expected in zip(ours, alone, strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    told = json.loads((folder / name / "result.json").read_text())
    assert (told["processes"], told["images_seen"]) == (2, result["images_seen"])
    save_gradients(configs[name], open_cache(cache_path), tmp_path / "gradients.safetensors")
    ours, alone = load_file(folder / name / "gradients.safetensors"), load_file(tmp_path / "gradients.safetensors")
    assert ours.keys() == alone.keys()
    for key, value in ours.items():
        np.testing.assert_allclose(value, alone[key], rtol=1e-3, atol=1e-5 * alone[key].abs().max().item() + 1e-6)


def test_a_run_that_was_interrupted_in_one_of_two_goes_on_to_the_same_end(together):
    folder, _ = together
    assert losses(folder / "cut") == losses(folder / "parts")
    for file in ("student.safetensors", "gim.safetensors"):
        assert (folder / "cut" / file).read_bytes() == (folder / "parts" / file).read_bytes()


def test_features_that_one_of_two_finds_broken_are_told_once_with_the_whole_batch(together):
    folder, _ = together
    said, other = ((folder / f"told-{number}.txt").read_text() for number in (0, 1))
    errors = [line for line in (said + other).splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "the cached features 'teacher' of sample 'train-1-3' are not finite" in said
    about = json.loads((folder / "diverged" / "diverged.json").read_text())
    assert "train-1-3" in about["samples"]
    assert len(set(about["samples"])) == 6


@pytest.mark.parametrize("count", [2, 3])
def test_shares_of_a_batch_are_the_batch_and_show_the_same_pictures(cache, tiny_config, monkeypatch, count):
    needs = Needs(unlabelled=3)
    config = tiny_config("batch_size=6", "augment.crop_scale=0.5,1", "augment.flip=true", mode="baseline")
    whole = TrainingBatches(cache, config, 24, needs)
    shares = []
    for number in range(count):
        monkeypatch.setattr(processes, "count", lambda: count)
        monkeypatch.setattr(processes, "number", lambda number=number: number)
        shares.append(TrainingBatches(cache, config, 24, needs))
    if 3 % count:
        with pytest.raises(TrainError, match=r"2 processes, optim\.accumulate: 3 unlabelled images"):
            shares[0].require_parts(count)
        return
    for update in range(2 * whole.per_epoch):
        parts = [batches[update] for batches in shares]
        rows = np.concatenate([batches.rows(update) for batches in shares])
        assert sorted(rows) == sorted(whole.rows(update))  # none twice, none missed
        assert all(part.unlabelled == 1 for part in parts)
        # Labelled rows of all shares, one after the other, then the unlabelled ones.
        pictures = [part.images[:-1] for part in parts] + [part.images[-1:] for part in parts]
        assert torch.equal(torch.cat(pictures), whole[update].images)


@pytest.mark.parametrize(("rank", "left_by"), [("0", TrainError), ("1", SystemExit)])
def test_that_another_process_is_gone_is_told_by_the_first_and_called_no_bug(monkeypatch, rank, left_by):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(left_by), processes.one_speaks():
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:2710")
    with pytest.raises(RuntimeError, match="shape"), processes.one_speaks():
        raise RuntimeError("shape '[2]' is invalid for input of size 3")


def test_batch_norms_are_refused_where_they_cannot_be_synchronised(monkeypatch):
    from trainer.config import StudentConfig
    from trainer.models.student import build_student
    from trainer.training.distributed import synchronise_batch_norm

    student = build_student(StudentConfig(name="resnet10t", img_size=None))
    synchronise_batch_norm(student, torch.device("cpu"))
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(TrainError, match="batch norms, which look at the whole batch"):
        synchronise_batch_norm(student, torch.device("cpu"))
    student.freeze_batch_norm(scales_too=False)
    synchronise_batch_norm(student, torch.device("cpu"))
