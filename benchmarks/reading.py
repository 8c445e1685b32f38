"""How fast the trainer can read, side by side with a bare pread loop and with the tools a user might pick instead.

`python -m benchmarks.reading`. Random batches of 32 samples from the page cache, one process per contender, in turns;
medians. A batch is read when its bytes lie in one array (B, T, L, C), so samples that a tool delivers one by one are
copied into one; what it takes to have them one by one is the last column. Before anything is timed, every contender's
values are compared with features encoded anew.
"""

import argparse
import functools
import itertools
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import cold
from benchmarks.alternatives import READERS, WRITERS, Batch, Read, Reader, as_array
from benchmarks.measure import Work, in_turns_apart, medians, save, table, version
from benchmarks.synthetic import BFLOAT16, INT8, TAP, Workload, encoded_features, mapped_payloads, write_cache
from cache_schema import open_cache
from cache_schema.encoding.number_formats import Array
from cache_schema.storage.buffers import empty

# From here on our own memory for batches is in huge pages.
_HUGE = 32 << 20
WORKLOADS = {"int8": INT8, "bfloat16": BFLOAT16}
CACHE, TARS = "cache", "cache-webdataset"
BOUND = "`os.preadv` into a reused buffer (bound)"
SUBSET = "`cache.read`, one of four timesteps, checksums off"


def preadv(folder: Path, workload: Workload) -> Read:
    """Read the bytes of the same shard files with nothing around the system call."""
    store = open_cache(folder).manifest.store
    files = [os.open(folder / f"features/{TAP}/c/{k}/0/0/0/0", os.O_RDONLY) for k in range(store.feature_shards)]
    size, buffers = workload.sample_bytes, _Buffers(workload)

    def read(rows: Array) -> Batch:
        out = buffers.array(len(rows))
        target = memoryview(out.reshape(-1).view(np.uint8))
        for i, row in enumerate(rows.tolist()):
            shard, local = divmod(row, store.samples_per_shard)
            os.preadv(files[shard], [target[i * size : (i + 1) * size]], local * size)
        return rows, out

    return read


def unverified(folder: Path, workload: Workload) -> Read:
    """Read with our reader and check nothing, as all the other tools do."""
    return reused(folder, workload, verify=False)


def verified(folder: Path, workload: Workload) -> Read:
    """Read with our reader as it is by default: every chunk is compared with its checksum in the journal."""
    return reused(folder, workload, verify=True)


def reused(folder: Path, workload: Workload, verify: bool) -> Read:
    """Read with our reader into memory that is used again, as a loader with pinned memory does."""
    cache, buffers = open_cache(folder, verify=verify), _Buffers(workload)

    def read(rows: Array) -> Batch:
        cache.read(rows, tap=TAP, out=buffers.array(len(rows)))
        return rows, buffers.array(len(rows))

    return read


def fresh(folder: Path, workload: Workload) -> Read:
    """Read with our reader into new memory for every batch."""
    cache = open_cache(folder, verify=False)

    def read(rows: Array) -> Batch:
        payload = cache.read(rows, tap=TAP).payload
        return rows, (payload.view(torch.int16) if payload.dtype == torch.bfloat16 else payload).numpy()

    return read


def one_timestep(folder: Path, workload: Workload) -> Read:
    """Read the last of the timesteps alone, into memory that is used again."""
    cache, steps = open_cache(folder, verify=False), workload.timesteps[-1:]
    buffers = _Buffers(Workload(workload.kind, workload.tokens, workload.channels, steps))

    def read(rows: Array) -> Batch:
        cache.read(rows, tap=TAP, timesteps=steps, out=buffers.array(len(rows)))
        return rows, buffers.array(len(rows))

    return read


def memory_map(folder: Path, workload: Workload) -> Read:
    """Map the shard files with NumPy and hand out one view per sample."""
    payloads = mapped_payloads(folder, workload)
    return lambda rows: (rows, [payloads[row] for row in rows])


OURS = [
    Reader(BOUND, "", CACHE, preadv),
    Reader("`cache.read` into a reused buffer, checksums off", "dit-distill", CACHE, unverified),
    Reader("`cache.read` into a reused buffer (default: checksums on)", "dit-distill", CACHE, verified),
    Reader("`cache.read`, WebDataset store, checksums off", "dit-distill", TARS, unverified),
    Reader("`cache.read`, WebDataset store", "dit-distill", TARS, verified),
    Reader("`cache.read`, fresh memory, checksums off", "dit-distill", CACHE, fresh),
    Reader(SUBSET, "dit-distill", CACHE, one_timestep),
    Reader("NumPy memory map, gathered", "numpy", CACHE, memory_map, lazy=True),
]


