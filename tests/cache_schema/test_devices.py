"""A command runs on the device that was asked for, or says what there is."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cache_schema import devices
from cache_schema.devices import DeviceError, choose_device, prepare_memory, sound_gradients, use_device

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A machine with so many usable GPUs, and so many device files of GPUs."""

    def make(usable: int, nodes: int = 0) -> None:
        for n in range(nodes):
            (tmp_path / f"nvidia{n}").touch()
        (tmp_path / "nvidiactl").touch()
        monkeypatch.setattr(devices, "_NODES", tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: usable)

        def init() -> None:
            raise RuntimeError(TOO_OLD)

        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("LOCAL_RANK", raising=False)

    return make


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(("rank", "index"), [(None, 0), ("0", 0), ("1", 1), ("2", 0), ("5", 1)])
def test_of_two_gpus_each_process_takes_that_of_its_rank(machine, monkeypatch, name, rank, index):
    machine(usable=2, nodes=2)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert choose_device(name) == torch.device("cuda", index)


def test_a_gpu_named_by_number_is_that_one(machine, monkeypatch):
    machine(usable=2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert choose_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:2", "'cuda:2': there is none such, only cuda:0 to cuda:1"),
        ("abacus", "'abacus': no such device; use auto, cpu or cuda"),
        ("meta", "'meta': there is none here"),
        ("cpu:1", "'cpu:1': there is none here"),
    ],
)
def test_a_device_that_does_not_exist_is_refused(machine, name, message):
    machine(usable=2)
    with pytest.raises(DeviceError, match=message):
        choose_device(name)


def test_without_a_gpu_cuda_is_refused_with_the_reason_and_auto_is_the_cpu(machine):
    machine(usable=0)
    with pytest.raises(DeviceError, match=r"no CUDA GPU .*: The NVIDIA driver on your system is too old") as caught:
        choose_device("cuda")
    assert "\n" not in str(caught.value)
    assert choose_device("auto") == torch.device("cpu")


def test_a_gpu_that_cannot_be_used_is_an_error_and_not_a_run_on_the_cpu(machine, monkeypatch):
    machine(usable=0, nodes=2)
    with pytest.raises(DeviceError, match=r"nvidia0\) that PyTorch cannot use: The NVIDIA driver .*--device cpu"):
        choose_device("auto")
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match="this PyTorch was built without CUDA"):
        choose_device("auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user's own wish
    assert choose_device("auto") == torch.device("cpu")


def test_the_device_is_told_in_words(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    card = type("Card", (), {"name": "NVIDIA H100 80GB HBM3", "total_memory": 85_000_000_000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert use_device(torch.device("cuda", 1)) == "device cuda:1: NVIDIA H100 80GB HBM3, 85 GB"
    assert chosen == [torch.device("cuda", 1)]
    assert use_device(torch.device("cpu")) == "device cpu"


@pytest.mark.parametrize(
    ("version", "name"), [("2.14.1+cu130", "PYTORCH_ALLOC_CONF"), ("2.6.0", "PYTORCH_CUDA_ALLOC_CONF")]
)
def test_memory_grows_in_pieces_under_the_name_that_this_pytorch_reads(monkeypatch, version, name):
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("importlib.metadata.version", lambda package: version)
    prepare_memory()
    assert os.environ.pop(name) == "expandable_segments:True"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_says_of_the_memory_stays(monkeypatch, name):
    before = dict(os.environ) | {name: "max_split_size_mb:128"}
    monkeypatch.setattr(os, "environ", dict(before))
    prepare_memory()
    assert os.environ == before


def test_commands_say_so_before_pytorch_is_there_to_read_it():
    script = (
        "import os, sys, typer\nfrom cache_schema import cli\napp = typer.Typer()\n"
        "@app.command()\ndef show():\n    print(os.environ['PYTORCH_ALLOC_CONF'], 'torch' in sys.modules)\n"
        "cli.run(app, [])"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean)
    assert done.stdout.split() == ["expandable_segments:True", "False"], done.stderr


def test_a_training_runs_attention_without_cudnn_whose_backward_pass_is_wrong_and_no_longer_than_that():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with sound_gradients():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


TOUCHED_AGAIN = """
import resource
import numpy as np
from cache_schema.devices import keep_freed_memory

def pages_touched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(48 << 20, np.uint8).fill(1)  # which glibc would give back at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(min(pages_touched() for _ in range(20)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is told so in glibc's way")
def test_memory_that_a_batch_has_freed_is_not_asked_of_the_system_again():
    done = subprocess.run([sys.executable, "-c", TOUCHED_AGAIN], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # of 12 288


def test_memory_is_kept_where_a_cpu_computes(monkeypatch):
    kept = []
    monkeypatch.setattr(devices, "keep_freed_memory", lambda: kept.append(True))
    use_device(torch.device("cpu"))
    assert kept
