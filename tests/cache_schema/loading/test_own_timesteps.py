"""A dataset whose rows each have timesteps of their own, here and in worker processes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_building import TIMESTEPS

from cache_schema import CacheDataset, CacheRequestError, open_cache
from cache_schema.read_ahead import ReadAhead


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_batches_have_the_features_and_the_calibration_of_each_rows_timesteps(
    cache_of: Callable[..., Path], kind: str, processes: int
) -> None:
    cache = open_cache(cache_of(kind=kind))
    dataset = CacheDataset(cache, batch_size=4, each=2)
    rows, views = np.array([3, 0, 5]), np.array([0, 1, 1])
    asked = [np.array(TIMESTEPS)[[[0, 1], [shift, 2], [1, 2]]] for shift in range(2)]
    with ReadAhead(lambda n: dataset.read(rows, views, asked[n % 2]), processes=processes) as ahead:
        for n, batch in zip(range(6), ahead.over(range(6)), strict=True):
            expected = cache.read(rows, timesteps=asked[n % 2], view=views).decode()
            assert torch.equal(batch.decode(), expected)


def test_a_dataset_that_is_to_be_told_timesteps_is_not_read_without(cache_of: Callable[..., Path]) -> None:
    dataset = CacheDataset(open_cache(cache_of()), batch_size=4, each=2)
    with pytest.raises(CacheRequestError, match="2 rows need the timesteps of 2"):
        dataset.read(np.array([3, 0]), np.array([0, 0]))


def test_joined_samples_have_the_calibration_of_each_ones_timesteps(cache_of: Callable[..., Path]) -> None:
    cache = open_cache(cache_of(kind="int8"))
    dataset, steps = CacheDataset(cache, each=1), np.array(TIMESTEPS)[[0, 2]][:, None]
    samples = [dataset.read(np.array([row]), np.array([0]), steps[[row]]) for row in (0, 1)]
    assert torch.equal(dataset.collate(samples).decode(), cache.read([0, 1], timesteps=steps).decode())