class _Buffers:
    """One batch buffer per batch size, used again and again; its memory is touched once, in advance.

    It begins at a page, as page-locked memory does, and lies in huge pages. What `np.zeros` returns begins 16 bytes
    behind a page and is filled a fifth more slowly from a file whose chunks begin at pages, because a core takes its
    reads for those of what it just wrote; and which small pages it gets makes one process slower than another.
    """

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._arrays: dict[int, Array] = {}

    def array(self, count: int) -> Array:
        if count not in self._arrays:
            nbytes = count * self._workload.sample_bytes
            values = empty((max(nbytes, _HUGE),), torch.uint8)[:nbytes].numpy().view(self._workload.dtype)
            values.fill(0)
            self._arrays[count] = values.reshape(count, *self._workload.shape)
        return self._arrays[count]


def write_store(store: str, place: Path, workload: Workload, samples: int) -> None:
    """Write the samples as our own cache in either store, or as an installed tool's store with those of our cache."""
    if store == CACHE:
        write_cache(place / store, workload, samples)
    elif store == TARS:
        write_cache(place / store, workload, samples, store="webdataset")
    else:
        writer = next(writer for writer in WRITERS if writer.distribution == store)
        writer.write(place / store, workload, mapped_payloads(place / CACHE, workload))


def prepare(reader: Reader, place: Path, workload: Workload, samples: int, batch: int) -> Mapping[str, Work]:
    """Open a reader, check that it delivers what was written, and return its ways of working."""
    read = reader.open(place / reader.store, workload)
    buffers = _Buffers(workload)
    generator = np.random.default_rng(1)

    def some_rows() -> Array:
        return generator.permutation(samples)[:batch]

    def into_one_array() -> tuple[Array, Array]:
        rows, delivered = read(some_rows())
        if isinstance(delivered, np.ndarray):
            return rows, delivered
        out = buffers.array(batch)
        for i, sample in enumerate(delivered):
            np.copyto(out[i], as_array(sample, workload))
        return rows, out

    rows, values = into_one_array()
    steps = slice(-1, None) if reader.name == SUBSET else slice(None)
    for row, value in itertools.islice(zip(rows.tolist(), values, strict=True), 3):
        expected = encoded_features(place / CACHE, workload, row)[steps]
        if not np.array_equal(value.view(expected.dtype), expected):
            raise ValueError(f"{reader.name} does not deliver what was written in row {row}")
    one_by_one = not reader.lazy and not isinstance(read(some_rows())[1], np.ndarray)
    ways: dict[str, Work] = {"batch": lambda: len(into_one_array()[0])}
    return {**ways, "one by one": lambda: len(read(some_rows())[0])} if one_by_one else ways


def bytes_from_files(place: Path, workload: Workload, samples: int, batch: int) -> dict[str, float]:
    """Return, for whole samples and for one timestep, the bytes read by system calls per byte asked for."""
    rows = np.random.default_rng(2).permutation(samples)[:batch]
    shares = {}
    for name, open_reader, parts in (("whole samples", unverified, 1), ("one timestep", one_timestep, 4)):
        read = open_reader(place / CACHE, workload)
        read(rows)
        before = _bytes_read()
        read(rows)
        shares[name] = (_bytes_read() - before) / (batch * workload.sample_bytes / parts)
    return shares


def _bytes_read() -> int:
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar:"))
    return int(line.split(":")[1])


def fits_in_memory(workload: Workload, samples: int, batch: int, readers: Sequence[Reader]) -> bool:
    """Say whether the stores of all readers, and what their processes hold, fit in the machine's memory at once."""
    stores = len({reader.store for reader in readers}) * samples * workload.sample_bytes
    # The reused batch, one that is being made, and one that a tool keeps.
    batches = 3 * len(readers) * batch * workload.sample_bytes
    return stores + batches < 0.6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compare(
    readers: Sequence[Reader], place: Path, workload: Workload, samples: int, rounds: int, batch: int, seconds: float
) -> list[dict[str, Any]]:
    """Measure readers whose stores are there, side by side with the bound, which is one of them."""
    contenders = {
        reader.name: functools.partial(prepare, reader, place, workload, samples, batch) for reader in readers
    }
    speeds = {name: medians(ways) for name, ways in in_turns_apart(contenders, rounds, seconds).items()}
    return [
        {
            "reader": reader.name,
            "version": version(reader.distribution) if reader.distribution else None,
            "bytes_per_sample": workload.sample_bytes // (len(workload.timesteps) if reader.name == SUBSET else 1),
            "samples_per_second": speeds[reader.name],
            "bound_samples_per_second": speeds[BOUND]["batch"],
        }
        for reader in readers
    ]


