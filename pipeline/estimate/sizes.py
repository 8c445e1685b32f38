"""What a build will cost, before anything runs: bytes on disk, bytes per second to train from, hours of teacher."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cache_schema.encoding.reduction import stored_tap
from cache_schema.errors import DitDistillError, InvalidEncoding
from cache_schema.format.card import format_bytes
from cache_schema.format.manifest import Encoding, TapInfo
from cache_schema.writing.estimate import VALUE_BYTES, chunk_bytes, estimate_size
from pipeline.build.config import BuildConfig
from pipeline.build.encoding import encoding_of
from pipeline.build.student_images import student_image
from pipeline.datasets.base import Dataset, Sample
from pipeline.inputs.conditions import captions_of
from pipeline.inputs.decoding import UNREADABLE, decode_image
from pipeline.teachers import TeacherOutline

if TYPE_CHECKING:
    from pipeline.teachers.base import AnyTeacher

# Shown beside what was asked for, so that the two strongest levers are seen: (pool, pca).
_ALTERNATIVES: tuple[tuple[int, int | None], ...] = ((1, None), (2, None), (1, 768), (2, 768))
_SAMPLED_IMAGES = 16
_CONDITION_BYTES = 2
# Bytes per pixel of square student images of photographs, measured on Stanford Cars at 224 px: JPEG at quality 95
# without chroma subsampling, and PNG. Used only where no image can be read.
_BYTES_PER_PIXEL = {"jpeg": 0.45, "png": 1.45}


@dataclass(frozen=True)
class CachePlan:
    """The cache to be estimated. rows: images that get features; image_rows: that get a student image.

    image_bytes: mean size of an encoded student image, 0 without images; image_basis: how that is known. captions: how
    many different ones are embedded.
    """

    outline: TeacherOutline
    config: BuildConfig
    rows: int
    image_rows: int
    image_bytes: float
    image_basis: str
    captions: int

    @property
    def condition_bytes(self) -> int:
        """Bytes of prompt embeddings and latents in half precision, at most: what Stage I and the build share."""
        latents = self.outline.latent_values() * 2 * len(self.config.views)  # object and context
        values = self.captions * self.outline.architecture.text_values + self.rows * latents
        return values * _CONDITION_BYTES

    @property
    def taps(self) -> list[TapInfo]:
        """The taps in the shape in which the teacher computes them; raises TeacherError for unknown ones."""
        shapes = [self.outline.tap_shape(tap) for tap in self.config.taps]
        return [TapInfo(name=s.name, tokens=s.tokens, channels=s.channels, grid=s.grid) for s in shapes]

    @property
    def encoding(self) -> Encoding:
        """The encoding asked for."""
        return encoding_of(self.config)


@dataclass(frozen=True)
class Demand:
    """What the trainer will ask of the disk. batch: rows per step; bandwidth: what the disk gives, bytes per second."""

    batch: int = 32
    steps_per_second: float = 10.0
    timesteps: tuple[int, ...] | None = None
    bandwidth: float | None = None


@dataclass(frozen=True)
class TeacherRate:
    """Images (one view, all timesteps) the teacher does per second, and how that is known."""

    images_per_second: float
    basis: str


def plan_cache(
    outline: TeacherOutline,
    config: BuildConfig,
    dataset: Dataset | None,
    count: int | None,
    *,
    captions_differ: bool = False,
) -> CachePlan:
    """Plan the cache of a data set, or of `count` images; student images are measured where the data can be read.

    captions_differ: every image will have a caption of its own, whatever the data set has now.
    """
    splits = [sample.split for sample in dataset.samples] if dataset else []
    rows = count or sum(split in config.feature_splits for split in splits)
    if dataset and not captions_differ:
        with_features = [sample for sample in dataset.samples if sample.split in config.feature_splits]
        captions = min(rows, len(set(captions_of(dataset, with_features, config.text == "caption"))))
    else:
        captions = rows if config.text == "caption" else 1
    image_bytes, basis = mean_image_bytes(dataset, config) if config.with_images else (0.0, "left out")
    return CachePlan(
        outline=outline,
        config=config,
        rows=rows,
        image_rows=(count or len(splits)) if config.with_images else 0,
        image_bytes=image_bytes,
        image_basis=basis,
        captions=captions,
    )


def mean_image_bytes(dataset: Dataset | None, config: BuildConfig) -> tuple[float, str]:
    """Mean bytes of a student image, from encoding some of the data set's own where they can be read, and the basis."""
    sizes = []
    for sample in _evenly_spaced(dataset.samples if dataset else (), _SAMPLED_IMAGES):
        assert dataset is not None
        try:
            sizes.append(len(student_image(decode_image(dataset.read(sample)), config)))
        except UNREADABLE:
            continue
    if sizes:
        return sum(sizes) / len(sizes), f"mean of {len(sizes)} images of the data set, encoded"
    per_pixel = _BYTES_PER_PIXEL[config.image_format]
    basis = f"assumed: {per_pixel} bytes per pixel, as {config.image_format} photographs at 224 px"
    # Photographs are mostly 4:3.
    pixels = config.image_size**2 * (4 / 3 if config.image_shape == "aspect" else 1)
    return per_pixel * pixels, basis


