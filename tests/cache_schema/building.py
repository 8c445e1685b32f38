"""Tiny caches for the tests: what is in them is a pure function of the row, so that any process can check it."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
from hypothesis import HealthCheck, settings

from cache_schema import (
    Cache,
    CacheWriter,
    Curriculum,
    DatasetInfo,
    Encoding,
    FeatureBatch,
    ImagesInfo,
    Manifest,
    Provenance,
    TapInfo,
    TeacherInfo,
    create_cache,
    fingerprint_samples,
    make_samples,
    plan_manifest,
)
from cache_schema.encoding.reduction import teacher_shape
from cache_schema.errors import CacheError
from cache_schema.format.journal import file_record, read_record, write_record
from cache_schema.storage.files import digest
from cache_schema.storage.local import LocalFolder

# For property tests; `tests/conftest.py` says how the variable is used.
_EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "60"))
many_examples = settings(
    max_examples=_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# For those that build a whole cache each time.
some_examples = settings(many_examples, max_examples=max(15, _EXAMPLES // 10))

# Name to the tokens' grid after pooling, and the channels before PCA.
TAPS = {"hidden": ((2, 3), 8), "single.3": ((2, 2), 5)}
TIMESTEPS = [10, 16, 28]
VIEWS = ["canonical", "hflip"]
FEATURE_ROWS = 7
IMAGE_ROWS = 10


def tiny_samples(feature_rows: int = FEATURE_ROWS, others: int = 3, quarantined: int = 1) -> tuple[pa.Table, int]:
    """A samples table in which the quarantined and the test rows are given first, for `make_samples` to move."""
    rows: list[dict[str, Any]] = []
    total = feature_rows + others + quarantined
    for i in range(total):
        row: dict[str, Any] = {
            "id": f"sample-{i}",
            "split": "train" if i < feature_rows else "test",
            "label": i,
            "class_name": f"class {i}",
            "source": f"images/{i}.jpg",
            "sha256": hashlib.sha256(str(i).encode()).hexdigest(),
            "width": 20 + i,
            "height": 30,
            "box": [0.0, 1.5, 10.0, 20.0] if i % 2 else None,
            "caption": f"a bird, number {i}",
        }
        if i >= feature_rows + others:
            row |= {"state": "quarantined", "reason": "the file is empty", "split": "train"}
        rows.append(row)
    return make_samples(reversed(rows), ["train"])


def tiny_manifest(
    samples: pa.Table,
    feature_rows: int,
    kind: str = "float32",
    compression: str = "none",
    with_images: bool = True,
    samples_per_shard: int = 3,
    pool: int = 1,
    pca: int | None = None,
    **changes: Any,
) -> Manifest:
    """The manifest of a tiny cache with two taps, two views and three timesteps; `changes` replace its parts."""
    usable = samples["state"].to_pylist().count("ok")
    parts: dict[str, Any] = {
        "dataset": DatasetInfo(
            name="tiny",
            protocol="first half / second half",
            fingerprint=fingerprint_samples(samples),
            superclass="bird",
            counts={"train": feature_rows, "test": usable - feature_rows},
            feature_splits=["train"],
            feature_rows=feature_rows,
        ),
        "teacher": TeacherInfo(
            family="flux",
            source="/somewhere/flux",
            pipeline_class="FluxPipeline",
            digests={"transformer": "a" * 64, "vae": "b" * 64},
            dtype="bfloat16",
            resolution=48,
            text="caption",
            guidance=3.5,
        ),
        "curriculum": Curriculum(num_steps=28, timesteps=TIMESTEPS, sigmas=[0.9, 0.6, 0.05], seed=7),
        "taps": [
            TapInfo(name=name, tokens=h * w * pool**2, channels=channels, grid=(h * pool, w * pool))
            for name, ((h, w), channels) in TAPS.items()
        ],
        "encoding": Encoding(kind=kind, compression=compression, pool=pool, pca=pca),
        "views": VIEWS,
        "images": ImagesInfo(size=32, format="png") if with_images else None,
        "image_rows": usable,
        "samples_per_shard": samples_per_shard,
        "images_per_shard": 4,
    }
    return plan_manifest(**{**parts, **changes})


def features_of(rows: Iterable[int], manifest: Manifest) -> dict[str, np.ndarray]:
    """Teacher features (rows, V, T, L, C) of given rows; channel 1 is a hundred times larger than the others."""
    features = {}
    for tap in manifest.taps:
        tokens, channels = teacher_shape(tap, manifest.encoding)
        shape = (len(manifest.views), len(manifest.curriculum.timesteps), tokens, channels)
        stack = [np.random.default_rng([row, tokens]).normal(size=shape) for row in rows]
        values = np.array(stack, dtype=np.float32).reshape(-1, *shape)
        values[..., 1] *= 100
        features[tap.name] = values
    return features


def image_of(row: int) -> bytes:
    """Something to stand for the encoded image of a row; nothing here decodes it."""
    return f"image {row} ".encode() * (row * 37 % 101 + 1)


def damage(path: Path, place: int, mask: int = 1) -> None:
    """Flip bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= mask
    path.write_bytes(data)


