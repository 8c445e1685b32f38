"""The cache build: run the frozen, refined DiT once per image, view and timestep, and write what it saw."""

import io
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cache_schema import create_cache
from cache_schema.errors import DitDistillError
from cache_schema.manifest import (
    Compression,
    Curriculum,
    DatasetInfo,
    Encoding,
    EncodingKind,
    ImagesInfo,
    Manifest,
    Provenance,
    TapInfo,
    TeacherInfo,
)
from cache_schema.plan import plan_manifest
from cache_schema.samples import fingerprint_samples, samples_table
from cache_schema.writer import CacheWriter
from pipeline.conditions import decode_image, encode_conditions
from pipeline.curriculum import DEFAULT_STEPS, DEFAULT_TIMESTEPS, add_noise, check_timesteps, sample_noise
from pipeline.datasets.base import SPLITS, Dataset, Sample
from pipeline.scan import ScannedSample, scan
from pipeline.teachers.base import Teacher
from pipeline.teachers.lora import lora_file
from pipeline.teachers.weights import file_digest
from pipeline.views import VIEWS, resize_square

_CALIBRATION_IMAGES = 64
_VERSIONED = ("dit-distill", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")


@dataclass(frozen=True)
class BuildConfig:
    """What to cache and how. taps, timesteps, views and splits as in the manifest; batch counts images per forward."""

    taps: tuple[str, ...] = ("hidden",)
    timesteps: tuple[int, ...] = DEFAULT_TIMESTEPS
    num_steps: int = DEFAULT_STEPS
    views: tuple[str, ...] = ("canonical",)
    feature_splits: tuple[str, ...] = ("train", "unlabeled")
    encoding: EncodingKind = "int8"
    compression: Compression = "none"
    seed: int = 0
    text: Literal["caption", "none"] = "caption"
    batch: int = 8
    image_size: int = 224
    image_format: Literal["jpeg", "png"] = "jpeg"
    image_quality: int = 95
    with_images: bool = True
    samples_per_shard: int | None = None

    def __post_init__(self) -> None:
        check_timesteps(list(self.timesteps), self.num_steps)
        for value, known, option in (
            (self.views, VIEWS, "--views"),
            (self.feature_splits, SPLITS, "--features"),
        ):
            unknown = [v for v in value if v not in known]
            if unknown or not value or len(set(value)) != len(value):
                raise DitDistillError(f"{option} {','.join(value)}: name one or more of {', '.join(known)}, each once")
        if len(set(self.taps)) != len(self.taps) or not self.taps:
            raise DitDistillError(f"--taps {','.join(self.taps)}: name at least one tap, each once")
        for name in ("batch", "image_size"):
            if getattr(self, name) < 1:
                raise DitDistillError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")


def build(
    teacher: Teacher,
    dataset: Dataset,
    config: BuildConfig,
    output: Path,
    *,
    log: Callable[[str], None] = print,
) -> Manifest:
    """Build, or resume, the cache of a data set at `output` and seal it.

    A shard that is already there is not computed again. Raises CacheMismatch if another cache is at `output`.
    """
    started = time.monotonic()
    for tap in config.taps:
        teacher.tap_shape(tap)
    scanned = scan(dataset, config.feature_splits)
    usable = [s for s in scanned if s.ok]
    bad = [s for s in scanned if not s.ok]
    for entry in bad[:5]:
        log(f"quarantined {entry.sample.source}: {entry.reason}")
    if bad:
        log(f"{len(bad)} of {len(scanned)} images are quarantined; samples.parquet names each and why")
    table = samples_table([s.row() for s in scanned])
    manifest = describe_cache(teacher, dataset, config, table)
    writer = create_cache(output, manifest, table)
    log(f"cache {manifest.cache_id[:12]} at {output}: {len(writer.missing_shards())} feature shards to compute")
    if config.with_images:
        _write_images(writer, dataset, config, usable)
    _write_features(writer, teacher, dataset, config, usable)
    sealed = writer.seal(provenance=_provenance(teacher, time.monotonic() - started))
    log(f"sealed {output}: {sealed.dataset.feature_rows} images with features, {_megabytes(sealed)}")
    return sealed


def describe_cache(teacher: Teacher, dataset: Dataset, config: BuildConfig, samples: pa.Table) -> Manifest:
    """The manifest of a build that is about to start; the cache id follows from it. samples: in cache row order."""
    splits = [
        s for s, state in zip(*(samples[c].to_pylist() for c in ("split", "state")), strict=True) if state == "ok"
    ]
    counts = {split: splits.count(split) for split in SPLITS if split in splits}
    with_features = [s for s in counts if s in config.feature_splits]
    if not with_features:
        raise DitDistillError(f"no usable image in the splits {', '.join(config.feature_splits)} of {dataset.name}")
    shapes = [teacher.tap_shape(tap) for tap in config.taps]
    sigmas = teacher.sigmas(config.num_steps)
    quality = config.image_quality if config.image_format == "jpeg" else None
    images = ImagesInfo(size=config.image_size, format=config.image_format, quality=quality)
    return plan_manifest(
        dataset=DatasetInfo(
            name=dataset.name,
            protocol=dataset.protocol,
            fingerprint=fingerprint_samples(samples),
            superclass=dataset.superclass,
            counts=counts,
            feature_splits=with_features,
            feature_rows=sum(counts[s] for s in with_features),
        ),
        teacher=TeacherInfo(
            family=teacher.family,
            source=teacher.source,
            revision=teacher.revision,
            pipeline_class=teacher.pipeline_class,
            digests=teacher.digests(),
            lora_digest=file_digest(lora_file(teacher.lora)) if teacher.lora else None,
            dtype=str(teacher.dtype).removeprefix("torch."),
            resolution=teacher.resolution,
            text=config.text,
            guidance=teacher.guidance,
        ),
        curriculum=Curriculum(
            num_steps=config.num_steps,
            timesteps=list(config.timesteps),
            sigmas=[sigmas[p - 1] for p in config.timesteps],
            seed=config.seed,
        ),
        taps=[TapInfo(name=s.name, tokens=s.tokens, channels=s.channels, grid=s.grid) for s in shapes],
        encoding=Encoding(kind=config.encoding, compression=config.compression),
        views=list(config.views),
        images=images if config.with_images else None,
        image_rows=len(splits),
        samples_per_shard=config.samples_per_shard,
    )


def student_image(image: Image.Image, config: BuildConfig) -> bytes:
    """The whole image at the student's resolution, encoded."""
    buffer = io.BytesIO()
    options = {"quality": config.image_quality, "subsampling": 0} if config.image_format == "jpeg" else {}
    resize_square(image, config.image_size).save(buffer, format=config.image_format, **options)
    return buffer.getvalue()


def _write_images(writer: CacheWriter, dataset: Dataset, config: BuildConfig, usable: Sequence[ScannedSample]) -> None:
    missing = writer.missing_image_shards()
    with tqdm(total=sum(len(writer.image_rows(k)) for k in missing), desc="student images", unit="image") as bar:
        for k in missing:
            encoded = []
            for row in writer.image_rows(k):
                encoded.append(student_image(decode_image(dataset.read(usable[row].sample)), config))
                bar.update()
            writer.write_images(k, encoded)


@torch.no_grad()
def teacher_features(
    teacher: Teacher,
    dataset: Dataset,
    samples: Sequence[Sample],
    config: BuildConfig,
    sigmas: Sequence[float],
) -> dict[str, Tensor]:
    """E_{O,t} of a batch of samples: {tap: (B, V, T, L, C)}; all timesteps of an image go through the DiT together."""
    B, T = len(samples), len(sigmas)
    per_view: dict[str, list[Tensor]] = {tap: [] for tap in config.taps}
    for view in config.views:
        conditions = encode_conditions(teacher, dataset, samples, view, use_captions=config.text == "caption")
        shape = tuple(conditions.object.shape[1:])
        noise = torch.stack([sample_noise(s.id, view, config.seed, shape) for s in samples]).to(conditions.object)
        sigma = torch.tensor(list(sigmas)).repeat(B).to(conditions.object.device)  # B·T, timesteps fastest
        noisy = add_noise(conditions.object.repeat_interleave(T, 0), noise.repeat_interleave(T, 0), sigma)
        context = conditions.context.repeat_interleave(T, 0)
        found = teacher.features(noisy, context, sigma, conditions.text.repeat(T), config.taps)
        for tap, tokens in found.items():
            per_view[tap].append(tokens.unflatten(0, (B, T)))  # B, T, L, C
    return {tap: torch.stack(parts, dim=1) for tap, parts in per_view.items()}


def _write_features(
    writer: CacheWriter,
    teacher: Teacher,
    dataset: Dataset,
    config: BuildConfig,
    usable: Sequence[ScannedSample],
) -> None:
    missing = writer.missing_shards()
    if not missing and not writer.needs_calibration():
        return
    sigmas = writer.manifest.curriculum.sigmas
    rows = writer.manifest.dataset.feature_rows

    def batches(chosen: Sequence[int], bar: tqdm) -> Iterator[dict[str, Tensor]]:
        # Batches start at the shard's first row, so what a shard holds never depends on where an earlier run stopped.
        for start in range(0, len(chosen), config.batch):
            batch = [usable[r].sample for r in chosen[start : start + config.batch]]
            features = teacher_features(teacher, dataset, batch, config, sigmas)
            yield {tap: tokens.float().cpu() for tap, tokens in features.items()}
            bar.update(len(batch))

    if writer.needs_calibration():
        spread = sorted({round(i * (rows - 1) / (_CALIBRATION_IMAGES - 1)) for i in range(_CALIBRATION_IMAGES)})
        with tqdm(total=len(spread), desc="calibrate", unit="image") as bar:
            writer.calibrate(batches(spread, bar))
    total = sum(len(writer.shard_rows(k)) for k in missing)
    # One shard is encoded and written while the next is computed; never more than one waits.
    with ThreadPoolExecutor(1) as pool, tqdm(total=total, desc="teacher", unit="image") as bar:
        pending: Future[None] | None = None
        for k in missing:
            parts = list(batches(writer.shard_rows(k), bar))
            features = {tap: torch.cat([part[tap] for part in parts]) for tap in config.taps}
            if pending:
                pending.result()
            pending = pool.submit(writer.write_shard, k, features)
        if pending:
            pending.result()


def _provenance(teacher: Teacher, seconds: float) -> Provenance:
    device = (
        torch.cuda.get_device_name(teacher.device) if teacher.device.type == "cuda" else platform.processor() or "cpu"
    )
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={name: metadata.version(name) for name in _VERSIONED} | {"python": platform.python_version()},
        device=device,
        seconds=round(seconds, 1),
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )


def _megabytes(manifest: Manifest) -> str:
    features, images = manifest.bytes_features or 0, manifest.bytes_images or 0
    return f"{features / 1e6:.1f} MB of features, {images / 1e6:.1f} MB of student images"