def estimate(plan: CachePlan, demand: Demand, output: Path, rate: TeacherRate | None) -> dict[str, Any]:
    """Everything there is to say about a build before it, as plain JSON values; sizes in bytes, before compression.

    Keys: `teacher` (source, family, resolution, origin), `blocks` (run, of: a pass ends at the deepest tap; None of an
    image encoder), `taps`, `views`, `timesteps`, `rows` (features, images),
    `encoding` (as asked), `image` (bytes, basis), `sizes` (per encoding, pool and pca: bytes_per_image, features,
    images, total, read_per_second; null where the shapes do not allow it), `reading` (what the bandwidth is for),
    `conditions` (bytes, captions: what is kept beside the cache while it is made), `disk` (path, free, needed, fits),
    `teacher_time` (or null), `warnings`. Raises InvalidEncoding where the one asked for does not fit the taps.
    """
    taps, encoding, outline = plan.taps, plan.encoding, plan.outline
    for tap in taps:
        stored_tap(tap, encoding)
    wanted = (encoding.pool, encoding.pca)
    reductions = [wanted, *(other for other in _ALTERNATIVES if other != wanted)]
    sizes = [
        _size(plan, encoding.model_copy(update={"kind": kind, "pool": pool, "pca": pca}), demand)
        for pool, pca in reductions
        for kind in VALUE_BYTES
    ]
    asked = next(s for s in sizes if s["kind"] == encoding.kind)
    free, needed = _free_bytes(output), asked["total"] + plan.condition_bytes
    found: dict[str, Any] = {
        "teacher": {
            "source": outline.source,
            "family": outline.architecture.family,
            "resolution": outline.resolution,
            "origin": outline.origin,
        },
        "blocks": _blocks(plan),
        "taps": [t.model_dump(mode="json", exclude={"teacher_channels"}) for t in taps],
        "views": list(plan.config.views),
        "timesteps": list(plan.config.timesteps),
        "rows": {"features": plan.rows, "images": plan.image_rows},
        "encoding": encoding.model_dump(mode="json", include={"kind", "pool", "pca"}),
        "image": {"bytes": round(plan.image_bytes), "basis": plan.image_basis},
        "sizes": sizes,
        "reading": {
            "batch": demand.batch,
            "steps_per_second": demand.steps_per_second,
            "timesteps": list(_trainer_timesteps(plan, demand)),
            "tap": _trainer_tap(taps).name,
            "needed": asked["read_per_second"],
            "given": demand.bandwidth,
        },
        "conditions": {"bytes": plan.condition_bytes, "captions": plan.captions},
        "disk": {"path": str(output), "free": free, "needed": needed, "fits": needed <= free},
        "teacher_time": _teacher_time(plan, rate),
    }
    return {**found, "warnings": _warnings(found)}


def measure_rate(teacher: "AnyTeacher", dataset: Dataset, config: "BuildConfig", count: int) -> TeacherRate:
    """Run the teacher on `count` images as the build would and time it: captions, latents and forward passes.

    Loading is not counted; one batch goes first untimed, which pays for loading kernels and filling caches.
    """
    from pipeline.build.source import source_for

    samples = _evenly_spaced([s for s in dataset.samples if s.split in config.feature_splits], count)
    if not samples:
        raise DitDistillError(
            f"nothing to measure on: {dataset.name} has no {' or '.join(config.feature_splits)} image"
        )
    schedule = teacher.sigmas(config.num_steps)
    sigmas = [schedule[p - 1] for p in config.timesteps]
    batches = [samples[i : i + config.batch_images] for i in range(0, len(samples), config.batch_images)]
    with TemporaryDirectory(prefix="dit-cache-") as folder:
        source = source_for(teacher, dataset, config, sigmas, Path(folder))
        encoding_seconds = source.prepare(samples, log=lambda _: None)

        def run(batch: Sequence[Sample]) -> None:
            for tokens in source.compute(batch, source.read(batch)).values():
                tokens.float().cpu()  # as the build does; on a GPU this also waits for the result

        run(batches[0])
        started = time.perf_counter()
        for batch in batches:
            run(batch)
        seconds = encoding_seconds + time.perf_counter() - started
    per_second = len(samples) * len(config.views) / seconds
    basis = f"measured on {teacher.device}: {len(samples)} images in batches of {len(batches[0])}"
    return TeacherRate(per_second, basis)


