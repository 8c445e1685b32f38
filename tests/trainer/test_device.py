"""In which precision a run computes, and what may be said of its being repeated."""

import os

import pytest
import torch

from trainer.device import full_precision, resumes_exactly, set_deterministic


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
