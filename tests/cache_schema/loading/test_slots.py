"""A slot belongs to whoever holds it, for as long as he lives and no longer."""

import gc
import multiprocessing
import os
from multiprocessing.connection import Connection

import pytest
import torch

from cache_schema import LoaderError
from cache_schema.loading.slots import Lease, SlotRing


@pytest.fixture
def ring() -> SlotRing:
    return SlotRing({"payload": ((4, 3), torch.float32), "scale": ((4,), torch.float32)}, count=3)


def test_slots_of_a_process_that_died_are_free_again_and_what_it_sent_is_not_mistaken(ring: SlotRing) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def take_all_and_die(pipe: Connection) -> None:
        leases = [ring.take() for _ in range(3)]
        assert all(lease is not None and ring.send(lease) for lease in leases)
        assert ring.take() is None
        pipe.send(leases)
        pipe.recv()
        os._exit(9)

    worker = context.Process(target=take_all_and_die, args=(theirs,))
    worker.start()
    leases: list[Lease] = ours.recv()
    assert ring.take() is None
    received = ring.receive(leases[0])
    ours.send("die")
    worker.join()
    others = [ring.take(), ring.take(), ring.take()]
    assert {lease.slot for lease in others if lease} == {0, 1, 2} - {received.slot}
    with pytest.raises(LoaderError, match="lost with the worker"):
        ring.receive(leases[1])


def test_a_forked_process_does_not_free_what_its_parent_holds(ring: SlotRing) -> None:
    held = [ring.tensors(lease, 4) for lease in (ring.take(), ring.take(), ring.take()) if lease]

    def let_go() -> None:
        held.clear()
        gc.collect()
        os._exit(0)

    worker = multiprocessing.get_context("fork").Process(target=let_go)
    worker.start()
    worker.join()
    assert ring.take() is None
    held.pop()
    assert ring.take() is not None