def _size(plan: CachePlan, encoding: Encoding, demand: Demand) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": encoding.kind, "pool": encoding.pool, "pca": encoding.pca}
    views, timesteps, taps = len(plan.config.views), len(plan.config.timesteps), plan.taps
    try:
        per_image = sum(chunk_bytes(t, encoding) for t in taps) * views * timesteps
        size = estimate_size(
            taps, encoding, views=views, timesteps=timesteps, rows=plan.rows, image_rows=plan.image_rows,
            image_bytes=plan.image_bytes, store=plan.config.store, samples_per_shard=plan.config.samples_per_shard,
        )  # fmt: skip
    except InvalidEncoding:
        names = ("bytes_per_image", "features", "images", "total", "read_per_second")
        return {**entry, **dict.fromkeys(names)}
    # A step reads one view of one tap, and at worst the student's image with it.
    per_row = chunk_bytes(_trainer_tap(taps), encoding) * len(_trainer_timesteps(plan, demand)) + plan.image_bytes
    return {
        **entry,
        "bytes_per_image": per_image,
        "features": size.features + size.overhead,
        "images": size.images,
        "total": size.total,
        "read_per_second": round(per_row * demand.batch * demand.steps_per_second),
    }


def _blocks(plan: CachePlan) -> dict[str, int] | None:
    architecture = plan.outline.architecture
    total = sum(count for _, count in architecture.blocks)
    if not total:
        return None
    return {"run": architecture.blocks_run(plan.config.taps, plan.outline.source), "of": total}


def _trainer_tap(taps: Sequence[TapInfo]) -> TapInfo:
    """The tap that the trainer reads unless told otherwise."""
    return next((tap for tap in taps if tap.name == "hidden"), taps[0])


def _trainer_timesteps(plan: CachePlan, demand: Demand) -> tuple[int, ...]:
    cached = plan.config.timesteps
    lacking = [p for p in demand.timesteps or () if p not in cached]
    if lacking:
        have = ", ".join(map(str, cached))
        raise DitDistillError(f"--trainer-timesteps {lacking[0]} would not be in the cache, which has {have}")
    return demand.timesteps or cached


def _teacher_time(plan: CachePlan, rate: TeacherRate | None) -> dict[str, Any] | None:
    if rate is None:
        return None
    passes = plan.rows * len(plan.config.views)
    return {
        "images_per_second": rate.images_per_second,
        "basis": rate.basis,
        "images": passes,
        "hours": passes / rate.images_per_second / 3600,
    }


def _free_bytes(output: Path) -> int:
    """Free space of the file system that `output` is, or will be, on."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _warnings(found: dict[str, Any]) -> list[str]:
    reading, disk = found["reading"], found["disk"]
    warnings = []
    if reading["given"] is not None and reading["needed"] > reading["given"]:
        needed, given = format_bytes(reading["needed"]), format_bytes(round(reading["given"]))
        warnings.append(
            f"training would read {needed}/s but --bandwidth gives {given}/s; {_smaller(found, reading['given'])}"
        )
    if not disk["fits"]:
        warnings.append(
            f"the cache needs {format_bytes(disk['needed'])} but {disk['path']} has {format_bytes(disk['free'])} free"
        )
    return warnings


def _smaller(found: dict[str, Any], bandwidth: float) -> str:
    """The encoding to choose among those shown, as options to type: rather fewer bits than fewer tokens or channels."""
    enough = [s for s in found["sizes"] if s["read_per_second"] is not None and s["read_per_second"] <= bandwidth]
    if not enough:
        return "cache or read fewer timesteps"
    best = min(enough, key=lambda size: (size["pool"] > 1) + (size["pca"] is not None))
    options = [f"--encoding {best['kind']}"]
    options += [f"--pool {best['pool']}"] if best["pool"] > 1 else []
    options += [f"--pca {best['pca']}"] if best["pca"] else []
    return " ".join(options) + " would do"


def _evenly_spaced(samples: Sequence[Sample], count: int) -> list[Sample]:
    taken = min(count, len(samples))
    return [samples[i * len(samples) // taken] for i in range(taken)]
