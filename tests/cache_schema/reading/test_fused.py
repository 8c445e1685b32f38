"""Decoding by one compiled kernel where there is a GPU and a compiler, and the same numbers without."""

import warnings
from typing import Any

import pytest
import torch
from strict_device import StrictDevice

from cache_schema.reading import fused
from cache_schema.reading.batch import EncodedBatch


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_off", False)


def encoded(payload: torch.dtype) -> EncodedBatch:
    torch.manual_seed(0)
    values = torch.randint(-127, 128, (2, 3, 4, 8)).to(torch.float32).to(payload)
    kind: Any = "int8" if payload is torch.int8 else "float8_e4m3"
    return EncodedBatch(values, torch.rand(2, 3, 4) / 127, torch.rand(3, 8) + 0.5, kind)


@pytest.mark.parametrize("payload", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_gives_the_bits_that_several_give(payload: torch.dtype, dtype: torch.dtype) -> None:
    batch = encoded(payload)
    assert batch.scale is not None
    assert batch.channel is not None
    found = fused.scale_tokens(batch.payload, batch.scale, batch.channel, dtype)
    assert torch.equal(found, batch.decode(dtype=dtype))


def test_without_a_gpu_nothing_is_compiled_and_the_numbers_are_the_same() -> None:
    batch = encoded(torch.int8)
    assert fused.scale_in_one_pass(batch.payload, batch.scale, batch.channel, torch.bfloat16) is None  # type: ignore[arg-type]
    assert torch.equal(batch.decode(dtype=torch.bfloat16, fused=True), batch.decode(dtype=torch.bfloat16))


def test_what_cannot_be_compiled_is_said_once_and_decoded_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(*_: Any) -> torch.Tensor:
        tried.append(1)
        raise RuntimeError("Failed to find C compiler.\nSet the CC environment variable")

    monkeypatch.setattr(fused, "_compiled", lambda: broken)
    batch = encoded(torch.int8)
    with StrictDevice():
        with pytest.warns(UserWarning, match=r"several passes, for no kernel can be compiled: Failed to find C comp"):
            first = batch.decode("cuda:0", torch.bfloat16, fused=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = batch.decode("cuda:0", torch.bfloat16, fused=True)
        assert torch.equal(first.cpu(), batch.decode(dtype=torch.bfloat16))
        assert torch.equal(second.cpu(), first.cpu())
    assert tried == [1]


def test_memory_that_runs_out_is_not_taken_for_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fused, "_compiled", lambda: full)
    with StrictDevice(), pytest.raises(torch.OutOfMemoryError):
        encoded(torch.int8).decode("cuda:0", torch.bfloat16, fused=True)
