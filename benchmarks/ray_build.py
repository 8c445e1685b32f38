"""`dit-cache build` by two Ray workers beside the local engine, undisturbed and with a worker killed.

`python -m benchmarks.ray_build`. The commands as a user would type them, on the demo's data, in turns, medians. From
the first committed shard to the last one nothing is loaded any more; what a whole command takes beyond that is Ray and
two processes that load the teacher, one after the other on two cores. A worker is killed with SIGKILL after a third of
the shards: how long until another one is there, what the command takes more, and whether a committed shard was lost.
"""

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import save, shuffled_order, table

LOCAL, RAY, KILLED = "local", "ray, 2 workers", "ray, a worker killed"
_PAUSE = 0.05


def command(output: Path, images: int, engine: str) -> list[str]:
    """Return the build's command; its captions, latents and LoRA are nobody else's."""
    program = str(Path(sys.executable).parent / "dit-cache")
    ray = ["--engine", "ray", "--workers", "2", "--gpus-per-worker", "0"]
    return [program, "build", "--dataset", "demo", "--limit", str(images), "--samples-per-shard", "8",
            "--device", "cpu", "--output", str(output / "cache"), *(ray if engine != LOCAL else [])]  # fmt: skip


def committed(output: Path) -> dict[str, int]:
    """Return the shards in the journal and when they came, in nanoseconds."""
    found = {}
    for path in (output / "cache/journal").glob("features-*.json"):
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = path.stat().st_mtime_ns
    return found


def workers(driver: int) -> set[int]:
    """Return the process ids of a driver's workers that run."""
    import psutil

    found = set()
    for child in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("ray::Worker" in part for part in child.cmdline()):
                found.add(child.pid)
    return found


def build(output: Path, images: int, engine: str) -> dict[str, float]:
    """Build once; return seconds: of the whole command, from the first commit to the last, and of a recovery."""
    shards = -(-images // 8)
    with (output / "said").open("w") as said:
        started = time.perf_counter()
        process = subprocess.Popen(command(output, images, engine), stdout=said, stderr=said)
        found: dict[str, float] = {}
        if engine == KILLED:
            found = dict(_killed(process, output, shards))
        code = process.wait()
        found["whole"] = time.perf_counter() - started
    if code:
        raise RuntimeError(f"{engine}: {(output / 'said').read_text()[-2000:]}")
    times = sorted(committed(output).values())
    found["steady"] = (times[-1] - times[0]) / 1e9 / max(1, len(times) - 1)
    return found


def _killed(process: subprocess.Popen[bytes], output: Path, shards: int) -> Iterator[tuple[str, float]]:
    """Kill a worker after a third of the shards; yield how long until another is there, and the shards lost."""
    while len(committed(output)) < shards // 3 and process.poll() is None:
        time.sleep(_PAUSE)
    before, kept = workers(process.pid), committed(output)
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    started = time.perf_counter()
    while process.poll() is None and not workers(process.pid) - before:
        time.sleep(_PAUSE)
    yield "until_another", time.perf_counter() - started
    process.wait()
    after = committed(output)
    yield "committed_lost", float(sum(after.get(name) != at for name, at in kept.items()))


def measure(images: int, rounds: int) -> dict[str, Any]:
    """Build with each engine in turns; return the medians of all figures."""
    figures: dict[str, list[dict[str, float]]] = {LOCAL: [], RAY: [], KILLED: []}
    for turn in range(rounds):
        for engine in shuffled_order(figures, turn):
            output = Path(tempfile.mkdtemp(prefix="ray-build-"))
            try:
                figures[engine].append(build(output, images, engine))
            finally:
                shutil.rmtree(output, ignore_errors=True)
    medians = {
        engine: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        for engine, turns in figures.items()
    }
    return {"images": images, "rounds": rounds, "engines": medians}


def render(result: Mapping[str, Any]) -> str:
    """Return the Markdown of all engines."""
    engines = result["engines"]
    rows = [
        [name, each["whole"], f"{each['whole'] / engines[LOCAL]['whole']:.2f}", 1000 * each["steady"],
         f"{each['steady'] / engines[LOCAL]['steady']:.2f}", each.get("until_another"),
         None if "committed_lost" not in each else int(each["committed_lost"])]
        for name, each in engines.items()
    ]  # fmt: skip
    header = ["engine", "seconds", "of local", "ms a shard, steady", "of local", "s until another worker",
              "committed shards lost"]  # fmt: skip
    return f"{result['images']} images in shards of 8; medians of {result['rounds']} rounds.\n\n{table(header, rows)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ray_build", description=__doc__)
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args(argv)
    result = measure(args.images, args.rounds)
    print(render(result))
    if not args.no_save:
        save("ray_build", result)


if __name__ == "__main__":
    main()
