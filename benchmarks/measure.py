"""Timing contenders in turns, tables of what came out, and JSON files that say on which machine.

A benchmark module has a `main(argv)`, prints one Markdown table per workload and saves the same figures with `save`.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

_VERSIONS = ("dit-distill", "numpy", "torch", "zarr", "numcodecs", "google-crc32c", "pyarrow")


def in_turns(contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Call every contender once per round and return its seconds per call, one figure for every round.

    Whatever disturbs a machine for a while then disturbs all contenders alike. Every other round runs them backwards,
    so that none always profits from its neighbour. The first `warm_up` rounds are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-warm_up, rounds):
        order = list(contenders.items())
        for name, call in order if turn % 2 == 0 else reversed(order):
            started = time.perf_counter()
            call()
            elapsed = time.perf_counter() - started
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def medians(figures: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of every contender's rounds."""
    return {name: statistics.median(values) for name, values in figures.items()}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; columns that hold numbers are aligned to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [any(_is_number(row[i]) for row in cells) for i in range(len(header))]
    lines = [list(header), ["---:" if number else "---" for number in numeric], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
