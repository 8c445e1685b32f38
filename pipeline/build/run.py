"""The cache build: run the frozen, refined DiT once per image, view and timestep, and write what it saw."""

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import MappingProxyType

from tqdm import tqdm

from cache_schema import create_cache
from cache_schema.care.repair import repair as mend
from cache_schema.errors import CacheError, CacheExists
from cache_schema.format.journal import committed_shards, read_record
from cache_schema.format.manifest import Manifest
from cache_schema.format.manifest_file import MANIFEST_NAME, load_manifest
from cache_schema.format.samples import samples_table
from cache_schema.sharing.catalogue import find_built
from cache_schema.storage.local import LocalFolder
from cache_schema.writing.claims import Claims
from cache_schema.writing.writer import CacheWriter
from pipeline.build.config import BuildConfig
from pipeline.build.describe import describe_cache
from pipeline.build.features import FeatureBuilder
from pipeline.build.part import WHOLE, Part, StoppedEarly
from pipeline.build.provenance import provenance_of
from pipeline.build.source import framing_of, source_for
from pipeline.build.student_images import write_student_images
from pipeline.datasets.base import Dataset
from pipeline.inputs.condition_store import default_store
from pipeline.inputs.decoded import DecodedImages
from pipeline.inputs.feature_source import FeatureSource
from pipeline.inputs.scan import ScannedSample, scan
from pipeline.inputs.tolerance import BadSamples, Tolerance
from pipeline.teachers.base import AnyTeacher, is_image_encoder
from pipeline.teachers.passes import SMALLER_ENCODER, SMALLER_TRANSFORMER, Passes
from pipeline.watchdog import known_hangs

DEFAULT_TOLERANCE = Tolerance()


def scan_for(
    dataset: Dataset,
    config: BuildConfig,
    tolerance: Tolerance,
    log: Callable[[str], None] = tqdm.write,
    hung: Mapping[str, str] = MappingProxyType({}),
) -> list[ScannedSample]:
    """Scan a data set for a build, which needs no teacher; raises TooManyBadSamples where it would stop.

    hung: id → why an image is not looked at.
    """
    bad = BadSamples(tolerance, len(dataset.samples), log)
    return scan(dataset, config.feature_splits, use_captions=config.text == "caption", bad=bad, hung=hung)


def build(
    teacher: AnyTeacher,
    dataset: Dataset,
    config: BuildConfig,
    output: Path,
    *,
    tolerance: Tolerance = DEFAULT_TOLERANCE,
    scanned: Sequence[ScannedSample] | None = None,
    repair: bool = False,
    conditions: Path | None = None,
    part: Part = WHOLE,
    elsewhere: LocalFolder | None = None,
    log: Callable[[str], None] = tqdm.write,
) -> Manifest:
    """Build, or resume, the cache of a data set at `output` and seal it once it is whole.

    A shard that is already there is not computed again, nor one that another builder of the same cache is computing.
    scanned: what `scan_for` returned, if it was called before (of `DecodedImages`, so that no image need be decoded
    again). part: which shards are built here, and until when; the manifest is that of an unsealed cache where others
    are still missing. elsewhere: the folder that is really built, by way of `output`, as of
    `cache_schema.sharing.spool`. repair: take out what is damaged first, so that exactly that is built again. Raises
    CacheMismatch if another cache is at `output`, TooManyBadSamples if the scan or the teacher finds more bad samples
    than `tolerance` allows, LowFidelity if the encoding loses more than `config.min_cosine` permits, StoppedEarly where
    the time was up.
    """
    started = time.monotonic()
    for tap in config.taps:
        teacher.tap_shape(tap)
    if scanned is None:
        dataset = DecodedImages(dataset)
        scanned = scan_for(dataset, config, tolerance, log)
    quarantined = sum(not s.ok for s in scanned)
    if quarantined:
        log(f"{quarantined} of {len(scanned)} images are quarantined; `dit-cache info` names each and why")
    writer = begin_cache(teacher, dataset, config, output, scanned, repair, log, elsewhere)
    manifest = writer.manifest
    missing = len(writer.missing_shards())
    log(f"cache {manifest.cache_id[:12]} at {writer.folder}: {missing} feature shards to compute")
    if missing or writer.missing_image_shards() or writer.needs_calibration():
        bad = BadSamples(tolerance, len(scanned), log)
        sigmas = manifest.curriculum.sigmas
        passes = Passes(
            config.batch_images,
            len(sigmas),
            adaptive=config.batch == "auto",
            advice=SMALLER_ENCODER if is_image_encoder(teacher) else SMALLER_TRANSFORMER,
            log=log,
        )
        source = source_for(teacher, dataset, config, sigmas, conditions or default_store(output), passes)
        _fill(writer, source, dataset, config, scanned, bad, part)
        if not part.waits and not _is_whole(writer, part, log):
            return writer.manifest
    sealed = writer.seal(provenance_of(teacher.device, time.monotonic() - started), min_cosine=config.min_cosine)
    log(f"sealed {writer.folder}: {sealed.dataset.feature_rows} images with features, {_megabytes(sealed)}")
    return sealed


