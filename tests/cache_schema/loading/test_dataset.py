"""A DataLoader of one's own gets batches in slots; whoever keeps or copies a batch has what it was."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cache_building import assert_holds_what_it_says, is_in_a_slot
from torch.utils.data import DataLoader, Dataset

from cache_schema import Cache, CacheDataset, FeatureBatch, open_cache

CacheOf = Callable[..., Path]
ROWS = 20


@pytest.fixture(scope="module")
def cache(cache_of: CacheOf) -> Cache:
    return open_cache(cache_of(feature_rows=ROWS, kind="int8"))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_plain_dataloader_gives_batches_in_slots(cache: Cache, workers: int) -> None:
    dataset = CacheDataset(cache, tap="hidden", view="hflip", rows=range(2, 18), batch_size=3)
    loader = DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=dataset.collate)
    found = []
    for _ in range(2):
        for batch in loader:
            assert is_in_a_slot(batch.payload)
            assert_holds_what_it_says(cache, batch)
            found += batch.rows.tolist()
            assert set(batch.views.tolist()) == {1}
    assert found == [*range(2, 18)] * 2


def test_a_dataset_without_reused_memory_and_samples_one_by_one_work_too(cache: Cache) -> None:
    dataset = CacheDataset(cache)
    assert len(dataset) == ROWS
    assert dataset[3].shape == (1, 3, 6, 8)
    batch = dataset.collate([dataset[3], dataset[1]])
    assert batch.rows.tolist() == [3, 1]
    assert_holds_what_it_says(cache, batch)
    for batch in DataLoader(dataset, batch_size=7, num_workers=1, collate_fn=dataset.collate):
        assert_holds_what_it_says(cache, batch)
    # More samples than a slot has room for.
    assert not is_in_a_slot(CacheDataset(cache, batch_size=2).__getitems__([1, 2, 3]).payload)


def test_copies_of_batches_and_datasets_have_their_own_memory(cache: Cache) -> None:
    dataset = CacheDataset(cache, batch_size=4, slots=1)
    batch = dataset.__getitems__([1, 2])
    copies = [copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))]
    other = pickle.loads(pickle.dumps(dataset))
    del batch
    assert dataset.__getitems__([7, 8]).rows.tolist() == other.__getitems__([7, 8]).rows.tolist() == [7, 8]
    for copied in copies:
        assert copied.rows.tolist() == [1, 2]
        assert_holds_what_it_says(cache, copied)
    assert is_in_a_slot(other.__getitems__([7, 8]).payload)


class Remembering(Dataset):
    """Gives its first batch again for every even index, from the memory of the process."""

    def __init__(self, dataset: CacheDataset) -> None:
        self.dataset = dataset
        self.first: FeatureBatch | None = None

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> dict[str, FeatureBatch | int]:
        self.first = self.first or self.dataset.__getitems__([0, 1])
        batch = self.dataset.__getitems__([index % ROWS, 3]) if index % 2 else self.first
        return {"index": index, "batch": batch}


@pytest.mark.parametrize("slots", [2, 9])
def test_a_batch_that_its_worker_keeps_and_sends_twice_arrives_right_both_times(cache: Cache, slots: int) -> None:
    dataset = CacheDataset(cache, batch_size=2, slots=slots)
    for item in DataLoader(Remembering(dataset), batch_size=None, num_workers=1, collate_fn=lambda item: item):
        index, batch = item["index"], item["batch"]
        assert batch.rows.tolist() == ([index % ROWS, 3] if index % 2 else [0, 1])
        assert_holds_what_it_says(cache, batch)


def test_threads_that_read_from_one_dataset_never_share_a_slot(cache: Cache) -> None:
    dataset = CacheDataset(cache, batch_size=4, slots=6)

    def read(seed: int) -> None:
        rows = np.random.default_rng(seed).integers(0, ROWS, 4)
        batch = dataset.__getitems__(rows.tolist())
        assert_holds_what_it_says(cache, batch)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(read, range(400)))
