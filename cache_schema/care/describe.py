"""What `dit-cache info` says about a cache: one dictionary for scripts, one text for people."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cache_schema.care.description_text import render_description
from cache_schema.encoding import fidelity
from cache_schema.errors import CacheCorrupt, CacheError
from cache_schema.format import layout
from cache_schema.format.duplicates import find_duplicates
from cache_schema.format.journal import Kind, Record, committed_shards, read_record
from cache_schema.format.layout import ArrayLayout
from cache_schema.format.manifest import Fidelity, Manifest
from cache_schema.format.manifest_file import load_manifest
from cache_schema.format.samples import check_against_manifest, count_usable, load_samples
from cache_schema.storage.folder import Folder
from cache_schema.storage.places import folder_at
from cache_schema.stores.registry import store_of


def describe(path: str | os.PathLike[str], shard_table: bool = False) -> dict[str, Any]:
    """Return everything there is to say about the cache at `path`, sealed or not, as plain JSON values.

    `path`, `state` ("sealed" or "partial"), `manifest` (the whole document), `shards` (done and total, of features and
    images), `samples_with_features`; `arrays` by name: shape, dtype and bytes on disk; `bytes` on disk: features
    (calibration included), images, total; `splits` by name: rows, rows with features, and bytes of features and images
    (a shard that holds rows of several splits is divided by rows); `fidelity` (of a partial cache, that of the shards
    so far); `quarantined` (id, reason) and `failed` (row, reason: the teacher failed on these), complete lists;
    `duplicates` (ids, classes, splits: samples of the same file, under several classes or in train and in test).
    With `shard_table` also that, one entry per shard of features and then of images: kind, shard, rows [first, last
    + 1), committed, and where it is bytes, files, cosine_min (least cosine of what was measured) and failed (rows).

    Raises CacheNotFound, UnsupportedSchema, and CacheCorrupt for a manifest, samples table or journal that is damaged.
    """
    folder = folder_at(path)
    manifest = load_manifest(folder)
    store, samples = manifest.store, _samples(folder)
    kinds: tuple[Kind, Kind] = ("features", "images")
    records: dict[str, dict[int, Record]] = {kind: _records(folder, kind) for kind in kinds}
    failed = [item for _, record in sorted(records["features"].items()) for item in record.failed]
    calibration = read_record(folder, "calibration")
    sizes = {kind: sum(map(_bytes, found.values())) for kind, found in records.items()}
    sizes["features"] += _bytes(calibration) if calibration else 0
    description = {
        "path": str(folder),
        "state": "sealed" if manifest.sealed else "partial",
        "manifest": manifest.document(),
        "shards": {
            "features": {"done": len(records["features"]), "total": store.feature_shards},
            "images": {"done": len(records["images"]), "total": store.image_shards},
        },
        "samples_with_features": sum(record.rows[1] - record.rows[0] for record in records["features"].values())
        - len(failed),
        "arrays": _arrays(manifest, records["features"]),
        "bytes": {**sizes, "total": sum(sizes.values())},
        "splits": {} if samples is None else _splits(manifest, samples, records),
        "fidelity": [item.model_dump() for item in _fidelity(manifest, records["features"])],
        "quarantined": [] if samples is None else _quarantined(samples),
        "failed": [item.model_dump() for item in failed],
        "duplicates": [] if samples is None else _duplicates(samples),
    }
    if shard_table:
        if samples is not None:
            _check_counts(folder, samples, manifest)
        description["shard_table"] = list(_shard_table(manifest, samples, records))
    return description


def describe_text(path: str | os.PathLike[str], shard_table: bool = False) -> str:
    """Return the description of the cache at `path` as plain text, without a final newline. Raises as `describe`."""
    return render_description(describe(path, shard_table))


def _samples(folder: Folder) -> pa.Table | None:
    """The samples table; None where a build died before it wrote it."""
    return load_samples(folder) if folder.exists(layout.SAMPLES_NAME) else None


def _check_counts(folder: Folder, samples: pa.Table, manifest: Manifest) -> None:
    try:
        check_against_manifest(samples, manifest)
    except CacheError as error:
        raise CacheCorrupt(f"{folder.where(layout.SAMPLES_NAME)} is not that of this cache: {error}") from error


def _records(folder: Folder, kind: Kind) -> dict[int, Record]:
    found = ((shard, read_record(folder, kind, shard)) for shard in committed_shards(folder, kind))
    return {shard: record for shard, record in found if record is not None}


def _bytes(record: Record) -> int:
    return sum(file.bytes for file in record.files.values())


def _arrays(manifest: Manifest, records: Mapping[int, Record]) -> dict[str, dict[str, Any]]:
    """Shape and type of every array and its bytes on disk; a file of several arrays is divided by their sizes."""
    store = store_of(manifest)
    arrays = layout.all_layouts(manifest)
    on_disk = dict.fromkeys((array.name for array in arrays), 0.0)
    for shard, record in records.items():
        for name, held in store.shard_files(shard).items():
            size = record.files[name].bytes if name in record.files else 0
            whole = sum(array.row_bytes for array in held)
            for array in held:
                on_disk[array.name] += size * array.row_bytes / whole
    return {array.name: _array(array, round(on_disk[array.name])) for array in arrays}


def _array(array: ArrayLayout, on_disk: int) -> dict[str, Any]:
    return {"shape": [*array.outer, *array.inner], "dtype": array.dtype, "bytes": on_disk}


def _splits(
    manifest: Manifest, samples: pa.Table, records: Mapping[str, Mapping[int, Record]]
) -> dict[str, dict[str, int]]:
    usable = samples["split"].slice(0, count_usable(samples)).to_pylist()
    here: Counter[str] = Counter()  # rows whose features are, of a build under way or a part
    for record in records["features"].values():
        failed = {item.row for item in record.failed}
        covered = enumerate(usable[slice(*record.rows)], record.rows[0])  # cut: a record may lie of its rows
        here.update(split for row, split in covered if row not in failed)
    found = {
        split: {"rows": count, "rows_with_features": here[split], "features": 0, "images": 0}
        for split, count in sorted(Counter(usable).items())
    }
    for kind, shards in records.items():
        shares: Counter[str] = Counter()
        for record in shards.values():
            held = Counter(usable[slice(*record.rows)])
            for split, count in held.items():
                shares[split] += _bytes(record) * count / held.total()  # type: ignore[assignment]
        for split, share in shares.items():
            found[split][kind] = round(share)
    return found


def _fidelity(manifest: Manifest, records: Mapping[int, Record]) -> list[Fidelity]:
    if manifest.sealed:
        return manifest.fidelity
    return fidelity.merge([item for _, record in sorted(records.items()) for item in record.fidelity])


def _quarantined(samples: pa.Table) -> list[dict[str, str]]:
    # They come last.
    return samples.slice(count_usable(samples)).select(["id", "reason"]).to_pylist()


def _duplicates(samples: pa.Table) -> list[dict[str, Any]]:
    columns = ["id", "sha256", "split", "label", "class_name", "state"]
    times = pc.value_counts(samples["sha256"])
    repeated = times.field("values").filter(pc.greater(times.field("counts"), 1))
    rows = samples.filter(pc.is_in(samples["sha256"], value_set=repeated)).select(columns).to_pylist()
    return [asdict(duplicate) for duplicate in find_duplicates(rows)]


def _shard_table(
    manifest: Manifest, samples: pa.Table | None, records: Mapping[str, Mapping[int, Record]]
) -> Iterator[dict[str, Any]]:
    store = manifest.store
    usable = 0 if samples is None else count_usable(samples)
    for kind, total, per_shard, rows in (
        ("features", store.feature_shards, store.samples_per_shard, manifest.dataset.feature_rows),
        ("images", store.image_shards, store.images_per_shard, usable),
    ):
        # Without a table that bears the manifest out, its counts, which could be in the billions, are not believed.
        honest = samples is not None and rows <= samples.num_rows
        for shard in range(total) if honest else sorted(records[kind]):
            held = layout.rows_of_shard(shard, per_shard, rows)
            record = records[kind].get(shard)
            entry: dict[str, Any] = {"kind": kind, "shard": shard, "rows": [held.start, held.stop]}
            if record is None:
                yield {**entry, "committed": False}
                continue
            yield {
                **entry,
                "committed": True,
                "bytes": _bytes(record),
                "files": len(record.files),
                "cosine_min": min((item.cosine_min for item in record.fidelity), default=None),
                "failed": [item.row for item in record.failed],
            }
