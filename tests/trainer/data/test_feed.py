"""Batches on the device that trains: those of the cache, in their order, copied one ahead, waited for as it must be.

CUDA is one that writes down what it is asked; its tensors refuse to mix with those of the CPU.
"""

from __future__ import annotations

import os
import pickle
from contextlib import contextmanager
from multiprocessing import context
from multiprocessing.popen_spawn_posix import Popen
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import pytest
import torch
from strict_device import DEVICE, StrictDevice

from cache_schema.encoding.number_formats import encode
from cache_schema.reading.batch import stored_batch
from trainer.data import batch as batch_module
from trainer.data import batches as batches_module
from trainer.data import feed
from trainer.data.batch import Batch
from trainer.data.batches import TrainingBatches, iterate
from trainer.data.feed import Feed
from trainer.methods.reading import TEACHER
from trainer.methods.registry import find_method
from trainer.training.assembly import assemble

CPU = torch.device("cpu")


class Event:
    def __init__(self, cuda, name="", time=0.0):
        self.cuda, self.name, self.time, self.done = cuda, name, time, False

    def record(self, stream):
        self.time = self.cuda.now

    def query(self):
        return self.done or self.cuda.all_done

    def elapsed_time(self, later):
        return later.time - self.time


class Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def record_event(self):
        event = Event(self.cuda, f"{self.name} {len(self.cuda.said)}")
        self.cuda.events.append(event)
        self.cuda.said.append(f"copied on {self.name}")
        return event

    def wait_event(self, event):
        self.cuda.said.append(f"{self.name} waits for {event.name.split()[0]}")


class RecordedCuda:
    """`said` is what it was asked for, in order; `now` the milliseconds of its clock."""

    def __init__(self, monkeypatch):
        self.said, self.events, self.used, self.now, self.all_done = [], [], [], 0.0, True
        self.compute = self.current = Stream(self, "compute")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self, "side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.used.append(stream.name))
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def cudaHostRegister(self, address, size, flags):  # noqa: N802
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802
        pass


@pytest.fixture
def cuda(monkeypatch):
    return RecordedCuda(monkeypatch)


def batches_of(cache, config):
    return TrainingBatches(cache, config, 24, find_method(config.method).needs(config))


@pytest.fixture
def batches(cache, tiny_config):
    return batches_of(cache, tiny_config())


def values(batch: Batch) -> list[torch.Tensor]:
    return [tensor.cpu().clone() for tensor in (batch.images, batch.labels, batch.features[TEACHER])]


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_a_cpu_is_given_the_batches_as_they_come(batches):
    expected = [values(batches[update].to(CPU)) for update in range(4)]
    fed = Feed(iterate(batches, 0, 4, 0), CPU)
    assert all(same(values(found), own) for found, own in zip(fed, expected, strict=True))
    assert fed.waited >= 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_is_given_the_same_from_memory_that_is_used_again_and_again(cache, tiny_config, cuda, workers):
    batches = batches_of(cache, tiny_config(workers=workers))
    expected = [values(batches[update].to(CPU)) for update in range(20)]
    batches.pin_memory()
    places = set()

    def seen(stream):
        for batch in stream:
            places.add(batch.images.data_ptr())
            yield batch

    with StrictDevice():
        fed = Feed(seen(iterate(batches, 0, 20, workers)), DEVICE, reclaim=batches.reclaim)
        for batch, own in zip(fed, expected, strict=True):
            assert batch.images.device == batch.features[TEACHER].device == DEVICE
            assert same(values(batch), own)
    assert len(places) <= batches.slots


def test_each_batch_is_copied_on_a_side_stream_before_the_step_of_the_one_before_it(batches, cuda):
    with StrictDevice():
        fed = iter(Feed((batches[update] for update in range(3)), DEVICE))
        for update in range(3):
            next(fed)
            cuda.said.append(f"step {update}")
        assert next(fed, None) is None
    arrived = ["copied on side"] * 3  # features and images tell their slots only where these are page-locked
    assert [said for said in cuda.said if said != "copied on side"] == [
        said for update in range(3) for said in ("compute waits for side", f"step {update}")
    ]
    assert cuda.said[:3] == [*arrived[:2], "compute waits for side"]
    assert cuda.said.index("step 0") < len(cuda.said) - 1 - cuda.said[::-1].index("copied on side")
    # Payload, images and labels: what a copy was made into is kept until the step has read it.
    assert cuda.used == ["compute"] * 9


def test_memory_is_not_filled_again_before_it_was_copied(batches, cuda):
    batches.pin_memory()
    cuda.all_done = False
    with StrictDevice():
        moved = [batches[update].moved(DEVICE) for update in range(batches.slots)]
        assert batches.pixels._ring.take() is None
        assert all(reader.reused._ring.take() is None for reader in batches.features.values())
        for event in cuda.events:
            event.done = True
        batches.reclaim()
        assert batches.pixels._ring.take() is not None
        del moved


