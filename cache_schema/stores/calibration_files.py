"""The files of the statistics that an encoding rests on: read exactly as they were committed, and committed once."""

from collections.abc import Mapping

from cache_schema.encoding.codec import TapCodec
from cache_schema.encoding.massive import ChannelTreatment
from cache_schema.encoding.number_formats import Array
from cache_schema.encoding.reduction import PrincipalComponents
from cache_schema.errors import CacheCorrupt, CacheMismatch, CacheUnsealed
from cache_schema.format import layout
from cache_schema.format.journal import Record, committed_shards, file_record, read_committed, read_record, write_record
from cache_schema.format.layout import CalibrationLayout, CalibrationPart
from cache_schema.format.manifest import Manifest, TapInfo
from cache_schema.storage.files import digest
from cache_schema.storage.folder import Folder
from cache_schema.stores.registry import store_of


def load_codec(folder: Folder, manifest: Manifest, tap: TapInfo) -> TapCodec:
    """Return the codec of a tap; raises CacheUnsealed if the cache is not calibrated yet, CacheCorrupt."""
    encoding = manifest.encoding
    return TapCodec(
        kind=encoding.kind,
        grid=tap.grid,
        pool=encoding.pool,
        components=None if encoding.pca is None else load_components(folder, manifest, tap),
        channel=load_channel(folder, manifest, tap) if encoding.scaled else None,
        treatment=None if encoding.massive == "keep" else load_treatment(folder, manifest, tap),
    )


def load_channel(folder: Folder, manifest: Manifest, tap: TapInfo) -> Array:
    """Return a tap's channel calibration, float32 (T, C); raises CacheCorrupt if it is not what was written."""
    return _load_parts(folder, manifest, tap, ["channel"])[0]


def load_components(folder: Folder, manifest: Manifest, tap: TapInfo) -> PrincipalComponents:
    """Return a tap's principal components; raises CacheCorrupt if they are not what was written."""
    amplitude, mean, basis = _load_parts(folder, manifest, tap, ["amplitude", "mean", "basis"])
    return PrincipalComponents(amplitude, mean, basis)


def load_treatment(folder: Folder, manifest: Manifest, tap: TapInfo) -> ChannelTreatment:
    """Return what was done to a tap's massive channels; raises CacheCorrupt if it is not what was written."""
    return ChannelTreatment(*_load_parts(folder, manifest, tap, ["offset", "factor"]))


def _load_parts(folder: Folder, manifest: Manifest, tap: TapInfo, parts: list[CalibrationPart]) -> list[Array]:
    arrays = {array.part: array for array in layout.calibration_layouts(manifest, tap)}
    return [load_calibration(folder, manifest, arrays[part]) for part in parts]


def load_calibration(folder: Folder, manifest: Manifest, array: CalibrationLayout) -> Array:
    """Return one of the statistics of a cache, float32; raises CacheCorrupt if it is not what was written."""
    store = store_of(manifest)
    name = store.calibration_file(array)
    data = read_committed(folder, "calibration", name, store.calibration_size(array))
    if data is None and manifest.sealed:
        raise CacheCorrupt(f"the journal of {folder} has no record of the calibration")
    if data is None:
        raise CacheUnsealed(f"cache {folder} has no calibration {array.name} yet")
    return store.parse_calibration(array, data, folder.where(name))


def commit_calibration(folder: Folder, documents: Mapping[str, bytes]) -> None:
    """Store a calibration, path to contents, and record it; the caller holds the folder's lock.

    Raises CacheMismatch where shards are there that were encoded with another one, as far as what is left of that, its
    record or its files, can tell.
    """
    record = read_record(folder, "calibration")
    if committed_shards(folder, "features"):
        for name, data in documents.items():
            before = None if record is None else record.files.get(name)
            if before is None and folder.size(name) is not None:
                before = file_record(folder.digest(name))
            if before not in (None, file_record(digest(data))):
                raise CacheMismatch(
                    f"the calibration computed now is not {folder.where(name)}, with which the shards here were "
                    "encoded: other hardware or libraries compute other features; repair the cache where it was "
                    "built, or build it anew in another directory"
                )
    files = {name: file_record(folder.write(name, data)) for name, data in documents.items()}
    write_record(folder, Record(kind="calibration", files=files))
