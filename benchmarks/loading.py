"""How fast PyTorch is fed: FeatureLoader and DataLoaders over a cache against the reader alone, in turns, in one run.

`python -m benchmarks.loading`. Random batches of int8 samples from the page cache. A turn of a contender takes the
same number of batches as a turn of the reader, into memory that is used again; worker processes are running already,
and what they read ahead before the turn does not count.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import in_turns, medians, save, table
from benchmarks.synthetic import BFLOAT16, INT8, TAP, Workload, write_cache
from cache_schema import Cache, CacheDataset, FeatureBatch, FeatureLoader, open_cache
from cache_schema.loading.sampler import EpochSampler

WORKLOADS = {"int8": INT8, "bfloat16": BFLOAT16}
BOUND = "`cache.read` into one reused buffer (the reader alone)"
REPEATS = 6  # every row of the cache, so many times in a turn


class SampleBySample(Dataset[FeatureBatch]):
    """A dataset without `__getitems__`, as most are: a DataLoader asks it for one sample at a time."""

    def __init__(self, dataset: CacheDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> FeatureBatch:
        return self.dataset[index]


def reader_alone(cache: Cache, rows: np.ndarray, batch: int) -> Iterable[Any]:
    """Batches of the reader itself, in a random order."""
    buffer = torch.empty_like(cache.read(rows[:batch], tap=TAP).payload)

    class Batches:
        def __iter__(self) -> Iterator[Any]:
            sampler = EpochSampler(rows, batch, seed=0)
            for update in range(sampler.batches_per_epoch):
                yield cache.read(sampler.batch(update), tap=TAP, out=buffer)

    return Batches()


def contenders(cache: Cache, rows: np.ndarray, batch: int, stack: ExitStack) -> dict[str, Iterable[Any]]:
    """Name → an iterable of batches; an iteration is one turn."""
    reused = CacheDataset(cache, TAP, rows=rows, batch_size=batch)
    fresh = CacheDataset(cache, TAP, rows=rows)
    plain = functools.partial(DataLoader, batch_size=batch, shuffle=True, drop_last=True, collate_fn=reused.collate)
    found: dict[str, Iterable[Any]] = {BOUND: reader_alone(cache, rows, batch)}
    for workers in (0, 1, 2):
        loader = FeatureLoader(cache, batch, TAP, rows=rows, drop_last=True, workers=workers)
        found[f"`FeatureLoader`, {workers} workers"] = stack.enter_context(loader)
    for workers in (0, 1, 2):
        options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
        found[f"`DataLoader(CacheDataset(batch_size={batch}))`, {workers} workers"] = plain(reused, **options)
        found[f"`DataLoader`, batched, fresh memory, {workers} workers"] = plain(fresh, **options)
        found[f"`DataLoader`, sample by sample, {workers} workers"] = plain(SampleBySample(fresh), **options)
    return found


def check(name: str, batches: Iterable[Any], cache: Cache, count: int) -> None:
    """Raise ValueError unless a contender delivers that many batches of what is in the cache."""
    number = 0
    for number, batch in enumerate(batches, start=1):
        if isinstance(batch, FeatureBatch) and number % 8 == 1:
            expected = cache.read(batch.rows.numpy(), tap=TAP)
            if not torch.equal(batch.payload.view(torch.uint8), expected.payload.view(torch.uint8)):
                raise ValueError(f"{name} does not deliver what is in the cache")
    if number != count:
        raise ValueError(f"{name} delivers {number} batches, not {count}")


def turn(batches: Iterable[Any]) -> None:
    """Take the batches of one epoch."""
    if isinstance(batches, FeatureLoader):
        # Start over: what was read ahead after the last turn is not to be a present for this one.
        batches.load_state_dict({**batches.state_dict(), "epoch": 0, "batch": 0})
    for _ in batches:
        pass


def measure(workload: Workload, samples: int, rounds: int, batch: int) -> dict[str, Any]:
    """Measure all on one workload; return the figures."""
    with tempfile.TemporaryDirectory(prefix="loading-") as place, ExitStack() as stack:
        cache = open_cache(write_cache(Path(place) / "cache", workload, samples))
        rows = np.tile(np.arange(samples), REPEATS)
        found = contenders(cache, rows, batch, stack)
        for name, batches in found.items():
            check(name, batches, cache, len(rows) // batch)
        turns: dict[str, Callable[[], object]] = {
            name: functools.partial(turn, batches) for name, batches in found.items()
        }
        seconds = medians(in_turns(turns, rounds))
    taken, reader = len(rows) // batch * batch, seconds[BOUND]
    loaders = [
        {"loader": name, "samples_per_second": taken / seconds[name], "of_the_reader": reader / seconds[name]}
        for name in found
    ]
    return {"workload": str(workload), "samples": samples, "batch": batch, "rounds": rounds, "loaders": loaders}


def render(result: dict[str, Any]) -> str:
    """Return the Markdown of one workload."""
    rows = [[row["loader"], row["samples_per_second"], f"{row['of_the_reader']:.2f}"] for row in result["loaders"]]
    caption = "{workload}; {samples} samples, batches of {batch}, medians of {rounds} rounds".format(**result)
    return f"{caption}.\n\n{table(['loader', 'samples/s', 'of the reader'], rows)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    parser.add_argument("--workloads", default="int8", help="of int8 and bfloat16; the latter takes 10 GB of memory")
    parser.add_argument("--samples", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--small", action="store_true", help="a tiny workload, to see that everything works")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = []
    for name in args.workloads.split(","):
        workload = Workload(name, tokens=8, channels=16) if args.small else WORKLOADS[name]
        results.append(measure(workload, args.samples, args.rounds, args.batch))
        print(render(results[-1]), flush=True)
        print()
    if not args.small:
        save("loading", {"results": results})


if __name__ == "__main__":
    main()