def test_the_wait_is_what_the_devices_own_clock_says_without_the_first_batch(batches, cuda):
    def slow(updates):
        for update in range(updates):
            cuda.now += 50
            yield batches[update]

    with StrictDevice():
        fed = Feed(slow(4), DEVICE)
        for _ in fed:
            cuda.now += 1000  # the step
    assert fed.waited == pytest.approx(0.1)  # batches 2 and 3; the last is asked for before, with batch 2


def test_a_cpus_wait_is_the_time_between_asking_and_having(batches, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(feed, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow():
        for seconds in (7.0, 0.5, 2.0):
            now[0] += seconds
            yield batches[0]

    fed = Feed(slow(), CPU)
    for _ in fed:
        now[0] += 100.0  # the step
    assert fed.waited == pytest.approx(2.5)


def test_page_locking_that_the_system_refuses_is_said_and_no_more(batches, cuda, monkeypatch, capsys):
    monkeypatch.setattr(cuda, "cudaHostRegister", lambda *_: 1)
    batches.pin_memory()
    assert "note: batches are copied to the GPU more slowly: cannot page-lock" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3"])
def test_coarse_features_are_decoded_to_bfloat16_as_their_float32_is_rounded(kind):
    features, channel = torch.randn(1, 2, 5, 16) * 10, torch.rand(2, 16) + 0.5
    stored = encode(kind, features.numpy(), channel.numpy())
    encoded = stored_batch(stored.payload, stored.scale, channel, kind, (2, 5, 16))
    batch = Batch(torch.zeros(1), torch.zeros(1), {TEACHER: encoded})
    exact = batch.to(CPU).features[TEACHER]
    assert exact.dtype == torch.float32
    assert torch.equal(batch.to(CPU, torch.bfloat16).features[TEACHER], exact.to(torch.bfloat16))


def test_what_a_cache_keeps_more_precisely_stays_so(batches):
    assert batches[0].to(CPU, torch.bfloat16).features[TEACHER].dtype == torch.float32


def test_small_tensors_are_page_locked_before_they_are_copied(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append(tuple(tensor.shape)) or tensor)
    with StrictDevice():
        assert batch_module._moved(torch.arange(6), DEVICE).device == DEVICE
    assert asked == [(6,)]


def test_no_more_processes_read_ahead_than_there_is_memory_for(cache, tiny_config, monkeypatch):
    config = tiny_config()
    batch = 6 * (3 * 24 * 24 + 2 * 4 * 6 * 4)  # images as uint8, features as float32
    monkeypatch.setattr("trainer.device.usable_cores", lambda: 16)
    for room, workers in ((100, 8), (9.5, 3), (1, 1)):
        monkeypatch.setattr(batches_module, "spare_memory", lambda room=room: room * batch)
        needs = find_method(config.method).needs(config)
        assert TrainingBatches(cache, config, 24, needs, device=DEVICE).workers == workers
        assert batches_of(cache, tiny_config(workers=5)).workers == 5


def test_a_worker_that_is_started_anew_is_given_the_same_memory(batches):
    batches.images.pictures([0, 1])  # by threads, which stay in this process

    class Starting:
        DupFd = staticmethod(Popen.DupFd)
        duplicate_for_child = staticmethod(os.dup)

    context.set_spawning_popen(Starting())
    try:
        sent = ForkingPickler.dumps(batches)
    finally:
        context.set_spawning_popen(None)
    worker = pickle.loads(sent)
    expected = values(batches[0].to(CPU))
    assert same(values(worker[0].to(CPU)), expected)
    unseen = next(row for row in batches.images._place if not batches.images._is_known(row))
    worker.images.pictures([unseen])
    assert batches.images._is_known(unseen)
    copied = pickle.loads(pickle.dumps(batches.images._known))
    copied.array[:] = 0
    assert batches.images._is_known(unseen)


@pytest.mark.parametrize(
    ("settings", "flags", "exact"),
    [
        ([], {}, False),
        (["gim.token_norm=standardize"], {}, True),
        (["gim.token_norm=whiten"], {}, True),
        (["gim.residual=pca"], {}, True),
        (["loss.align_target=pooled"], {}, True),
        (["regression.weight=1"], {}, True),
        ([], {"method": "regression"}, True),
        ([], {"method": "relational"}, True),
    ],
)
def test_features_that_means_are_taken_off_stay_float32_under_autocast(cache, tiny_config, settings, flags, exact):
    parts = assemble(tiny_config(*settings, "precision=bfloat16", **flags), cache)
    assert parts.feature_dtype == (torch.float32 if exact else torch.bfloat16)
