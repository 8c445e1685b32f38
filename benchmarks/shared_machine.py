"""What a busy neighbour costs: refine, build, run and eval alone, and beside one process that never stops computing.

`python -m benchmarks.shared_machine`. Each command runs as a user would type it, on the demo's data, alone and beside
the neighbour, in turns; `spinning` is the same with threads that wait as OpenMP's default lets them. On two cores a
neighbour takes a third to a half of the machine, so the fair cost is 1.5 to 2 times.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.measure import save, table

# libgomp's own default, which the commands lower.
SPINNING = {"GOMP_SPINCOUNT": "300000"}
UPDATES, STEPS, IMAGES = 40, 8, 24


def commands(folder: Path) -> dict[str, list[str]]:
    """Name → the command, whose output is new at every call: `{turn}` stands for it."""
    cache = ["--cache", str(folder / "cache")]
    return {
        "refine": ["dit-cache", "refine", "--dataset", "demo", "--steps", str(STEPS), "--limit", str(IMAGES),
                   "--output", f"{folder}/{{turn}}/lora"],
        "build": ["dit-cache", "build", "--dataset", "demo", "--limit", str(IMAGES),
                  "--output", f"{folder}/{{turn}}/cache"],
        "run": ["dit-train", "run", *cache, "--preset", "demo", "--mode", "baseline", "--updates", str(UPDATES),
                "--output", f"{folder}/{{turn}}/run"],
        "eval": ["dit-train", "eval", str(folder / "run"), *cache],
    }  # fmt: skip


@contextlib.contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """One process that computes all the time, or none."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def seconds(command: list[str], environment: Mapping[str, str]) -> float:
    started = time.perf_counter()
    program = str(Path(sys.executable).parent / command[0])
    done = subprocess.run([program, *command[1:]], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return time.perf_counter() - started


def prepare(folder: Path) -> None:
    """The cache and the run that `run` and `eval` start from."""
    made = commands(folder)
    build = [part.replace("{turn}/", "") for part in made["build"]]
    build[build.index("--limit") + 1] = "200"
    seconds(build, os.environ)
    seconds([part.replace("{turn}/", "") for part in made["run"]], os.environ)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared_machine", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args(argv).rounds
    shipped = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environments = {"as shipped": shipped, "spinning": {**shipped, **SPINNING}}
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        prepare(folder)
        for turn in range(rounds):
            for name, command in commands(folder).items():
                for kind, environment in environments.items():
                    for busy in (False, True):
                        if kind == "spinning" and busy and turn:
                            continue  # minutes each: once tells enough
                        with neighbour(busy):
                            placed = [part.replace("{turn}", f"{turn}-{kind[0]}-{busy}") for part in command]
                            taken = seconds(placed, environment)
                        figures.setdefault(name, {}).setdefault(f"{kind}, {'beside' if busy else 'alone'}", []).append(
                            taken
                        )
    rows = []
    for name, ways in figures.items():
        middle = {way: statistics.median(values) for way, values in ways.items()}
        rows.append(
            (
                name,
                middle["as shipped, alone"],
                middle["as shipped, beside"] / middle["as shipped, alone"],
                middle["spinning, beside"] / middle["spinning, alone"],
                middle["as shipped, alone"] / middle["spinning, alone"],
            )
        )
    header = ("command", "alone, s", "beside / alone", "spinning, beside / alone", "alone / spinning alone")
    print(table(header, rows))
    print(f"wrote {save('shared_machine', {'seconds': figures})}")


if __name__ == "__main__":
    main()
