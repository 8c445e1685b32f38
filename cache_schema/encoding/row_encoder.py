"""From what the teacher computed of a sample to the arrays that a shard stores of it, and what that loses."""

from collections.abc import Mapping

from cache_schema.encoding import fidelity
from cache_schema.encoding.codec import TapCodec
from cache_schema.encoding.number_formats import (
    Array,
    Encoded,
    Features,
    FloatArray,
    as_features,
    first_not_finite,
)
from cache_schema.encoding.reduction import teacher_shape
from cache_schema.errors import InvalidFeatures
from cache_schema.format import layout
from cache_schema.format.journal import FidelitySums
from cache_schema.format.manifest import Manifest, TapInfo


class RowEncoder:
    """Encodes the samples of one shard, and measures on the first of them what their encoding loses."""

    def __init__(self, manifest: Manifest, codecs: Mapping[str, TapCodec]) -> None:
        self._manifest = manifest
        self._codecs = codecs
        self._measured: dict[tuple[int, str], list[FidelitySums]] = {}  # by position and tap, of every timestep

    def encode(self, features: Mapping[str, Features], who: str, position: int) -> dict[str, Array]:
        """Return the stored arrays (V, T, *inner) of a sample by name, from features (V, T, L, C) of every tap.

        `position` counts the samples of the shard from 0; they may be encoded in any order and by several threads.
        Raises InvalidFeatures, naming the tap and `who` the sample is, for NaN, infinities and values beyond the
        encoding's range.
        """
        parts: dict[str, Array] = {}
        for tap in self._manifest.taps:
            parts |= self._encode_tap(tap, features[tap.name], who, position)
        return parts

    def fidelity(self) -> list[FidelitySums]:
        """Return what the samples so far lost, for every tap and timestep; nothing if there were none."""
        positions = sorted({position for position, _ in self._measured})
        return fidelity.combine(
            [
                item
                for tap in self._manifest.taps
                for position in positions
                for item in self._measured[position, tap.name]
            ]
        )

    def _encode_tap(self, tap: TapInfo, sample: Features, who: str, position: int) -> dict[str, Array]:
        codec = self._codecs[tap.name]
        try:
            encoded = codec.encode(sample)
        except InvalidFeatures as error:
            check_finite(as_features(sample), tap, who)
            raise InvalidFeatures(f"tap {tap.name} of {who}: {error}") from error
        if position < fidelity.MEASURED_SAMPLES:
            self._measured[position, tap.name] = self._measure(tap, codec.pooled(sample), encoded)
        parts = {}
        for array in layout.feature_layouts(self._manifest, tap):
            part = encoded.payload if array.part == "payload" else encoded.scale
            assert part is not None
            parts[array.name] = part
        return parts

    def _measure(self, tap: TapInfo, original: FloatArray, encoded: Encoded) -> list[FidelitySums]:
        codec = self._codecs[tap.name]
        decoded = codec.restore(codec.decode(encoded))
        return [
            fidelity.measure(tap.name, timestep, original[:, t], decoded[:, t])
            for t, timestep in enumerate(self._manifest.curriculum.timesteps)
        ]


def check_shapes(manifest: Manifest, features: Mapping[str, Features], count: int | None = None) -> None:
    """Raise InvalidFeatures unless these are features (n, V, T, L, C) of every tap, of `count` samples if given."""
    names = [tap.name for tap in manifest.taps]
    if set(features) != set(names):
        raise InvalidFeatures(f"features are given for taps {sorted(features)}, the cache has {sorted(names)}")
    steps, views = len(manifest.curriculum.timesteps), len(manifest.views)
    for tap in manifest.taps:
        shape = tuple(features[tap.name].shape)
        first = shape[0] if count is None and shape else count
        expected = (first, views, steps, *teacher_shape(tap, manifest.encoding))
        if shape != expected:
            raise InvalidFeatures(f"features of tap {tap.name} have shape {shape}, expected {expected}")


def check_finite(sample: FloatArray, tap: TapInfo, who: str) -> None:
    """Raise InvalidFeatures, saying where, if the features (V, T, L, C) of a sample have a NaN or infinite value."""
    bad = first_not_finite(sample)
    if bad is not None:
        raise InvalidFeatures(
            f"tap {tap.name} of {who} is {sample[bad]} at (view, timestep, token, channel) = {bad}: the teacher failed "
            "on it; quarantine the sample or compute it in a wider type"
        )
