"""A million images on a cluster, on paper and by simulation: objects, requests, time, cost, and where it saturates.

`python -m benchmarks.cluster`. How many objects there are and how large they are comes from the planner that a build
uses. What a worker and a trainer do in a second was measured (`benchmarks/README.md`: forward passes and training step
under "On a GPU", writing under "Writing"); a store's speed, its latency and all prices are assumptions, options with
their defaults printed beside the result. Workers compute a shard while they upload the one before and share the
store's bandwidth evenly; some of them are killed, lose what they were computing and start anew.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from benchmarks.measure import save, table
from benchmarks.synthetic import Workload, plan
from cache_schema.encoding.number_formats import Array
from cache_schema.format.layout import all_layouts

_PART = 16 << 20  # of an upload, as in cache_schema.storage.object_store
_UPLOAD_REQUESTS = 2  # besides the parts: that one begins, that it is complete
WORKLOADS = {
    "(4, 256, 768) int8": Workload("int8", tokens=256, channels=768),
    "(4, 1024, 3072) int8": Workload("int8", tokens=1024, channels=3072),
    "(4, 1024, 3072) bfloat16": Workload("bfloat16", tokens=1024, channels=3072),
}


@dataclass(frozen=True)
class Assumptions:
    """What is assumed or was measured; each is an option, its comment is where the default comes from."""

    images: int = 1_000_000
    gpus: int = 64
    images_per_second: float = 2.81  # of one GPU; FLUX.1 at 512 px, 4 timesteps, bfloat16, measured on an H200
    trained_per_second: float = 548.0  # of one GPU; ViT-B/16 with (4, 1024, 3072) int8, measured on an H200
    store: float = 10e9  # bytes a second of the object store; assumed
    link: float = 1.4e9  # bytes a second of one worker; encoding and writing int8, measured on one core
    latency: float = 0.02  # seconds of a request; assumed, as in benchmarks.remote
    uneven: float = 0.1  # how much shards differ in time, standard deviation over mean; assumed
    lost_after: float = 86_400.0  # seconds that a worker lives on average; assumed, spot machines
    restart: float = 120.0  # seconds until another computes; assumed, most of it loads the teacher
    gpu_hour: float = 2.5  # dollars; assumed
    put: float = 5e-6  # dollars a request; list price of S3, standard
    get: float = 0.4e-6  # dollars a request; list price of S3, standard
    month: float = 0.023  # dollars for a gigabyte; list price of S3, standard


@dataclass(frozen=True)
class Store:
    """What a cache is made of."""

    shards: int
    images_per_shard: int
    shard_bytes: int
    objects: int
    bytes: int
    puts: int


def stored(workload: Workload, images: int) -> Store:
    """Return what a cache of so many images is made of, without their student images, by the planner of a build."""
    # The planner wants a row of the samples table for each image: sizes of shards do not depend on their number.
    manifest, _ = plan(workload, 1)
    per_shard = manifest.store.samples_per_shard
    files = [array.row_bytes * per_shard for array in all_layouts(manifest)]
    shards = -(-images // per_shard)
    puts = sum(-(-size // _PART) + (_UPLOAD_REQUESTS if size > _PART else 0) for size in files)
    return Store(
        shards, per_shard, sum(files), shards * (len(files) + 1), sum(files) * shards, shards * (puts + 1)
    )  # each shard has a record in the journal besides


@dataclass(frozen=True)
class Built:
    """What came of a simulated build, in seconds and shares."""

    seconds: float
    computing: float
    waiting: float
    lost: float
    workers_killed: int
    store_used: float


def simulate(store: Store, given: Assumptions, seed: int = 0) -> Built:
    """Return how long a build takes, in steps of a twentieth of a shard's time."""
    random = np.random.default_rng(seed)
    gpus, mean = given.gpus, store.images_per_shard / given.images_per_second
    step = mean / 20
    left, done, clock = store.shards, 0, 0.0
    todo, backlog = np.zeros(gpus), np.zeros(gpus)  # seconds of computing, bytes to be uploaded
    busy, uploading = np.zeros(gpus, bool), np.zeros(gpus, bool)
    down, delay = np.zeros(gpus), np.zeros(gpus)  # seconds until it works again, until its upload begins
    spent = dict.fromkeys(("computing", "waiting", "lost"), 0.0)
    killed, moved = 0, 0.0
    while done < store.shards:
        idle = ~busy & (down <= 0)
        for worker in np.flatnonzero(idle)[:left]:
            todo[worker], busy[worker] = mean * max(0.1, random.normal(1, given.uneven)), True
            left -= 1
        dies = (random.random(gpus) < step / given.lost_after) & (busy | uploading)
        if dies.any():
            killed += int(dies.sum())
            # What was computed and not committed is computed again, by whoever is free.
            left += int((busy & dies).sum() + (uploading & dies).sum())
            spent["lost"] += float(
                np.where(dies & busy, np.maximum(mean - todo, 0), 0).sum() + mean * (uploading & dies).sum()
            )
            busy[dies] = uploading[dies] = False
            backlog[dies], down[dies] = 0, given.restart
        down = np.maximum(down - step, 0)
        computing = busy & (todo > 0)
        todo = np.where(computing, todo - step, todo)
        # A worker that has finished hands its shard over once the one before it is uploaded.
        over = busy & (todo <= 0) & ~uploading
        waits = busy & (todo <= 0) & uploading
        spent["computing"] += float(computing.sum()) * step
        spent["waiting"] += float(waits.sum()) * step
        busy[over], uploading[over] = False, True
        backlog[over], delay[over] = store.shard_bytes, given.latency
        rate = _fair(np.where(delay > 0, 0, backlog), step, given)
        delay = np.maximum(delay - step, 0)
        moved += float(rate.sum())
        backlog = backlog - rate
        finished = uploading & (backlog <= 1)
        uploading[finished] = False
        done += int(finished.sum())
        clock += step
    total = gpus * clock
    return Built(clock, spent["computing"] / total, spent["waiting"] / total, spent["lost"] / total, killed,
                 moved / clock / given.store)  # fmt: skip


