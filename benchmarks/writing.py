"""How fast a cache is written, side by side with a plain sequential write of the same bytes and with other tools.

`python -m benchmarks.writing`. Ready float32 features in memory go through `CacheWriter.write_shard`: checked, encoded,
checksummed, written, flushed, recorded. The bound writes the encoded bytes into as many files of the same size and
flushes each once. The other tools are given the encoded samples; they flush nothing, so their files are flushed after
them and that counts. New files every time, on one disk, in turns, medians.
"""

import argparse
import cProfile
import functools
import os
import pstats
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alternatives import WRITERS, Writer
from benchmarks.measure import in_turns, save, table, version
from benchmarks.synthetic import BFLOAT16, INT8, TAP, Workload, begin_cache, features, mapped_payloads, plan
from cache_schema import CacheWriter
from cache_schema.encoding.number_formats import Array

FLOAT32 = Workload("float32", tokens=INT8.tokens, channels=INT8.channels)
WORKLOADS = {"float32": FLOAT32, "int8": INT8, "bfloat16": BFLOAT16}
BOUND = "plain sequential write, 64 kB at a time (bound)"
WHOLE = "plain sequential write, a sample at a time"
OURS = "`CacheWriter.write_shard` of ready features"

# Where the time of a shard goes: what is done → the functions, by file and name, that do it and nothing else.
PARTS = {
    "wait for the thread that checks, encodes and measures": [("~", "<method 'acquire' of '_thread.lock' objects>")],
    "checksum": [("checksum.py", "crc32c")],
    "write": [("~", "<built-in method posix.writev>")],
    "fsync": [("~", "<built-in method posix.fsync>")],
}


def write_plain(folder: Path, samples: Sequence[Array], per_file: int, block: int) -> None:
    """Write samples one after the other, `per_file` in each file and `block` bytes at once; flush every file once."""
    folder.mkdir()
    for start in range(0, len(samples), per_file):
        with (folder / str(start)).open("wb", buffering=0) as file:
            for sample in samples[start : start + per_file]:
                data = memoryview(sample).cast("B")
                for begin in range(0, len(data), block):
                    file.write(data[begin : begin + block])
            os.fsync(file.fileno())


def write_shards(writer: CacheWriter, values: Sequence[Array]) -> None:
    """Write the shards of a cache that has none yet."""
    for shard, ready in enumerate(values):
        writer.write_shard(shard, {TAP: ready})


def write_and_flush(tool: Writer, folder: Path, workload: Workload, samples: Sequence[Array]) -> None:
    """Write samples with another tool and flush every file it made once."""
    tool.write(folder, workload, samples)
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


class _Places:
    """A folder and a begun cache that are new for every call, made outside of what is timed."""

    def __init__(self, root: Path, workload: Workload, samples: int) -> None:
        self._root, self._workload, self._samples = root, workload, samples
        self.folder = root / "tool"
        self._ballast = np.zeros(2 * workload.sample_bytes, np.uint8)

    def renew(self) -> None:
        """Throw away what the call before has written, so that every call finds the same disk and free memory."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self._root / "cache", ignore_errors=True)
        self.cache = begin_cache(self._root / "cache", self._workload, self._samples)
        # A virtual machine's host gives page-cache memory only when it is first written, which took twelve times as
        # long as the write itself: a file that is thrown away again leaves memory that the host has given already.
        write_plain(self.folder, [self._ballast] * self._samples, self._samples, len(self._ballast))
        shutil.rmtree(self.folder)


def measure(workload: Workload, shards: int, rounds: int) -> dict[str, Any]:
    """Measure all writers on one workload; return its figures."""
    with tempfile.TemporaryDirectory(prefix="writing-") as name:
        root = Path(name)
        per_shard = plan(workload, 1)[0].store.samples_per_shard
        samples = shards * per_shard
        values = [features(workload, range(k * per_shard, (k + 1) * per_shard)) for k in range(shards)]
        first = begin_cache(root / "first", workload, samples)
        write_shards(first, values)
        first.seal()
        payloads = [payload.copy() for payload in mapped_payloads(root / "first", workload)]
        places = _Places(root, workload, samples)
        tools = [tool for tool in WRITERS if version(tool.distribution)]
        contenders: dict[str, Callable[[], object]] = {
            BOUND: lambda: write_plain(places.folder, payloads, per_shard, 64 << 10),
            WHOLE: lambda: write_plain(places.folder, payloads, per_shard, workload.sample_bytes),
            OURS: lambda: write_shards(places.cache, values),
        }
        for tool in tools:
            contenders[tool.name] = functools.partial(write_and_flush, tool, places.folder, workload, payloads)
        seconds = in_turns(contenders, rounds, before=places.renew)
        places.renew()
        split = _profile(lambda: write_shards(places.cache, values))
    written = samples * workload.sample_bytes
    rows = [
        {"writer": name, "version": version(distribution) if distribution else None,
         "bytes_per_second": written / statistics.median(seconds[name]) if name in seconds else None}
        for name, distribution in [(BOUND, ""), (WHOLE, ""), (OURS, "dit-distill"),
                                   *((tool.name, tool.distribution) for tool in WRITERS)]
    ]  # fmt: skip
    return {"workload": str(workload), "samples": samples, "files": shards, "rounds": rounds, "writers": rows,
            "seconds_of_write_shard": split}  # fmt: skip


def _profile(work: Callable[[], object]) -> dict[str, float]:
    """Return the seconds that `work` spends in each of PARTS, and in all."""
    profile = cProfile.Profile()
    profile.runcall(work)
    found = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total = max(entry[3] for entry in found.values())
    seconds = {
        part: sum(entry[3] for (file, _, name), entry in found.items() if (Path(file).name, name) in functions)
        for part, functions in PARTS.items()
    }
    return {**seconds, "everything else": total - sum(seconds.values()), "in all": total}


def render(result: Mapping[str, Any]) -> str:
    """Return the Markdown of one workload: a caption, the table, and where the time of a shard goes."""
    bound = result["writers"][0]["bytes_per_second"]
    rows: list[list[object]] = []
    for row in result["writers"]:
        speed = row["bytes_per_second"]
        if speed is None:
            rows.append([row["writer"], "not installed", None, None])
        else:
            rows.append([row["writer"], row["version"], speed / 1e6, f"{speed / bound:.2f}"])
    split = result["seconds_of_write_shard"]
    shares = [[part, seconds, f"{100 * seconds / split['in all']:.0f} %"] for part, seconds in split.items()]
    return (
        f"{result['workload']}; {result['samples']} samples in {result['files']} files, medians of {result['rounds']} "
        f"rounds.\n\n{table(['writer', 'version', 'MB/s, encoded', 'of the bound'], rows)}\n\n"
        f"{table(['part of `write_shard`', 'seconds', 'share'], shares)}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.writing", description=__doc__)
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="of float32, int8 and bfloat16")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a tiny workload, to see that everything works")
    args = parser.parse_args(argv)
    results = []
    for name in args.workloads.split(","):
        workload = Workload(name, tokens=8, channels=16) if args.small else WORKLOADS[name]
        results.append(measure(workload, args.shards, args.rounds))
        print(render(results[-1]), flush=True)
        print()
    if not args.small:
        save("writing", {"results": results})


if __name__ == "__main__":
    main()
