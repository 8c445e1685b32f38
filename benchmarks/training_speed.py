"""How much of the cheap job is the job: what feeding, the GIM, the teacher and decoding cost beside the student.

`python -m benchmarks.training_speed`. Steps that stream from a cache beside the same steps with decoded features in
memory; a distilled update beside the baseline's; the demo's teacher in the loop; a command's time to its first step;
a student's inference beside timm's network; and `dit-train embed` beside decoding alone. In one process, in turns,
medians; the first step of every turn, for which nothing was made ahead yet, is not counted.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu_check.feeding import write_fed_cache
from benchmarks.measure import save, table
from benchmarks.synthetic import Workload
from cache_schema import Cache, open_cache
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.data.batches import iterate
from trainer.data.feed import Feed
from trainer.methods.method import Moment
from trainer.methods.settings import make_config
from trainer.training.assembly import Parts, assemble
from trainer.training.step import train_step

DEMO, WIDE = "demo", "(4, 256, 768) int8"
PHOTOGRAPH = (640, 480)


class Steps:
    """The steps of one run, fed from its cache or from memory."""

    def __init__(self, config: TrainConfig, cache: Cache, kept: int) -> None:
        self.parts: Parts = assemble(config, cache)
        self.done = 0
        with closing(self._stream(kept)) as stream:
            self.memory = list(self._feed(stream))

    @property
    def images(self) -> int:
        """Images of one update, labelled or not."""
        return self.parts.batches.batch_rows

    def streamed(self, steps: int) -> float:
        """Return seconds a step, each batch read and decoded while the one before is trained on."""
        with closing(self._stream(steps + 1)) as stream:
            return self._timed(iter(self._feed(stream)), steps)

    def in_memory(self, steps: int) -> float:
        """Return seconds a step whose batch lies in memory, decoded."""
        return self._timed((self.memory[i % len(self.memory)] for i in range(steps + 1)), steps)

    def _stream(self, count: int) -> Any:
        return iterate(self.parts.batches, self.done, self.done + count, self.parts.batches.workers)

    def _feed(self, stream: Iterator[Batch]) -> Feed:
        return Feed(stream, self.parts.device, self.parts.feature_dtype, self.parts.batches.reclaim)

    def _timed(self, batches: Iterator[Batch], steps: int) -> float:
        self._step(next(batches))
        started = time.perf_counter()
        for batch in islice(batches, steps):
            self._step(batch)
            del batch
        return (time.perf_counter() - started) / steps

    def _step(self, batch: Batch) -> None:
        parts, moment = self.parts, Moment(self.done, 10_000)
        train_step(parts.method, parts.optimizer, batch, 1e-4, parts.config, moment)
        self.done += 1


def demo_cache(place: Path, images: int) -> Path:
    """Build the cache of the demo's data, of so many images of each split, and return its folder."""
    output = place / "cache"
    program = str(Path(sys.executable).parent / "dit-cache")
    subprocess.run(
        [program, "build", "--dataset", "demo", "--limit", str(images), "--output", str(output)],
        check=True, capture_output=True,
    )  # fmt: skip
    return output


def settings_of(cache: Path, method: str, extra: tuple[str, ...] = ()) -> TrainConfig:
    """Return the config of a run of the demo that keeps nothing."""
    plain = ["updates=100", "checkpoint_every=0", "validation_classes=0", *extra]
    return make_config("demo", plain, method=method, cache=str(cache))


