"""Several processes that train one student, as torchrun starts them: which one this is, and what they tell each other.

Each trains on its share of every batch. Without a process group, and inside `alone`, all of this is of one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import SharedError, TrainError

_alone = False
_runs = 1  # side by side on this machine


@contextmanager
def alone() -> Iterator[None]:
    """What is computed inside is of this process only: the others need not come along."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def count() -> int:
    """How many processes train together."""
    together = not _alone and dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if together else 1


def number() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def leads() -> bool:
    """Whether this is the one that writes, logs and evaluates."""
    return number() == 0


def started() -> tuple[int, int]:
    """The number of this process and how many torchrun started, before they know each other; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def one_speaks() -> Iterator[None]:
    """Of several processes the first one alone prints; an error is told by whoever meets it, by one if all do."""
    with Path(os.devnull).open("w") as silence, redirect_stdout(silence) if started()[0] else nullcontext():
        try:
            yield
        except SharedError:
            if leads():
                raise
            # Whoever ends first has the others killed, so the one that tells must come first.
            with suppress(RuntimeError):
                dist.barrier()  # which is broken off when it has told and is gone
            raise SystemExit(1) from None
        except RuntimeError as error:
            if not _of_one_gone(error):
                raise
            if started()[0] == 0:
                raise TrainError(
                    "another process of this run is gone: it or torchrun says why; then --resume"
                ) from None
            raise SystemExit(1) from None


def _of_one_gone(error: RuntimeError) -> bool:
    """Whether a process cannot hear another any more: gloo and NCCL have no kind of error for that, but words."""
    said = str(error)
    closed = "Connection closed" in said or "Connection reset" in said or "Broken pipe" in said
    return ("gloo" in said and closed) or "remote process exited" in said


def beside() -> int:
    """How many processes that train share this machine, its memory and its cores."""
    return _runs * max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def be_one_of(runs: int) -> None:
    """From here on this process is known to be one of several runs that are made side by side on this machine."""
    global _runs
    _runs = runs


def summed(value: Tensor) -> Tensor:
    """The sum over processes, without a gradient."""
    if count() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether it is so in one of the processes at least; all of them get the same answer."""
    return flag if count() == 1 else bool(summed(torch.tensor(float(flag), device=device)).item())


def share_of_sum(value: Tensor) -> Tensor:
    """What a mean over all processes' rows divides by in each: 1/count of the sum over processes, at least 1/count.

    Gradients are averaged over processes: a sum divided by this becomes the mean over the whole batch.
    """
    return summed(value).clamp_min(1) / count()


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, (B, …) -> (count · B, …), those of process 0 first.

    The gradient of a loss that all of them compute alike comes back to the rows it is of.
    """
    return rows if count() == 1 else _Gathered.apply(rows)


def wait_for_all() -> None:
    """Go on when every process has come this far."""
    if count() > 1:
        dist.barrier()


def told_by_leader(value: Any) -> Any:
    """What the first process has, in every one."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def everyones(value: Any) -> list[Any]:
    """What each process has, that of process 0 first, in every one."""
    if count() == 1:
        return [value]
    boxes: list[Any] = [None] * count()
    dist.all_gather_object(boxes, value)
    return boxes


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(count())]
        dist.all_gather(parts, rows.contiguous())
        ctx.rows = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        own = gradients[0][number() * ctx.rows : (number() + 1) * ctx.rows]
        return own * count()  # which averaging over processes takes off again
