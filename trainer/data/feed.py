"""Batches on the device that trains, and how long it had to wait for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import torch

from trainer.data.batch import Batch


class Feed:
    """Moves batches to a device and decodes them there as `dtype`, in the order given.

    To a GPU each batch is copied on a stream of its own while the one before it is trained on. `reclaim` is called
    before a batch is asked for: what was copied by then can be used again. Without a GPU nothing is done ahead.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        reclaim: Callable[[], None] = lambda: None,
    ) -> None:
        self._batches, self._device, self._dtype, self._reclaim = batches, device, dtype, reclaim
        self._wait: _Wait = _DeviceWait(device) if device.type == "cuda" else _HostWait()

    def __iter__(self) -> Generator[Batch, None, None]:
        yield from self._copied_ahead() if self._device.type == "cuda" else self._as_they_come()

    @property
    def waited(self) -> float:
        """Seconds in which the device had nothing to do but to wait for a batch; the first one does not count.

        On a GPU these are known when it has come that far.
        """
        return self._wait.seconds()

    def _as_they_come(self) -> Generator[Batch, None, None]:
        first = True
        while True:
            self._wait.begin()
            batch = next(self._batches, None)
            if batch is None:
                return
            self._wait.end(counts=not first)
            first = False
            ready = [batch.to(self._device, self._dtype)]
            del batch  # what it was read into may be used again, and what it became is the caller's alone
            yield ready.pop()

    def _copied_ahead(self) -> Generator[Batch, None, None]:
        copies = torch.cuda.Stream(self._device)
        queued, first = self._queue(copies), True
        while queued is not None:
            self._wait.begin()
            # Before the step of this batch is queued: the copy of the next one is to run beside the whole of it.
            upcoming = self._queue(copies)
            batch, arrived = queued
            compute = torch.cuda.current_stream(self._device)
            compute.wait_event(arrived)
            self._wait.end(counts=not first)
            _use_on(compute, batch)
            queued, first = upcoming, False
            ready = [batch.decoded(self._dtype, fused=True)]
            del batch, upcoming
            yield ready.pop()

    def _queue(self, copies: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event] | None:
        """The next batch, being copied, and the event of its arrival; None after the last one."""
        self._reclaim()
        batch = next(self._batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(copies):
            return batch.moved(self._device), copies.record_event()


def _use_on(stream: torch.cuda.Stream, batch: Batch) -> None:
    """Keep the memory of a batch from being given to a copy while work that is queued on `stream` still reads it."""
    for tensor in batch.tensors:
        tensor.record_stream(stream)


class _Wait(Protocol):
    """Between `begin`, when a batch is asked for, and `end`, when it is there, nothing else can be done."""

    def begin(self) -> None: ...

    def end(self, counts: bool) -> None: ...

    def seconds(self) -> float: ...


class _HostWait:
    def __init__(self) -> None:
        self._sum = self._began = 0.0

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self, counts: bool) -> None:
        if counts:
            self._sum += time.perf_counter() - self._began

    def seconds(self) -> float:
        return self._sum


class _DeviceWait:
    """By the GPU's own clock: from the end of what was queued when a batch was asked for to the batch's arrival."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._sum = device, 0.0
        self._pairs: deque[tuple[Any, Any]] = deque()
        self._asked: Any = None

    def begin(self) -> None:
        self._asked = self._mark()

    def end(self, counts: bool) -> None:
        if counts:
            self._pairs.append((self._asked, self._mark()))
            self.seconds()  # so that few events wait to be read

    def seconds(self) -> float:
        while self._pairs and self._pairs[0][1].query():
            asked, there = self._pairs.popleft()
            self._sum += asked.elapsed_time(there) / 1000
        return self._sum

    def _mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