def _stop_where_built(manifest: Manifest, output: Path, log: Callable[[str], None]) -> None:
    """Raise CacheExists where the very cache is at the team's place already, unless it is being built here."""
    if (output / MANIFEST_NAME).exists():
        return
    try:
        url = find_built(manifest.cache_id, manifest.label)
    except CacheError as error:
        log(f"note: whether this cache exists already is not known: {error}")
        return
    if url is not None:
        raise CacheExists(
            f"this cache exists: `dit-cache pull {url} {shlex.quote(str(output))}` copies it here, `dit-train run "
            f"--cache {url}` streams it; to build it all the same, unset DIT_CACHE_REMOTE"
        )


def begin_cache(
    teacher: AnyTeacher,
    dataset: Dataset,
    config: BuildConfig,
    output: Path,
    scanned: Sequence[ScannedSample],
    repair: bool = False,
    log: Callable[[str], None] = tqdm.write,
    elsewhere: LocalFolder | None = None,
) -> CacheWriter:
    """Begin a cache at `output`, or find the one that was begun; arguments and errors as of `build`."""
    framing = framing_of(teacher, config)
    table = samples_table([s.row() | s.crops(config.views, framing) for s in scanned])
    manifest = describe_cache(teacher, dataset, config, table)
    if elsewhere is None:
        _stop_where_built(manifest, output, log)
    # Another cache is not touched; create_cache refuses it.
    if repair and load_manifest(LocalFolder(output)).cache_id == manifest.cache_id:
        for found in mend(output):
            log(str(found))
    return create_cache(output if elsewhere is None else elsewhere, manifest, table)


def _fill(
    writer: CacheWriter,
    source: FeatureSource,
    dataset: Dataset,
    config: BuildConfig,
    scanned: Sequence[ScannedSample],
    bad: BadSamples,
    part: Part,
) -> None:
    """Write all that is missing: student images beside the teacher's work, which they would otherwise delay."""
    usable = [s for s in scanned if s.ok]
    quarantined = len(scanned) - len(usable)
    hung = hung_rows(writer, usable)
    bad.recount(quarantined + count_failed(writer))
    rows_of_a_shard = min(writer.manifest.store.samples_per_shard, writer.manifest.dataset.feature_rows)
    stop = Event()
    with Claims(writer.folder) as claims, ThreadPoolExecutor(1) as pool:
        images = pool.submit(write_student_images, writer, claims, dataset, config, usable, stop=stop, part=part)

        def check() -> None:
            part.check(rows_of_a_shard)
            if images.done():
                images.result()

        try:
            FeatureBuilder(writer, claims, source, config, usable, bad, check, part, hung).run()
            images.result()
            write_student_images(writer, claims, dataset, config, usable, stop=stop, wait=part.waits, part=part)
        finally:
            stop.set()
    bad.recount(quarantined + count_failed(writer))
    bad.check()


def hung_rows(writer: CacheWriter, usable: Sequence[ScannedSample]) -> dict[int, str]:
    """Row → why it is not shown to the teacher: on these it hung before."""
    hung = known_hangs(writer.root, "teacher")
    return {row: hung[entry.sample.id] for row, entry in enumerate(usable) if entry.sample.id in hung}


def _is_whole(writer: CacheWriter, part: Part, log: Callable[[str], None]) -> bool:
    """Whether nothing is missing any more; raises StoppedEarly where something of this part is."""
    features, images = writer.missing_shards(), writer.missing_image_shards()
    left = len(part.of(features)) + len(part.of(images))
    if left and part.deadline is not None:
        raise StoppedEarly(
            f"{_shards(left)} of {writer.folder} left that could not be finished in time; run the same command again"
        )
    if features or images:
        log(
            f"this part of {writer.folder} is done; {_shards(len(features) + len(images))} of others left; whoever "
            f"commits the last one seals the cache, and so does dit-cache seal {writer.folder}"
        )
    return not (features or images)


def _shards(count: int) -> str:
    return f"{count} shard" if count == 1 else f"{count} shards"


def count_failed(writer: CacheWriter) -> int:
    """The number of rows that the journal says the teacher failed on."""
    records = (read_record(writer.folder, "features", k) for k in committed_shards(writer.folder, "features"))
    return sum(len(record.failed) for record in records if record)


def _megabytes(manifest: Manifest) -> str:
    features, images = manifest.bytes_features or 0, manifest.bytes_images or 0
    return f"{features / 1e6:.1f} MB of features, {images / 1e6:.1f} MB of student images"
