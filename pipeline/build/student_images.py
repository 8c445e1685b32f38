"""The student's images: every usable image, small and encoded, so that a trainer needs nothing but the cache."""

import io
from collections.abc import Sequence
from threading import Event

from PIL import Image
from tqdm import tqdm

from cache_schema.format.manifest import ImagesInfo
from cache_schema.writing.claims import Claims
from cache_schema.writing.writer import CacheWriter
from pipeline.build.config import BuildConfig
from pipeline.build.part import WHOLE, Part
from pipeline.datasets.base import Dataset
from pipeline.inputs.decoding import read_image
from pipeline.inputs.scan import ScannedSample
from pipeline.inputs.views import resize


def student_images_info(config: BuildConfig) -> ImagesInfo:
    """What a manifest says of the student's images."""
    quality = config.image_quality if config.image_format == "jpeg" else None
    return ImagesInfo(size=config.image_size, format=config.image_format, quality=quality, shape=config.image_shape)


def student_image(image: Image.Image, config: BuildConfig) -> bytes:
    """The whole image at the student's resolution, encoded."""
    buffer = io.BytesIO()
    options = {"quality": config.image_quality, "subsampling": 0} if config.image_format == "jpeg" else {}
    stored = resize(image, student_images_info(config).stored_size(*image.size))
    stored.save(buffer, format=config.image_format, **options)
    return buffer.getvalue()


def write_student_images(
    writer: CacheWriter,
    claims: Claims,
    dataset: Dataset,
    config: BuildConfig,
    usable: Sequence[ScannedSample],
    *,
    stop: Event,
    wait: bool = False,
    part: Part = WHOLE,
) -> None:
    """Write the image shards that nobody has committed or claimed; give up, between two images, once `stop` is set.

    usable: the samples that are not quarantined, in cache row order. With `wait` see `Claims.missing`. part: which of
    the shards are written here, and until when.
    """
    missing = part.of(writer.missing_image_shards())
    if not missing:
        return
    total = sum(len(writer.image_rows(k)) for k in missing)
    # Below the teacher's bar, where there is a terminal to show two.
    with tqdm(total=total, desc="student images", unit="image", position=1, leave=False, disable=None) as bar:
        # Beside the teacher they cost little, so that their own speed is not measured.
        for k in part.in_time(claims.missing("images", missing, wait=wait), 0):
            encoded = []
            for row in writer.image_rows(k):
                if stop.is_set():
                    return
                encoded.append(student_image(read_image(dataset, usable[row].sample)[0], config))
                bar.update()
            writer.write_images(k, encoded)
            claims.drop("images", k)