def _fair(backlog: Array, step: float, given: Assumptions) -> Array:
    """Return the bytes that each worker moves in a step: an even share of the store, no more than link and backlog."""
    want = np.minimum(backlog, given.link * step)
    budget, active = given.store * step, want > 0
    share = np.zeros_like(want)
    while active.any() and budget > 1:
        each = budget / active.sum()
        taken = np.where(active, np.minimum(want - share, each), 0)
        share += taken
        budget -= float(taken.sum())
        active = active & (want - share > 1)
    return share


def builds(given: Assumptions, gpus: Sequence[int]) -> list[dict[str, Any]]:
    """Return one row for every workload and number of GPUs."""
    rows = []
    for name, workload in WORKLOADS.items():
        store = stored(workload, given.images)
        for count in gpus:
            with_gpus = Assumptions(**{**asdict(given), "gpus": count})
            built = simulate(store, with_gpus)
            hours = built.seconds / 3600
            rows.append({
                "workload": name, "gpus": count, "objects": store.objects, "gigabytes": store.bytes / 1e9,
                "puts": store.puts, "hours": hours, "of_ideal": _ideal(store, with_gpus) / built.seconds,
                "waiting": built.waiting, "killed": built.workers_killed, "store_used": built.store_used,
                "gpu_dollars": hours * count * given.gpu_hour, "put_dollars": store.puts * given.put,
                "month_dollars": store.bytes / 1e9 * given.month,
                "saturates_at": given.store / (given.images_per_second * store.bytes / given.images),
            })  # fmt: skip
    return rows


def _ideal(store: Store, given: Assumptions) -> float:
    return store.shards * store.images_per_shard / (given.gpus * given.images_per_second)


def trainings(given: Assumptions) -> list[dict[str, Any]]:
    """Return, for every workload, what an epoch of training by streaming asks of the store, and where that ends."""
    rows = []
    for name, workload in WORKLOADS.items():
        each = workload.sample_bytes
        rate = given.trained_per_second * each
        rows.append({
            "workload": name, "per_gpu": rate, "saturates_at": given.store / rate,
            "hours": given.images / min(given.gpus * given.trained_per_second, given.store / each) / 3600,
            "of_unbounded": min(1.0, given.store / (given.gpus * rate)),
            # A sample is a stretch of its own, fetched in blocks: one request, sometimes two.
            "get_dollars": given.images * math.ceil(each / (8 << 20)) * given.get,
            "local_bytes": given.images * each,
        })  # fmt: skip
    return rows


def render(given: Assumptions, built: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown of both tables."""
    build_rows = [
        [row["workload"], row["gpus"], row["objects"], float(row["gigabytes"]), row["puts"], row["hours"],
         row["of_ideal"], f"{row['waiting']:.0%}", row["killed"], f"{row['store_used']:.1%}", float(row["gpu_dollars"]),
         row["put_dollars"], float(row["month_dollars"])]
        for row in built
    ]  # fmt: skip
    build_header = ["features of an image", "GPUs", "objects", "GB", "PUTs", "hours", "of ideal", "wait for the store",
                    "killed", "store used", "GPUs, $", "PUTs, $", "a month, $"]  # fmt: skip
    saturating = {row["workload"]: row["saturates_at"] for row in built}
    train_rows = [
        [row["workload"], row["per_gpu"] / 1e9, float(saturating[row["workload"]]), row["saturates_at"], row["hours"],
         row["of_unbounded"], row["get_dollars"], float(row["local_bytes"] / 1e12)]
        for row in trained
    ]  # fmt: skip
    train_header = ["features of an image", "GB/s a training GPU", "building GPUs that fill the store",
                    "training GPUs that fill it", f"first epoch on {given.gpus}, hours", "of an unbounded store",
                    "GETs, $", "local copy, TB"]  # fmt: skip
    said = ", ".join(f"{key} {value:g}" for key, value in asdict(given).items())
    return f"{said}\n\n{table(build_header, build_rows)}\n\n{table(train_header, train_rows)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    for field in fields(Assumptions):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = vars(parser.parse_args(argv))
    keep = not args.pop("no_save")
    given = Assumptions(**args)
    built, trained = builds(given, [given.gpus, 64 * given.gpus]), trainings(given)
    print(render(given, built, trained))
    if keep:
        save("cluster", {"assumptions": asdict(given), "builds": built, "trainings": trained})


if __name__ == "__main__":
    main()
