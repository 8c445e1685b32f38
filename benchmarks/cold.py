"""How fast a cache is read from a disk that has to be asked: the page cache dropped for its files before every turn.

`python -m benchmarks.reading --cold`. The bound reads the same bytes of the same files by `os.preadv`, by as many
threads as make it fastest on this disk. How many that are is found first; then it is read so again, in turns with our
reader, for the fastest of several medians owes something to chance. The reader is asked for batches of 32 one after the
other, or, as training does, ahead of the loop that takes them. Whether the pages are gone is looked up before every
turn (`mincore`).
"""

import ctypes
import functools
import mmap
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import in_turns, medians, table
from benchmarks.synthetic import TAP, Workload, write_cache
from cache_schema import Cache, CacheDataset, FeatureBatch, open_cache
from cache_schema.encoding.number_formats import Array
from cache_schema.loading.side_by_side import AT_ONCE, reading_ahead
from cache_schema.storage.buffers import empty

THREADS = (1, 2, 4, 8, 16, 32, 64)
AGAIN = "the fastest of these, again"
ONE_BY_ONE, AHEAD = "`cache.read`, a batch after the other", "batches read ahead, as `FeatureLoader` and `dit-train` do"


def drop(files: list[Path]) -> None:
    """Drop files from the page cache; raises RuntimeError where the system kept more than a hundredth of them."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # what is not on the disk yet is not dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            kept = resident(fd)
        finally:
            os.close(fd)
        if kept > 0.01:
            raise RuntimeError(f"{kept:.0%} of {path} stay in the page cache: this file system cannot be measured cold")


def resident(fd: int) -> float:
    """Return the share of a file's pages that are in the page cache."""
    size = os.fstat(fd).st_size
    if not size:
        return 0.0
    # Private, so that ctypes gets an address; no page is touched.
    with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE) as mapped:
        held = ctypes.c_char.from_buffer(mapped)
        pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        failed = ctypes.CDLL(None, use_errno=True).mincore(ctypes.byref(held), ctypes.c_size_t(size), pages)
        del held
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in bytes(pages)) / len(pages)


class Contenders:
    """Ways of reading all rows of a cache once, in batches of another random order each time."""

    def __init__(self, folder: Path, workload: Workload, samples: int, batch: int) -> None:
        self.workload, self.samples, self.batch = workload, samples, batch
        self.cache: Cache = open_cache(folder)
        store = self.cache.manifest.store
        self.paths = [path for path in (folder / "features").rglob("*") if path.is_file()]
        self._per_shard = store.samples_per_shard
        names = (folder / f"features/{TAP}/c/{k}/0/0/0/0" for k in range(store.feature_shards))
        self._files = [os.open(name, os.O_RDONLY) for name in names]
        self._out = empty((batch * workload.sample_bytes,), torch.uint8).numpy()
        self._out.fill(0)
        self._dataset = CacheDataset(self.cache, TAP, batch_size=batch, slots=AT_ONCE + 4)
        self._turn = 0

    def close(self) -> None:
        for fd in self._files:
            os.close(fd)

    def rows(self) -> Array:
        """Return the rows in an order that no turn before had."""
        self._turn += 1
        return np.random.default_rng(self._turn).permutation(self.samples)

    def bare(self, threads: int) -> None:
        """Read the bytes with nothing around the system call, by so many threads."""
        size, out = self.workload.sample_bytes, memoryview(self._out)

        def read(place: tuple[int, int]) -> None:
            shard, local = divmod(place[1], self._per_shard)
            slot = place[0] % self.batch
            os.preadv(self._files[shard], [out[slot * size : (slot + 1) * size]], local * size)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, enumerate(self.rows().tolist())))

    def reader(self) -> None:
        """Read batch after batch, every chunk checked, as is the default."""
        rows, payload = self.rows(), self._out.view(self.workload.dtype)
        for start in range(0, self.samples, self.batch):
            some = rows[start : start + self.batch]
            out = payload[: len(some) * int(np.prod(self.workload.shape))].reshape(len(some), *self.workload.shape)
            self.cache.read(some, tap=TAP, out=out)

    def ahead(self) -> None:
        """Have the batches read ahead of a loop that does nothing with them."""
        rows, views = self.rows(), np.zeros(self.batch, dtype=np.int64)
        batches = [rows[start : start + self.batch] for start in range(0, self.samples, self.batch)]

        def make(some: Array) -> FeatureBatch:
            return self._dataset.read(some, views[: len(some)])

        with reading_ahead(make, [self.cache], workers=0) as ahead:
            for _ in ahead.over(batches):
                pass


def measure(workload: Workload, samples: int, rounds: int, batch: int) -> dict[str, Any]:
    """Measure one workload; return its figures."""
    with tempfile.TemporaryDirectory(prefix="cold-") as place:
        contenders = Contenders(write_cache(Path(place) / "cache", workload, samples), workload, samples, batch)
        bare: dict[str, Callable[[], object]] = {
            f"`os.preadv`, {threads} threads": functools.partial(contenders.bare, threads) for threads in THREADS
        }
        before = functools.partial(drop, contenders.paths)
        seconds = medians(in_turns(bare, rounds, warm_up=0, before=before))
        again = bare[min(seconds, key=lambda name: seconds[name])]
        ways = {AGAIN: again, ONE_BY_ONE: contenders.reader, AHEAD: contenders.ahead}
        seconds |= medians(in_turns(ways, rounds, before=before))
        contenders.close()
    read = samples * workload.sample_bytes
    return {"workload": str(workload), "samples": samples, "batch": batch, "rounds": rounds,
            "bytes_per_second": {name: read / spent for name, spent in seconds.items()}}  # fmt: skip


def render(result: Mapping[str, Any]) -> str:
    """Return the Markdown of one workload."""
    speeds = result["bytes_per_second"]
    rows = [[name, speed / 1e6, f"{speed / speeds[AGAIN]:.2f}"] for name, speed in speeds.items()]
    return (
        f"{result['workload']}; {result['samples']} samples in batches of {result['batch']}, page cache dropped before "
        f"every turn, medians of {result['rounds']} rounds.\n\n{table(['', 'MB/s', 'of the fastest, again'], rows)}"
    )
