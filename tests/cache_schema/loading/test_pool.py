"""Pooled tensors: used again when nobody has them, never before, here and between processes."""

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch

from cache_schema.loading.pool import PooledTensors, TensorPool
from cache_schema.read_ahead import ReadAhead


def pool_of(slots: int) -> TensorPool:
    return TensorPool({"pixels": ((3, 2), torch.uint8), "box": ((3,), torch.float32)}, slots)


def fill(pool: TensorPool, number: int) -> PooledTensors:
    taken = pool.take(2)
    for tensor in taken.tensors.values():
        tensor.fill_(number)
    return taken


def address(pooled: PooledTensors) -> int:
    return pooled.tensors["pixels"].data_ptr()


def test_memory_is_used_again_once_the_last_of_its_tensors_is_gone() -> None:
    pool = pool_of(1)
    first = fill(pool, 1)
    place, box = address(first), first.tensors["box"]
    assert {name: tuple(tensor.shape) for name, tensor in first.tensors.items()} == {"pixels": (2, 2), "box": (2,)}
    del first
    assert address(pool.take(2)) != place
    assert box.tolist() == [1, 1]
    del box
    assert address(pool.take(2)) == place


def test_more_rows_or_more_batches_than_there_is_room_for_take_fresh_memory() -> None:
    pool = pool_of(1)
    held = [fill(pool, number) for number in range(3)]
    assert len({address(each) for each in held}) == 3
    assert [int(each.tensors["pixels"].sum()) for each in held] == [0, 4, 8]
    assert pool.take(7).tensors["pixels"].shape == (7, 2)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_what_a_worker_process_filled_arrives_where_it_lies(start_method: str) -> None:
    pool = pool_of(4)
    places = {address(each) for each in [pool.take(1) for _ in range(4)]}
    make: Callable[[int], PooledTensors] = partial(fill, pool)
    with ReadAhead(make, processes=1, start_method=start_method) as ahead:
        for number, arrived in enumerate(ahead.over(range(8))):
            assert address(arrived) in places
            assert arrived.tensors["box"].tolist() == [number, number]


def test_a_copy_has_memory_of_its_own() -> None:
    pool = pool_of(2)
    taken = fill(pool, 5)
    for other in (copy.deepcopy(taken), pickle.loads(pickle.dumps(taken))):
        taken.tensors["pixels"].fill_(0)
        assert int(other.tensors["pixels"].sum()) == 20
        taken.tensors["pixels"].fill_(5)
    assert address(copy.deepcopy(pool).take(1)) != address(pool.take(1))
