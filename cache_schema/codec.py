"""Everything that turns one tap's teacher features into what a cache stores, and back."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache_schema import layout
from cache_schema.encoding import Array, Encoded, FloatArray, decode, encode
from cache_schema.errors import CacheCorrupt, CacheUnsealed
from cache_schema.journal import read_committed
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
    if data is None:
        raise CacheUnsealed(f"cache {root} has no channel calibration for tap {tap.name} yet")
    if len(data) != 4 * shape[0] * shape[1]:
        raise CacheCorrupt(f"{root / name} has {len(data)} bytes, not those of {shape} values")
    return np.frombuffer(data, dtype="<f4").reshape(shape).copy()
