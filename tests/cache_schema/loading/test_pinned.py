"""Page-locked slots wait for the copies of their batch, on whichever stream, and only in the process that locked them.

CUDA is one that records what it is asked and is done when the test says so.
"""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from strict_device import StrictDevice

from cache_schema import FeatureLoader, open_cache
from cache_schema.loading.slots import SlotRing

OTHER = torch.device("cuda", 1)


class Event:
    def __init__(self, stream: str) -> None:
        self.stream, self.done = stream, False

    def query(self) -> bool:
        return self.done


class RecordingCuda:
    """`current`: name of the current stream of each device; asking anything notes which process asked."""

    def __init__(self, file: Path) -> None:
        self.file, self.current = file, {0: "default of 0", 1: "default of 1"}
        self.events: list[Event] = []
        self.locked = 0

    def note(self) -> None:
        with self.file.open("a") as file:
            file.write(f"{os.getpid()}\n")

    def cudart(self) -> "RecordingCuda":
        self.note()
        return self

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.locked += size
        return 0

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802
        self.note()
        self.locked = 0

    def current_stream(self, device: torch.device | None = None) -> "RecordingStream":
        self.note()
        return RecordingStream(self, self.current[device.index if device is not None and device.index else 0])

    def processes(self) -> set[int]:
        return set(map(int, self.file.read_text().split()))


class RecordingStream:
    def __init__(self, cuda: RecordingCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def record_event(self) -> Event:
        self.cuda.events.append(Event(self.name))
        return self.cuda.events[-1]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RecordingCuda:
    fake = RecordingCuda(tmp_path / "asked")
    for name in ("cudart", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return fake


@pytest.fixture
def ring(cuda: RecordingCuda) -> SlotRing:
    ring = SlotRing({"payload": ((4, 3), torch.float32)}, count=1)
    ring.pin()
    return ring


def test_a_slot_waits_for_the_stream_that_copied_it_whichever_is_current_when_it_is_let_go_of(
    cuda: RecordingCuda, ring: SlotRing
) -> None:
    lease = ring.take()
    assert lease is not None
    tensors = ring.tensors(lease, 4)
    cuda.current[1] = "side stream of 1"
    ring.copied(lease, OTHER)
    cuda.current[1] = "default of 1"
    del tensors
    assert [event.stream for event in cuda.events] == ["side stream of 1"]
    assert ring.take() is None
    cuda.events[0].done = True
    assert ring.take() is not None


def test_a_slot_copied_to_two_devices_waits_for_both(cuda: RecordingCuda, ring: SlotRing) -> None:
    lease = ring.take()
    assert lease is not None
    tensors = ring.tensors(lease, 4)
    ring.copied(lease, torch.device("cuda", 0))
    ring.copied(lease, OTHER)
    del tensors
    cuda.events[1].done = True
    assert ring.take() is None
    cuda.events[0].done = True
    assert ring.take() is not None


def test_copies_that_nobody_told_of_are_taken_to_be_on_the_current_stream(cuda: RecordingCuda, ring: SlotRing) -> None:
    lease = ring.take()
    assert lease is not None
    tensors = ring.tensors(lease, 4)
    cuda.current[0] = "side stream of 0"
    del tensors
    assert [event.stream for event in cuda.events] == ["side stream of 0"]
    assert ring.take() is None


@pytest.mark.parametrize("workers", [0, 2])
def test_only_the_process_that_page_locked_the_slots_asks_cuda(
    cache_of: Callable[..., Path], cuda: RecordingCuda, workers: int
) -> None:
    places = set()
    with FeatureLoader(open_cache(cache_of()), 2, workers=workers, pin_memory=True) as loader:
        assert cuda.locked > 0
        for _ in range(4):
            for batch in loader:
                places.add(batch.payload.data_ptr())
                del batch
                for event in cuda.events:
                    event.done = True
    # Workers fill the slots again that this process let go of, and fall back to no other memory.
    assert len(places) <= 2 * workers + 4
    assert cuda.processes() == {os.getpid()}
    del loader
    gc.collect()
    assert cuda.locked == 0


def test_a_batch_that_is_decoded_on_a_device_tells_its_slot(cache_of: Callable[..., Path], cuda: RecordingCuda) -> None:
    with FeatureLoader(open_cache(cache_of()), 2, pin_memory=True) as loader:
        batch = next(iter(loader))
        expected = batch.decode()
        assert cuda.events == []
        cuda.current[0] = "side stream of 0"
        with StrictDevice():
            decoded = batch.decode("cuda:0", non_blocking=True)
            assert torch.equal(decoded.cpu(), expected)
        cuda.current[0] = "default of 0"
        del batch
        assert [event.stream for event in cuda.events] == ["side stream of 0"]