def feeding(caches: Mapping[str, Path], steps: int, rounds: int) -> list[dict[str, Any]]:
    """Measure streaming against memory, and the distilled update against the baseline's, on every cache."""
    found = []
    for name, folder in caches.items():
        # There the labelled images alone make a step long enough.
        small = () if name == DEMO else (f"batch_size={min(16, steps * 4)}",)
        alone = () if name == DEMO else ("unlabeled_per_batch=0",)
        runs = {
            "gcd": Steps(settings_of(folder, "gcd", small + alone), open_cache(folder), kept=3),
            "baseline": Steps(settings_of(folder, "baseline", small), open_cache(folder), kept=3),
        }
        seconds: dict[str, list[float]] = {"streamed": [], "memory": [], "baseline": []}
        for turn in range(rounds):
            ways = {
                "streamed": runs["gcd"].streamed,
                "memory": runs["gcd"].in_memory,
                "baseline": runs["baseline"].in_memory,
            }
            for way in list(ways)[:: 1 if turn % 2 else -1]:
                seconds[way].append(ways[way](steps))
        each = {way: statistics.median(values) for way, values in seconds.items()}
        distilled, plain = each["memory"] / runs["gcd"].images, each["baseline"] / runs["baseline"].images
        found.append({
            "features": name, "images": runs["gcd"].images, **each, "of_baseline_per_image": distilled / plain,
            "streamed_of_memory": each["streamed"] / each["memory"],
        })  # fmt: skip
    return found


def teacher_in_the_loop(cache: Path, step: float, images: int, rounds: int) -> dict[str, float]:
    """Return what an update takes whose images go through the demo's teacher first; conditions are at hand."""
    from benchmarks.teacher_speed import DEMO as WEIGHTS
    from pipeline.build.config import BuildConfig
    from pipeline.build.source import wanted_of
    from pipeline.datasets import open_dataset
    from pipeline.inputs.condition_store import ConditionStore
    from pipeline.inputs.feature_source import teacher_features
    from pipeline.teachers import quiet_libraries
    from pipeline.teachers.flux import FluxTeacher

    quiet_libraries()
    manifest, before = open_cache(cache).manifest, _resident()
    teacher = FluxTeacher(WEIGHTS, resolution=manifest.teacher.resolution)
    dataset = open_dataset("demo", None, images)
    samples = [sample for sample in dataset.samples if sample.split == "train"][:images]
    timesteps = tuple(manifest.curriculum.timesteps)
    config = BuildConfig(taps=tuple(tap.name for tap in manifest.taps), timesteps=timesteps)
    sigmas = [teacher.sigmas(manifest.curriculum.num_steps)[p - 1] for p in timesteps]
    store = ConditionStore(cache.parent / "in-the-loop", teacher, dataset)
    store.prepare(samples)
    given = {"canonical": store.read(samples, "canonical")}
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        teacher_features(teacher, samples, given, wanted_of(config, sigmas))
        seconds.append(time.perf_counter() - started)
    forward = statistics.median(seconds[1:])
    return {"teacher_seconds": forward, "factor": (step + forward) / step, "megabytes": (_resident() - before) / 1e6}


def first_step(cache: Path, place: Path, rounds: int) -> float:
    """Return seconds from typing the demo's command to the first recorded update."""
    program = str(Path(sys.executable).parent / "dit-train")
    seconds = []
    for turn in range(rounds):
        run = place / f"first-{turn}"
        command = [program, "run", "--cache", str(cache), "--preset", "demo", "--output", str(run), "--updates", "500",
                   "--set", "log_every=1"]  # fmt: skip
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            metrics = run / "metrics.jsonl"
            while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
                time.sleep(0.01)
            seconds.append(time.perf_counter() - started)
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended before its first step")
            process.kill()
    return statistics.median(seconds)


def inference(cache: Path, seconds: float) -> dict[str, float]:
    """Return how a student's inference compares with timm's network alone, for one image and for a batch."""
    from trainer.models.student import build_student
    from trainer.reports.bench import PLAIN, STUDENT, run_bench
    from trainer.reports.bench_config import BenchConfig

    student = build_student(settings_of(cache, "baseline").student)
    bench = run_bench(student, BenchConfig(batch=32, seconds=seconds, device="cpu"), torch.device("cpu"))
    return {"one": bench.single[STUDENT].p50 / bench.single[PLAIN].p50,
            "batch": bench.batch[STUDENT].p50 / bench.batch[PLAIN].p50}  # fmt: skip


