import json

import pytest
import torch

from trainer.errors import TrainError
from trainer.methods.settings import load_config
from trainer.models.student import load_student
from trainer.models.weights import load_weights
from trainer.runs import load_result, read_metrics
from trainer.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from trainer.training.loop import train


def test_a_log_cut_short_by_a_crash_is_read_up_to_there(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"update": 1}\n{"update": 2}\n{"upd')
    assert [record["update"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.fixture
def run(cache, tiny_config, tmp_path):
    train(tiny_config(updates=1), cache, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\x00", b"null"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("result.json", load_result),
        ("config.json", lambda run: load_config(run / "config.json")),
        ("student.json", load_student),
        ("student.safetensors", load_student),
        ("gim.safetensors", lambda run: load_weights(run / "gim.safetensors")),
    ],
)
def test_a_damaged_file_of_a_run_is_named_in_one_line(run, name, read, content):
    (run / name).write_bytes(content)
    with pytest.raises(TrainError, match=name) as caught:
        read(run)
    assert "\n" not in str(caught.value)


def test_a_result_that_lacks_what_every_run_says_is_damaged(run):
    result = json.loads((run / "result.json").read_text())
    del result["cache_id"]
    (run / "result.json").write_text(json.dumps(result))
    with pytest.raises(TrainError, match=r"result\.json is damaged, it says nothing of cache_id"):
        load_result(run)


@pytest.mark.parametrize(
    ("file", "name", "value", "words"),
    [
        ("result.json", "train_classes", "three", 'damaged, its train_classes is "three"'),
        ("student.json", "name", 3, "does not describe a student that can be built: its name is 3"),
        ("student.json", "kwargs", [1], "does not describe a student that can be built"),
    ],
)
def test_a_value_of_another_kind_is_named_in_one_line(run, file, name, value, words):
    (run / file).write_text(json.dumps({**json.loads((run / file).read_text()), name: value}))
    with pytest.raises(TrainError, match=words) as caught:
        {"result.json": load_result, "student.json": load_student}[file](run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x04"])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt", "progress.json"])
def test_a_damaged_file_of_a_checkpoint_says_which_checkpoint_and_what_to_do(tmp_path, name, content):
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(module.parameters())
    folder = save_checkpoint(tmp_path, module, optimizer, Progress(1, 0.0, "id"))
    (folder / name).write_bytes(content)
    with pytest.raises(TrainError, match=r"cannot resume from .*update-00000001.*start anew with --overwrite"):
        load_checkpoint(folder, module, optimizer, torch.device("cpu"))
