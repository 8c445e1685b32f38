"""Everything that turns one tap's teacher features into what a cache stores, and back."""

from dataclasses import dataclass
from pathlib import Path

from cache_schema import layout
from cache_schema.encoding import Array, Encoded, FloatArray, decode, encode
from cache_schema.errors import CacheCorrupt, CacheUnsealed
from cache_schema.files import digest, read_bounded
from cache_schema.journal import read_record
from cache_schema.layout import CalibrationLayout
from cache_schema.manifest import EncodingKind, Manifest, TapInfo
from cache_schema.stores import store_of


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
    return load_calibration(root, manifest, layout.channel_layout(manifest, tap))


def load_calibration(root: Path, manifest: Manifest, array: CalibrationLayout) -> Array:
    """Return one of the statistics of a cache, float32; raises CacheCorrupt if it is not what was written."""
    store = store_of(manifest)
    name = store.calibration_file(array)
    record = read_record(root, "calibration")
    if record is None or name not in record.files:
        raise CacheUnsealed(f"cache {root} has no calibration {array.name} yet")
    try:
        data = read_bounded(root / name, store.calibration_size(array))
    except OSError as error:
        raise CacheCorrupt(f"cannot read {root / name}: {error.strerror}") from error
    if digest(data).crc32c != record.files[name].crc32c:
        raise CacheCorrupt(f"{root / name} is damaged; run `dit-cache verify`")
    return store.parse_calibration(array, data, str(root / name))
