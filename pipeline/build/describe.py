"""The manifest of a build that is about to start: what it will hold, made from what."""

import pyarrow as pa

from cache_schema.errors import DitDistillError
from cache_schema.format.manifest import (
    CropsInfo,
    Curriculum,
    DatasetInfo,
    Manifest,
    TapInfo,
    TeacherInfo,
)
from cache_schema.format.samples import count_usable, fingerprint_samples
from cache_schema.writing.plan import plan_manifest
from pipeline.build.config import BuildConfig
from pipeline.build.encoding import encoding_of
from pipeline.build.student_images import student_images_info
from pipeline.datasets.base import SPLITS, Dataset
from pipeline.inputs.views import is_crop
from pipeline.teachers.base import AnyTeacher, input_of
from pipeline.teachers.weights import file_digest, lora_file


def describe_cache(teacher: AnyTeacher, dataset: Dataset, config: BuildConfig, samples: pa.Table) -> Manifest:
    """The manifest of a build that is about to start; the cache id follows from it. samples: in cache row order."""
    splits = samples.slice(0, count_usable(samples))["split"].to_pylist()
    counts = {split: splits.count(split) for split in SPLITS if split in splits}
    with_features = [s for s in counts if s in config.feature_splits]
    if not with_features:
        raise DitDistillError(f"no usable image in the splits {', '.join(config.feature_splits)} of {dataset.name}")
    shapes = [teacher.tap_shape(tap) for tap in config.taps]
    sigmas = teacher.sigmas(config.num_steps)
    images = student_images_info(config)
    any_crops = any(map(is_crop, config.views))
    return plan_manifest(
        dataset=DatasetInfo(
            name=dataset.name,
            protocol=dataset.protocol,
            fingerprint=fingerprint_samples(samples),
            superclass=dataset.superclass,
            counts=counts,
            feature_splits=with_features,
            feature_rows=sum(counts[s] for s in with_features),
            quarantined=samples.num_rows - len(splits),
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
            context=teacher.context,
            quantization=teacher.quantization,
            input=input_of(teacher),
            crop=teacher.crop,
        ),
        curriculum=Curriculum(
            num_steps=config.num_steps,
            timesteps=list(config.timesteps),
            sigmas=[sigmas[p - 1] for p in config.timesteps],
            seed=config.seed,
        ),
        taps=[TapInfo(name=s.name, tokens=s.tokens, channels=s.channels, grid=s.grid) for s in shapes],
        encoding=encoding_of(config),
        views=list(config.views),
        crops=CropsInfo(scale=config.crops_scale, ratio=config.crops_ratio) if any_crops else None,
        images=images if config.with_images else None,
        image_rows=len(splits),
        store=config.store,
        samples_per_shard=config.samples_per_shard,
        batch=config.batch_images,
    )
