"""The loader: page-locked memory that worker processes fill, copied on a stream of its own."""

import time

import torch

from benchmarks.gpu_check.scene import Failed, Scene
from benchmarks.synthetic import TAP, Workload, write_cache
from cache_schema import FeatureLoader, open_cache

EPOCHS, SAMPLES, BATCH = 3, 24, 4


def pinned(scene: Scene) -> str:
    """Every batch arrives on the device as it is in the cache, while the slots are filled again and again."""
    workload = Workload("int8", tokens=1024, channels=768) if scene.real else Workload("int8", tokens=16, channels=32)
    cache = open_cache(write_cache(scene.scratch / "loader", workload, SAMPLES))
    stream = torch.cuda.Stream(scene.device) if scene.real else None
    expected = cache.read(range(SAMPLES), tap=TAP).payload
    started, count = time.perf_counter(), 0
    with FeatureLoader(cache, BATCH, TAP, workers=2, pin_memory=True) as loader:
        for _ in range(EPOCHS):
            for batch in loader:
                rows = batch.rows
                if scene.real and not batch.payload.is_pinned():
                    raise Failed("the batch is not in page-locked memory")
                with torch.cuda.stream(stream):  # None: the current one
                    moved = batch.to(scene.device, non_blocking=True).payload
                    del batch  # its slot may be filled again, though not before the copy is done
                    found = moved.cpu()
                if not torch.equal(found, expected[rows]):
                    raise Failed(f"rows {rows.tolist()} are not what the cache holds")
                count += len(rows)
    return f"{count / (time.perf_counter() - started):.0f} samples/s, all as stored"