def embedding(cache: Path, place: Path, images: int, rounds: int) -> dict[str, float]:
    """Return images a second of `dit-train embed`, of decoding them alone, and of the student alone."""
    from trainer.evaluation.embed import BATCH
    from trainer.models.student import build_student
    from trainer.retrieval.embed import embed_images
    from trainer.retrieval.images import FolderImages
    from trainer.retrieval.model import Model

    folder = place / "photographs"
    _photographs(folder, images)
    student = build_student(settings_of(cache, "baseline").student).eval()
    model = Model(place / "run", student, False, torch.device("cpu"), "0" * 16)
    source = FolderImages(folder, 100)
    entries = source.entries()
    batches = [entries[start : start + BATCH] for start in range(0, len(entries), BATCH)]
    pictures = source.load(batches[0], model)
    seconds: dict[str, list[float]] = {"embed": [], "decoding": [], "student": []}
    for turn in range(rounds):
        for way in list(seconds)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            if way == "embed":
                embed_images(source, model, place / f"embedded-{turn}.parquet")
            elif way == "decoding":
                for batch in batches:
                    source.load(batch, model)
            else:
                for batch in batches:
                    model.embed([picture for picture in pictures[: len(batch)] if isinstance(picture, np.ndarray)])
            seconds[way].append(time.perf_counter() - started)
    return {way: len(entries) / statistics.median(values) for way, values in seconds.items()}


def _photographs(folder: Path, count: int) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (8, 12, 16, 3), dtype=np.uint8)
    for number in range(count):
        picture = Image.fromarray(coarse[number % len(coarse)]).resize(PHOTOGRAPH, Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:05d}.jpg", quality=90)


def _resident() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def measure(steps: int, rounds: int, images: int, small: bool) -> dict[str, Any]:
    """Measure all; return the figures."""
    place = Path(tempfile.mkdtemp(prefix="training-speed-"))
    try:
        demo = demo_cache(place, images)
        wide = Workload("int8", 16, 32) if small else Workload("int8", 256, 768)
        caches = {DEMO: demo, WIDE: write_fed_cache(place / "wide", wide, 64, 64)}
        steps_found = feeding(caches, steps, rounds)
        return {
            "steps": steps_found,
            "first_step_seconds": first_step(demo, place, rounds),
            "inference_of_timm": inference(demo, 0.2 if small else 3.0),
            "embed": embedding(demo, place, 8 if small else 400, rounds),
            "in_the_loop": teacher_in_the_loop(demo, steps_found[0]["memory"], steps_found[0]["images"], rounds),
            "threads": torch.get_num_threads(), "rounds": rounds, "load_before": os.getloadavg()[0],
        }  # fmt: skip
    finally:
        shutil.rmtree(place, ignore_errors=True)


def render(found: Mapping[str, Any]) -> str:
    """Return the Markdown: a table of steps and one of the rest."""
    rows = [
        [row["features"], row["images"], 1000 * row["streamed"], 1000 * row["memory"],
         f"{row['streamed_of_memory']:.3f}", f"{row['of_baseline_per_image']:.2f}"]
        for row in found["steps"]
    ]  # fmt: skip
    steps = table(["features", "images a step", "streamed, ms", "in memory, ms", "streamed / memory",
                   "distilled / baseline, per image"], rows)  # fmt: skip
    embed, loop = found["embed"], found["in_the_loop"]
    rest = [
        ["first step after the command, s", found["first_step_seconds"], "10"],
        ["student / timm, one image", found["inference_of_timm"]["one"], "1.1"],
        ["student / timm, batch of 32", found["inference_of_timm"]["batch"], "1.1"],
        ["an epoch with the demo's teacher in the loop / from the cache", loop["factor"], None],
        ["memory of the teacher in the loop, MB", float(loop["megabytes"]), None],
        ["`embed`, images/s", float(embed["embed"]), None],
        ["decoding alone, images/s", float(embed["decoding"]), None],
        ["student alone, images/s", float(embed["student"]), None],
    ]
    return f"{steps}\n\n{table(['', 'measured', 'goal'], rest)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_speed", description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=200, help="of each split of the demo's data")
    parser.add_argument("--small", action="store_true", help="a tiny workload, to see that everything works")
    args = parser.parse_args(argv)
    found = measure(args.steps, args.rounds, args.images, args.small)
    print(render(found))
    if not args.small:
        save("training_speed", found)


if __name__ == "__main__":
    main()
