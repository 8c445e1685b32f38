"""Timing contenders in turns, tables of what came out, and JSON files that say on which machine.

A benchmark module has a `main(argv)`, prints one Markdown table per workload and saves the same figures with `save`.
"""

import functools
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cache_schema.devices import keep_freed_memory

RESULTS = Path(__file__).parent / "results"

# Does some work and returns how much of it: samples, bytes, whatever the benchmark counts.
Work = Callable[[], float]
# Called in a contender's own process; makes everything ready and returns its ways of working, by name.
Prepare = Callable[[], Mapping[str, Work]]

_VERSIONS = ("dit-distill", "numpy", "torch", "zarr", "numcodecs", "awscrt", "pyarrow")
# Modules every contender needs, imported once and inherited by all their processes.
_PRELOAD = ["numpy", "torch", "cache_schema"]


def in_turns(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Call every contender once per round and return its seconds per call, one figure for every round.

    Whatever disturbs a machine for a while then disturbs all contenders alike. Every round has an order of its own, so
    that none always profits from its neighbour. The first `warm_up` rounds are not counted; neither is `before`, which
    runs before every call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-warm_up, rounds):
        for name in shuffled_order(contenders, turn):
            before()
            started = time.perf_counter()
            contenders[name]()
            elapsed = time.perf_counter() - started
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def in_turns_apart(
    contenders: Mapping[str, Prepare], rounds: int, least_seconds: float = 0.2
) -> dict[str, dict[str, list[float]]]:
    """Let contenders work in turns, each in a process of its own, and return the work per second of every round.

    As `in_turns`, for contenders that leave threads behind or would see each other's memory. A turn repeats the work
    until `least_seconds` are over. The result is contender → way of working → one figure per round. Raises
    RuntimeError, with what the contender's process said, if one of them fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    results: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        lines: dict[str, Connection] = {}
        for name, prepare in contenders.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, prepare, least_seconds), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(ours.close)
            lines[name] = ours
            # One at a time: getting ready reads and checks data.
            results[name] = {way: [] for way in _answer(name, ours)}
        for turn in range(rounds):
            for name in shuffled_order(contenders, turn):
                for way, figures in results[name].items():
                    lines[name].send(way)
                    figures.append(_answer(name, lines[name]))
    return results


def medians(figures: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of every contender's rounds."""
    return {name: statistics.median(values) for name, values in figures.items()}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; columns that hold numbers are aligned to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [any(_is_number(row[i]) for row in cells) for i in range(len(header))]
    lines = [list(header), ["---:" if number else "---" for number in numeric], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@functools.cache
def version(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Return what a reader of the figures must know of the machine: processor, cores, memory, versions, date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _VERSIONS},
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def save(name: str, results: Mapping[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json: the results beside the machine they were measured on; return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1, ensure_ascii=False) + "\n")
    return path


def shuffled_order(contenders: Mapping[str, Any], turn: int) -> list[str]:
    """Return the names of contenders in an order of this turn's own, the same every time."""
    return random.Random(turn).sample(list(contenders), len(contenders))


def _serve(line: Connection, prepare: Prepare, least_seconds: float) -> None:
    """Work whenever asked to, and answer with the work per second, until the other end of the line closes."""
    # For tools that ask for fresh memory again and again: those that allocate a block per sample were up to six times
    # slower without.
    keep_freed_memory(largest=1 << 25)
    try:
        ways = prepare()
        line.send(list(ways))
        while True:
            way = line.recv()
            # Not counted: the contender before this one has emptied the processor's caches.
            ways[way]()
            done, started = 0.0, time.perf_counter()
            while (elapsed := time.perf_counter() - started) < least_seconds:
                done += ways[way]()
            line.send(done / elapsed)
    except EOFError:
        return
    except Exception:  # noqa: BLE001 - the parent raises it again
        line.send(RuntimeError(traceback.format_exc()))


def _answer(name: str, line: Connection) -> Any:
    try:
        answer = line.recv()
    except EOFError:
        raise RuntimeError(f"the process of {name} died") from None
    if isinstance(answer, RuntimeError):
        raise RuntimeError(f"{name} failed: {answer}")
    return answer


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "", 1).lstrip("-").split(" ")[0].isdigit()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
