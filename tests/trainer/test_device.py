"""In which precision a run computes, and what may be said of its being repeated."""

import os

import pytest
import torch

from trainer import device, processes
from trainer.device import (
    choose_workers,
    full_precision,
    resumes_exactly,
    set_deterministic,
    share_machine,
    usable_cores,
)


def test_scores_are_computed_in_float32_whatever_surrounds_them():
    allowed = torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
        assert not torch.backends.cudnn.allow_tf32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert torch.backends.cudnn.allow_tf32 is allowed


@pytest.mark.parametrize(
    ("device", "deterministic", "exactly"), [("cpu", False, True), ("cuda", False, False), ("cuda", True, True)]
)
def test_an_exact_resume_is_claimed_only_where_it_holds(device, deterministic, exactly):
    assert resumes_exactly(torch.device(device), deterministic) is exactly


def test_deterministic_algorithms_are_used_where_they_are_asked_for_and_not_afterwards(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    set_deterministic(True)
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_no_more_cores_are_counted_than_the_process_or_its_container_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert usable_cores(tmp_path) == 6
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == 6
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert usable_cores(tmp_path) == 2
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cores in (("-1", 6), ("300000", 3)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert usable_cores(tmp_path) == cores


def test_a_gpu_is_fed_by_half_of_the_cores_and_a_cpu_by_one_thread_unless_told_otherwise(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for cores, workers in ((64, 8), (16, 8), (6, 3), (1, 1)):
        monkeypatch.setattr(device, "usable_cores", lambda cores=cores: cores)
        assert (choose_workers("auto", gpu), choose_workers("auto", cpu)) == (workers, 0)
    assert (choose_workers(0, gpu), choose_workers(5, cpu)) == (0, 5)


def test_runs_side_by_side_share_the_cores_among_their_loader_processes_and_threads(monkeypatch):
    told = []
    monkeypatch.setattr(device, "usable_cores", lambda: 16)
    monkeypatch.setattr(processes, "_runs", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    for runs, workers in ((4, 2), (8, 1), (32, 1)):
        share_machine(runs)
        assert choose_workers("auto", torch.device("cuda", 0)) == workers
    assert told == [3, 2, 1]  # never more than it had