def measure(
    workload: Workload, samples: int, rounds: int, batch: int, seconds: float, together: bool | None = None
) -> dict[str, Any]:
    """Measure every installed reader on one workload; return its figures.

    All at once, or, where that is too much for the memory, those of one store at a time, each with the bound beside it.
    `seconds` is how long a turn lasts at least.
    """
    readers = [*OURS, *READERS]
    present = [reader for reader in readers if not reader.distribution or version(reader.distribution)]
    if together is None:
        together = fits_in_memory(workload, samples, batch, present)
    stores = list(dict.fromkeys(reader.store for reader in present))
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="reading-") as name:
        place = Path(name)
        for group in [stores] if together else [[store] for store in stores]:
            for store in group:
                write_store(store, place, workload, samples)
            beside = [reader for reader in present if reader.name == BOUND or reader.store in group]
            for row in compare(beside, place, workload, samples, rounds, batch, seconds):
                rows.setdefault(row["reader"], row)
            if CACHE in group:
                shares = bytes_from_files(place, workload, samples, batch)
            for store in group:
                # Everything is compared with our cache, and written from it.
                if store != CACHE:
                    shutil.rmtree(place / store)
    missing = {"version": None, "bytes_per_sample": workload.sample_bytes, "samples_per_second": None}
    return {"workload": str(workload), "samples": samples, "batch": batch, "rounds": rounds, "together": together,
            "bytes_read_per_byte_asked": shares,
            "readers": [rows.get(reader.name, {"reader": reader.name, **missing}) for reader in readers]}  # fmt: skip


def render(result: Mapping[str, Any]) -> str:
    """Return the Markdown of one workload: a caption, the table, and what a subset costs."""
    whole = result["readers"][0]["bytes_per_sample"]
    rows: list[list[object]] = []
    for row in result["readers"]:
        speeds = row["samples_per_second"]
        if speeds is None:
            rows.append([row["reader"], "not installed", None, None, None, None])
            continue
        rate = speeds["batch"] * row["bytes_per_sample"]
        rows.append([row["reader"], row["version"], float(speeds["batch"]), rate / 1e9,
                     f"{rate / (row['bound_samples_per_second'] * whole):.2f}", speeds.get("one by one")])  # fmt: skip
    header = ["reader", "version", "samples/s", "GB/s", "of the bound", "one by one, samples/s"]
    shares = "; ".join(f"{name} {share:.3f}" for name, share in result["bytes_read_per_byte_asked"].items())
    turns = "" if result["together"] else " One store at a time, the bound measured again beside each."
    return (
        f"{result['workload']}; {result['samples']} samples, batches of {result['batch']}, medians of "
        f"{result['rounds']} rounds.{turns}\n\n{table(header, rows)}\n\n"
        f"Bytes read from files by `cache.read` per byte asked for: {shares}."
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reading", description=__doc__)
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="of int8 and bfloat16")
    parser.add_argument("--samples", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--least-seconds", type=float, default=0.2, help="how long a contender's turn lasts at least")
    parser.add_argument(
        "--together",
        action=argparse.BooleanOptionalAction,
        help="all stores at once, or one at a time with the bound beside each; by default whether all fit in memory",
    )
    parser.add_argument("--cold", action="store_true", help="from the disk, beside bare reads (benchmarks/cold.py)")
    parser.add_argument("--small", action="store_true", help="a tiny workload, to see that everything works")
    args = parser.parse_args(argv)
    results = []
    for name in args.workloads.split(","):
        workload = Workload(name, tokens=8, channels=16) if args.small else WORKLOADS[name]
        if args.cold:
            # As many bytes of each, and six batches at least.
            alike = args.samples * WORKLOADS["int8"].sample_bytes // WORKLOADS[name].sample_bytes
            results.append(cold.measure(workload, max(alike, 6 * args.batch), args.rounds, args.batch))
            print(f"{cold.render(results[-1])}\n", flush=True)
            continue
        results.append(measure(workload, args.samples, args.rounds, args.batch, args.least_seconds, args.together))
        print(render(results[-1]), flush=True)
        print()
    if not args.small:
        save("cold" if args.cold else "reading", {"results": results})


if __name__ == "__main__":
    main()
