"""The cheap job fed from a cache: page-locked memory, one batch copied ahead, decoded on the device; end to end."""

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu_check.scene import Failed, Scene
from benchmarks.synthetic import TAP, Workload, begin_cache, features
from cache_schema import Cache, ImagesInfo, TapInfo, open_cache
from cache_schema.reading import fused
from trainer.methods.settings import make_config
from trainer.runs import read_metrics
from trainer.training.loop import train

BATCH, WARM = 32, 20  # images; updates before those that are counted
WAIT = 0.1  # of the time of a step, at most, that a GPU may wait for data


def fed(scene: Scene) -> str:
    """dit-train run on features of FLUX.1 as int8: images/s, and the share of waiting, by processes and by one thread.

    The features of all rows are the same, and in the page cache: nothing is measured of a disk.
    """
    cache, student = _cache(scene)
    told = []
    for workers in ("auto", "0") if scene.real else ("0",):
        rate, wait = _train(scene, cache, student, workers)
        told.append(f"{rate:.0f} images/s, {100 * wait:.0f} % waiting for data with workers={workers}")
        if scene.real and workers == "auto" and wait > WAIT:
            raise Failed(told[0])
    if scene.real and fused._off:
        raise Failed("no kernel was compiled to decode with")
    return "; ".join(told) + f"; {_decode(scene)}"


def _train(scene: Scene, cache: Cache, student: list[str], workers: str) -> tuple[float, float]:
    """Images per second and the share of waiting of a run, after its first updates."""
    updates = WARM + 60 if scene.real else 2
    config = make_config(
        "paper", [*student, f"batch_size={BATCH if scene.real else 4}", f"updates={updates}", f"workers={workers}",
                  "checkpoint_every=0", f"log_every={10 if scene.real else 1}", f"device={scene.device}"],
        method="gcd", cache=str(cache.root),
    )  # fmt: skip
    run = scene.scratch / f"fed-{workers}"
    train(config, cache, run)
    laps = [record for record in read_metrics(run / "metrics.jsonl") if record["update"] > (WARM if scene.real else 0)]
    # Laps are of as many images each: their mean speed is the harmonic one.
    rate = len(laps) / sum(1 / lap["images_per_second"] for lap in laps)
    return rate, sum(lap["data_wait"] / lap["images_per_second"] for lap in laps) * rate / len(laps)


def _cache(scene: Scene) -> tuple[Cache, list[str]]:
    """A sealed cache with images, and the student that fits it."""
    tokens, channels, samples, side = (1024, 3072, 128, 224) if scene.real else (16, 32, 14, 32)
    folder = write_fed_cache(scene.scratch / "fed", Workload("int8", tokens, channels), samples, side)
    small = ["student.name=vit_tiny_patch16_224", "student.img_size=32", "student.patch_size=16", "student.depth=1"]
    return open_cache(folder), ["student.name=vit_base_patch16_224"] if scene.real else small


def write_fed_cache(folder: Path, workload: Workload, samples: int, side: int) -> Path:
    """Write a sealed cache whose rows have the same features and the same image (side, side); returns its folder."""
    grid = math.isqrt(workload.tokens)
    changes = {
        "images": ImagesInfo(size=side, format="png"),
        "taps": [TapInfo(name=TAP, tokens=workload.tokens, channels=workload.channels, grid=(grid, grid))],
    }
    writer = begin_cache(folder, workload, samples, **changes)
    one, picture = features(workload, [0]), io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(picture, "PNG")
    for shard in writer.missing_shards():
        writer.write_shard(shard, {TAP: np.repeat(one, len(writer.shard_rows(shard)), axis=0)})
    for shard in writer.missing_image_shards():
        writer.write_images(shard, [picture.getvalue()] * len(writer.image_rows(shard)))
    writer.seal()
    return folder


def _decode(scene: Scene) -> str:
    """One batch decoded to bfloat16 by the kernel and by several passes: the same bits, and milliseconds of each."""
    shape = (BATCH, 4, 1024, 3072) if scene.real else (2, 2, 9, 16)
    payload = torch.randint(-127, 128, shape, dtype=torch.int8, device=scene.device)
    scale = torch.rand(shape[:3], device=scene.device) / 127
    channel = torch.rand(shape[1], shape[3], device=scene.device) + 0.5
    plain = fused.scale_tokens(payload, scale, channel, torch.bfloat16)
    found = fused.scale_in_one_pass(payload, scale, channel, torch.bfloat16)
    if found is None:
        return "decoded in several passes"
    apart = (found.float() - plain.float()).abs().max().item()
    if apart > 2**-8 * plain.float().abs().max().item():
        raise Failed(f"the compiled decode is off by {apart}")
    del plain, found
    return f"a batch decoded in {_milliseconds(scene, payload, scale, channel):.2f} ms"


def _milliseconds(scene: Scene, *encoded: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        fused.scale_in_one_pass(*encoded, torch.bfloat16)
    end.record()
    scene.wait()
    return begin.elapsed_time(end) / 10
