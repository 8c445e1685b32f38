"""How fast the trainer can read: our reader against zarr-python and a bare pread loop, on the same files, in one run.

`python -m benchmarks.reading`. Synthetic features (T=4, 256 tokens, 768 channels, int8), random batches of 32 from the
page cache, one process; the median of several rounds, in turns, so that a noisy machine disturbs all alike.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zarr

from cache_schema import Curriculum, DatasetInfo, Encoding, TapInfo, TeacherInfo, create_cache, open_cache
from cache_schema.plan import plan_manifest
from cache_schema.samples import fingerprint_samples, samples_table

RESULTS = Path(__file__).parent / "results"
TOKENS, CHANNELS, TIMESTEPS, BATCH = 256, 768, (10, 16, 22, 28), 32


def write_cache(folder: Path, samples: int) -> None:
    """A sealed int8 cache of random features."""
    table = samples_table(
        {
            "id": f"{i:05d}",
            "split": "train",
            "label": i % 7,
            "source": f"{i}.jpg",
            "sha256": f"{i:064x}",
            "width": 8,
            "height": 8,
        }
        for i in range(samples)
    )
    manifest = plan_manifest(
        dataset=DatasetInfo(name="random", protocol="none", fingerprint=fingerprint_samples(table), superclass="thing",
                            counts={"train": samples}, feature_splits=["train"], feature_rows=samples),
        teacher=TeacherInfo(family="none", source="random", pipeline_class="none", digests={}, dtype="float32",
                            resolution=256, text="none"),
        curriculum=Curriculum(num_steps=28, timesteps=list(TIMESTEPS), sigmas=[0.8, 0.6, 0.4, 0.1], seed=0),
        taps=[TapInfo(name="hidden", tokens=TOKENS, channels=CHANNELS, grid=(16, 16))],
        encoding=Encoding(kind="int8"), views=["canonical"], images=None, image_rows=samples,
    )  # fmt: skip
    writer = create_cache(folder, manifest, table)
    rng = np.random.default_rng(0)
    shape = (1, len(TIMESTEPS), TOKENS, CHANNELS)
    writer.calibrate({"hidden": rng.standard_normal((4, *shape), dtype=np.float32)})
    for k in writer.missing_shards():
        rows = len(writer.shard_rows(k))
        writer.write_shard(k, {"hidden": rng.standard_normal((rows, *shape), dtype=np.float32)})
    writer.seal()


def contenders(folder: Path) -> dict[str, Callable[[np.ndarray], object]]:
    """Name → a function that reads one batch of rows, all timesteps."""
    cache = open_cache(folder)
    buffer = torch.empty((BATCH, len(TIMESTEPS), TOKENS, CHANNELS), dtype=torch.int8)
    array = zarr.open_array(folder / "features/hidden", mode="r")
    size = len(TIMESTEPS) * TOKENS * CHANNELS
    per_shard = cache.manifest.store.samples_per_shard
    shards = [folder / f"features/hidden/c/{k}/0/0/0/0" for k in range(cache.manifest.store.feature_shards)]
    files = [os.open(path, os.O_RDONLY) for path in shards]
    raw = memoryview(bytearray(BATCH * size))

    def bare(rows: np.ndarray) -> None:
        for i, row in enumerate(rows):
            os.preadv(files[row // per_shard], [raw[i * size : (i + 1) * size]], (row % per_shard) * size)

    return {
        "os.preadv into a reused buffer (bound)": bare,
        "cache.read into a reused buffer": lambda rows: cache.read(rows.tolist(), tap="hidden", out=buffer),
        "cache.read, one of four timesteps": lambda rows: cache.read(rows.tolist(), tap="hidden", timesteps=[28]),
        "zarr-python, z[i] per sample": lambda rows: [array[int(row)] for row in rows],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "cache"
        write_cache(folder, args.samples)
        readers = contenders(folder)
        speeds: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(args.rounds):
            batches = [rng.permutation(args.samples)[:BATCH] for _ in range(8)]
            for name, read in readers.items():
                started = time.perf_counter()
                for rows in batches:
                    read(rows)
                speeds[name].append(len(batches) * BATCH / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    bound = next(iter(medians.values()))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "reading.json").write_text(json.dumps({"samples_per_second": medians}, indent=1) + "\n")
    print("| reader | samples/s | of the bound |\n| --- | ---: | ---: |")
    for name, speed in medians.items():
        print(f"| {name} | {speed:,.0f} | {speed / bound:.2f} |")


if __name__ == "__main__":
    main()