def start(path: Path, **options: Any) -> CacheWriter:
    """Create or resume a tiny cache, calibrated."""
    samples, rows = tiny_samples(options.pop("feature_rows", FEATURE_ROWS))
    writer = create_cache(path, tiny_manifest(samples, rows, **options), samples)
    if writer.needs_calibration():
        writer.calibrate(features_of(range(min(rows, 4)), writer.manifest))
    return writer


def fill(writer: CacheWriter) -> CacheWriter:
    """Write everything that a tiny cache still lacks."""
    for shard in writer.missing_shards():
        writer.write_shard(shard, features_of(writer.shard_rows(shard), writer.manifest))
    for shard in writer.missing_image_shards():
        writer.write_images(shard, [image_of(row) for row in writer.image_rows(shard)])
    return writer


def build(path: Path, provenance: Provenance | None = None, **options: Any) -> Path:
    """Build and seal a tiny cache; return its path."""
    fill(start(path, **options)).seal(provenance)
    return path


def failures_of_two_at_once(work: Callable[[], object]) -> list[CacheError]:
    """Do the same in two threads at once, and return what went wrong."""
    failures: list[CacheError] = []

    def go() -> None:
        try:
            work()
        except CacheError as error:
            failures.append(error)

    threads = [threading.Thread(target=go) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def interrupted(work: Callable[[], object], method: str, at: str) -> None:
    """Have a method of local folders interrupt `work`, as Ctrl-C does, at the first file whose name begins so."""
    original = getattr(LocalFolder, method)

    def interrupting(folder: LocalFolder, name: str, *arguments: object) -> object:
        if name.startswith(at):
            raise KeyboardInterrupt
        return original(folder, name, *arguments)

    with mock.patch.object(LocalFolder, method, interrupting), contextlib.suppress(KeyboardInterrupt):
        work()
        raise AssertionError("nothing was interrupted")


def tree(root: Path) -> dict[str, bytes]:
    """The contents of every file under a directory."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def assert_holds_what_it_says(cache: Cache, batch: FeatureBatch, tap: str = "hidden") -> None:
    expected = cache.read(batch.rows.numpy(), tap=tap, view=batch.views.numpy())
    assert torch.equal(batch.payload.view(torch.uint8), expected.payload.view(torch.uint8))
    assert torch.equal(batch.decode(), expected.decode())


def is_in_a_slot(tensor: torch.Tensor) -> bool:
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(text, 16) for text in line.split()[0].split("-"))
        if first <= address < last:
            return "dit-distill-batches" in line
    return False


def commit_again(root: Path, kind: str, name: str) -> None:
    """Make the journal agree with a file of the layout, the calibration or the seal, as whoever forged it would."""
    record = read_record(LocalFolder(root), kind)
    assert record is not None
    files = {**record.files, name: file_record(digest((root / name).read_bytes()))}
    write_record(LocalFolder(root), record.model_copy(update={"files": files}))
