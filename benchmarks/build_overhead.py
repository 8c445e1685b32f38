"""What `dit-cache build` costs beyond the teacher's own work, and whether its memory depends on the data set.

`python -m benchmarks.build_overhead`. A tiny FLUX of the real class makes the features; its output is widened to
(4, 256, 768), and every forward pass is drawn out to a fixed time per image by sleeping, as a CPU sleeps while a GPU
computes. The bound is the same teacher's own work, text encoders, VAE and DiT, on views already in memory, with nothing
read and nothing kept. Photographs are 640 x 480 JPEG files on disk. Memory is the peak of a process of its own, with a
teacher that does not sleep, so that it waits for the store whenever the store is slower.
"""

import argparse
import io
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from PIL import Image
from torch import Tensor

from benchmarks.measure import save, table
from pipeline.build.config import BuildConfig
from pipeline.build.run import build
from pipeline.datasets.base import Sample
from pipeline.inputs.conditions import read_pixels
from pipeline.refine.demo_text import build_text_encoders
from pipeline.teachers.base import TapShape, TextEmbedding
from pipeline.teachers.flux import FluxTeacher

SIDE, CHANNELS, WIDTH = 128, 768, 32
PHOTOGRAPHS = 24


class PacedTeacher(FluxTeacher):
    """A tiny FLUX with wide features whose forward passes take `seconds` per image, or as long as they take."""

    def __init__(self, folder: Path, seconds: float, timesteps: int) -> None:
        super().__init__(folder, resolution=SIDE)
        self.seconds, self.timesteps, self.images = seconds, timesteps, 0

    def tap_shape(self, tap: str) -> TapShape:
        return TapShape(tap, self.grid[0] * self.grid[1], CHANNELS, self.grid)

    def features(
        self,
        noisy: Tensor,
        context: Tensor | None,
        sigma: Tensor,
        text: TextEmbedding,
        taps: Sequence[str],
    ) -> dict[str, Tensor]:
        started = time.perf_counter()
        found = super().features(noisy, context, sigma, text, taps)
        images = len(noisy) // self.timesteps
        self.images += images
        wide = {tap: tokens.repeat(1, 1, CHANNELS // WIDTH) for tap, tokens in found.items()}
        time.sleep(max(0.0, images * self.seconds - (time.perf_counter() - started)))
        return wide


class Photographs:
    """Files in a folder, each listed as often as it takes to have `count` training images."""

    name, protocol, superclass = "photographs", "all in train", "thing"

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.samples = [
            Sample(f"{i:06d}", "train", i % 7, "", f"{i % PHOTOGRAPHS:03d}.jpg", (80.0, 60.0, 560.0, 420.0), "dataset",
                   "a thing in colours")
            for i in range(count)
        ]  # fmt: skip

    def read(self, sample: Sample) -> bytes:
        # What follows the end of a JPEG is ignored, and makes every file one of its own.
        return (self.folder / sample.source).read_bytes() + sample.id.encode()


def save_photographs(folder: Path) -> Path:
    """Write photographs-like JPEG files: smooth colours and some grain, about 100 kB each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(PHOTOGRAPHS):
        coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
        grain = rng.normal(0, 6, (480, 640, 3))
        pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=92)
        (folder / f"{i:03d}.jpg").write_bytes(buffer.getvalue())
    return folder


def save_teacher(folder: Path) -> Path:
    """Write a diffusers folder of the FLUX family, as small as it can be."""
    torch.manual_seed(0)
    clip, clip_tokenizer, t5, t5_tokenizer = build_text_encoders()
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False, scaling_factor=0.7, shift_factor=0.1,
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=WIDTH // 16,
        joint_attention_dim=96, pooled_projection_dim=64, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae, text_encoder=clip,
        tokenizer=clip_tokenizer, text_encoder_2=t5, tokenizer_2=t5_tokenizer, transformer=transformer,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def bare_seconds(teacher: PacedTeacher, dataset: Photographs, config: BuildConfig, forwarded: int) -> float:
    """Seconds of the teacher's own work: captions, latents, forward passes. Nothing is read, written or kept.

    The views of one batch, made before the clock starts, stand for all. Text encoders and VAE are loaded as in a build.
    """
    batch, views = config.batch_images, config.views
    samples = dataset.samples[:batch]
    pixels = read_pixels(dataset, samples, teacher.resolution, views)[views[0]]
    T = len(config.timesteps)
    sigma = torch.tensor(teacher.sigmas(config.num_steps))[[p - 1 for p in config.timesteps]]
    started = time.perf_counter()
    text = teacher.encode_text([samples[0].caption]).repeat(batch)
    for _ in range(len(dataset.samples) // batch):
        pairs = [teacher.encode_images(torch.stack(pair)) for pair in zip(pixels.object, pixels.context, strict=True)]
    clean, context = (torch.stack([pair[side] for pair in pairs]) for side in (0, 1))
    for _ in range(forwarded // batch):
        teacher.features(clean.repeat_interleave(T, 0), context, sigma.repeat(batch), text, config.taps)
    return time.perf_counter() - started


def measure(place: Path, images: int, seconds: float, encoding: Any, output: str) -> dict[str, float]:
    """Build once, and let the teacher do as much alone if it is paced. bytes are peaks of the whole process."""
    torch.set_num_threads(1)
    config = BuildConfig(batch=8, encoding=encoding)
    teacher = PacedTeacher(place / "teacher", seconds, len(config.timesteps))
    dataset = Photographs(place / "photographs", images)
    before = _peak()
    started = time.perf_counter()
    # Captions and latents of its own, or only the first of all builds would encode any.
    conditions = place / f"{output}-conditions"
    manifest = build(teacher, dataset, config, place / output, conditions=conditions, log=lambda line: None)
    took = time.perf_counter() - started
    found = {"images": images, "forwarded": teacher.images, "seconds": took, "peak_bytes": _peak(),
             "peak_bytes_before": before, "feature_bytes": manifest.bytes_features or 0}  # fmt: skip
    if seconds:
        found["bare_seconds"] = bare_seconds(teacher, dataset, config, teacher.images)
    return found


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--images-per-second", type=float, default=5.0)
    args = parser.parse_args(argv)
    context = multiprocessing.get_context("spawn")
    speed = args.images_per_second
    runs = [
        (encoding, images, pace)
        for encoding in ("int8", "bfloat16")
        for images, pace in ((args.images, 1 / speed), (args.images, 0.0), (4 * args.images, 0.0))
    ]
    results = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        save_photographs(place / "photographs")
        save_teacher(place / "teacher")
        for i, (encoding, images, pace) in enumerate(runs):
            with context.Pool(1) as pool:
                found = pool.apply(measure, (place, images, pace, encoding, f"cache-{i}"))
            results.append({"encoding": encoding, "images_per_second": speed if pace else None} | found)
    print(f"Overhead of a build, teacher at {speed:g} images/s, features (4, 256, {CHANNELS})\n")
    print(table(
        ["encoding", "images forwarded (64 to calibrate int8)", "teacher alone, s", "build, s", "overhead"],
        [(r["encoding"], r["forwarded"], f"{r['bare_seconds']:.1f}", f"{r['seconds']:.1f}",
          f"{100 * (r['seconds'] / r['bare_seconds'] - 1):.1f} %") for r in results if r["images_per_second"]],
    ))  # fmt: skip
    print("\nPeak memory of a build, teacher as fast as it can\n")
    print(table(
        ["encoding", "images", "features, MB", "images/s", "loaded, MB", "peak, MB"],
        [(r["encoding"], r["images"], f"{r['feature_bytes'] / 1e6:.0f}", f"{r['images'] / r['seconds']:.1f}",
          f"{r['peak_bytes_before'] / 1e6:.0f}", f"{r['peak_bytes'] / 1e6:.0f}")
         for r in results if not r["images_per_second"]],
    ))  # fmt: skip
    save("build_overhead", {"features": [4, 256, CHANNELS], "runs": results})


if __name__ == "__main__":
    main()
