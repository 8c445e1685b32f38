"""Everything that turns one tap's teacher features into what a cache stores, and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache_schema import layout
from cache_schema.encoding import Array, Encoded, FloatArray, decode, encode
from cache_schema.errors import CacheCorrupt, CacheMismatch, CacheUnsealed
from cache_schema.files import digest, digest_file, write_file
from cache_schema.journal import Record, committed_shards, file_record, read_committed, read_record, write_record
from cache_schema.manifest import EncodingKind, Manifest, TapInfo


@dataclass(frozen=True)
class TapCodec:
    """The encoding of one tap of one cache; `channel` is its calibration, float32 (T, C), for encodings with scales."""

    kind: EncodingKind
    channel: Array | None

    def encode(self, sample: FloatArray) -> Encoded:
        """Encode a sample's features as the teacher computed them, (V, T, L, C)."""
        return encode(self.kind, sample, self.channel)

    def decode(self, encoded: Encoded) -> Array:
        """Return the float32 features (V, T, L, C) that are stored."""
        return decode(self.kind, encoded, self.channel)


def load_codec(root: Path, manifest: Manifest, tap: TapInfo) -> TapCodec:
    """Return the codec of a tap; raises CacheUnsealed if the cache is not calibrated yet, CacheCorrupt."""
    channel = load_channel(root, manifest, tap) if manifest.encoding.scaled else None
    return TapCodec(manifest.encoding.kind, channel)


def load_channel(root: Path, manifest: Manifest, tap: TapInfo) -> Array:
    """Return a tap's channel calibration, float32 (T, C); raises CacheCorrupt if it is not what was written."""
    name = layout.channel_file(tap.name)
    shape = (len(manifest.curriculum.timesteps), tap.channels)
    data = read_committed(root, "calibration", name)
    if data is None and manifest.sealed:
        raise CacheCorrupt(f"the journal of {root} has no record of the calibration")
    if data is None:
        raise CacheUnsealed(f"cache {root} has no channel calibration for tap {tap.name} yet")
    if len(data) != 4 * shape[0] * shape[1]:
        raise CacheCorrupt(f"{root / name} has {len(data)} bytes, not those of {shape} values")
    return np.frombuffer(data, dtype="<f4").reshape(shape).copy()


def commit_calibration(root: Path, documents: Mapping[str, bytes]) -> None:
    """Store a calibration, path to contents, and record it; the caller holds the directory's lock.

    Raises CacheMismatch where shards are there that were encoded with another one, as far as what is left of that, its
    record or its files, can tell.
    """
    record = read_record(root, "calibration")
    if committed_shards(root, "features"):
        for name, data in documents.items():
            path = root / name
            before = None if record is None else record.files.get(name)
            if before is None and path.is_file():
                before = file_record(digest_file(path))
            if before not in (None, file_record(digest(data))):
                raise CacheMismatch(
                    f"the calibration computed now is not {path}, with which the shards here were encoded: other "
                    "hardware or libraries compute other features; repair the cache where it was built, or build it "
                    "anew in another directory"
                )
    files = {name: file_record(write_file(root / name, data)) for name, data in documents.items()}
    write_record(root, Record(kind="calibration", files=files))
