"""Beginning a cache, or finding the one that was begun: of many builders that do so at once, all get the same one."""

import os

import pyarrow as pa

from cache_schema.errors import CacheCorrupt, CacheError, CacheMismatch, CacheNotFound
from cache_schema.format import layout
from cache_schema.format.identity import differing_fields
from cache_schema.format.journal import QuarantinedSample, Record, file_record, read_record, write_record
from cache_schema.format.manifest import Manifest
from cache_schema.format.manifest_file import MANIFEST_NAME, as_unsealed, load_manifest, render_manifest
from cache_schema.format.samples import (
    check_against_manifest,
    check_samples,
    count_usable,
    load_samples,
    render_samples,
)
from cache_schema.storage.files import is_aside
from cache_schema.storage.local import LocalFolder, local_folder
from cache_schema.stores.registry import store_of
from cache_schema.writing.writer import CacheWriter


def create_cache(path: str | os.PathLike[str] | LocalFolder, manifest: Manifest, samples: pa.Table) -> CacheWriter:
    """Create the cache at `path`, or continue the one that is there if it has the same cache id.

    An existing cache keeps its own shard sizes and compression, whatever `manifest` asks for; a sealed one comes back
    with nothing missing. Raises CacheMismatch where another cache, or the same with another samples table, is there;
    CacheError for a directory that holds something else; CacheStorageError where it cannot be written.
    """
    folder = path if isinstance(path, LocalFolder) else local_folder(path)
    planned = as_unsealed(manifest)
    check_samples(samples)
    check_against_manifest(samples, planned)
    existing = _establish_manifest(folder, planned)
    if existing.cache_id != planned.cache_id:
        differing = ", ".join(differing_fields(existing.document(), planned.document()))
        raise CacheMismatch(
            f"{folder} holds cache {existing.cache_id[:12]}, these inputs make cache {planned.cache_id[:12]}; they "
            f"differ in {differing}; choose another directory"
        )
    if not existing.sealed:
        folder.refuse_links()
        folder.sweep()
        _establish_layout(folder, existing, samples)
    stored = load_samples(folder)
    if not stored.equals(samples):
        difference = _first_difference(stored, samples)
        raise CacheMismatch(f"cache {folder} was begun with other samples: {difference}; choose another directory")
    try:
        check_against_manifest(stored, existing)
    except CacheError as error:
        raise CacheCorrupt(f"{folder.where(MANIFEST_NAME)} is not that of this cache: {error}") from error
    return CacheWriter(folder, existing, stored)


def continue_cache(path: str | os.PathLike[str] | LocalFolder) -> CacheWriter:
    """Return the writer of the cache that was begun at `path`; raises CacheNotFound and CacheCorrupt."""
    folder = path if isinstance(path, LocalFolder) else local_folder(path)
    manifest, stored = load_manifest(folder), load_samples(folder)
    # Of a cache elsewhere it is here then, for claims to be made on it.
    if read_record(folder, "layout") is None:
        raise CacheCorrupt(f"the journal of {folder} has no record of {layout.SAMPLES_NAME}")
    try:
        check_against_manifest(stored, manifest)
    except CacheError as error:
        raise CacheCorrupt(f"{folder.where(MANIFEST_NAME)} is not that of this cache: {error}") from error
    return CacheWriter(folder, manifest, stored)


def _establish_manifest(folder: LocalFolder, planned: Manifest) -> Manifest:
    """Return the manifest in a folder, putting `planned` there if there is none: of two builders, one wins."""
    try:
        return load_manifest(folder)
    except CacheNotFound:
        pass
    if folder.path.exists() and not folder.path.is_dir():
        raise CacheError(f"{folder} is not a directory; choose another place for the cache")
    if any(not is_aside(name) and name != MANIFEST_NAME for name in folder.names()):
        raise CacheError(f"{folder} is not empty and not a cache; choose another directory")
    folder.create()
    folder.write_new(MANIFEST_NAME, render_manifest(planned))
    return load_manifest(folder)


def _establish_layout(folder: LocalFolder, manifest: Manifest, samples: pa.Table) -> None:
    """Write the samples table and the arrays' metadata once."""
    with folder.lock():
        if read_record(folder, "layout") is not None:
            return
        documents = {**store_of(manifest).documents(), layout.SAMPLES_NAME: render_samples(samples)}
        files = {name: file_record(folder.write(name, data)) for name, data in documents.items()}
        aside = samples.slice(count_usable(samples)).select(["id", "reason"]).to_pylist()
        quarantined = [QuarantinedSample(**sample) for sample in aside]
        write_record(folder, Record(kind="layout", rows=(0, samples.num_rows), files=files, quarantined=quarantined))


def _first_difference(ours: pa.Table, theirs: pa.Table) -> str:
    if ours.num_rows != theirs.num_rows:
        return f"{ours.num_rows} rows there, {theirs.num_rows} given"
    for name in ours.column_names:
        pairs = zip(ours[name].to_pylist(), theirs[name].to_pylist(), strict=True)
        for row, (mine, other) in enumerate(pairs):
            if mine != other:
                return f"{name} of row {row} is {mine!r} there, {other!r} given"
    return "their columns"
