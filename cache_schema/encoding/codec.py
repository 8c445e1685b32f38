"""Everything that turns one tap's teacher features into what a cache stores, and back."""

from dataclasses import dataclass

from cache_schema.encoding.massive import ChannelTreatment
from cache_schema.encoding.number_formats import Array, Encoded, Features, FloatArray, as_features, decode, encode
from cache_schema.encoding.reduction import PrincipalComponents, pool_tokens
from cache_schema.format.manifest import EncodingKind


@dataclass(frozen=True)
class TapCodec:
    """The encoding of one tap of one cache: pooling to `grid`, treatment of massive channels, PCA, a number format.

    `channel` is the calibration, float32 (T, C), of number formats with scales; `components` those of PCA; `treatment`
    that of massive channels, None where they are kept.
    """

    kind: EncodingKind
    grid: tuple[int, int]
    pool: int
    components: PrincipalComponents | None
    channel: Array | None
    treatment: ChannelTreatment | None = None

    def encode(self, sample: Features) -> Encoded:
        """Encode a sample's features as the teacher computed them, (V, T, L * pool², C_teacher).

        Raises InvalidFeatures where a value is beyond the range of the encoding.
        """
        if self.components is not None:
            return encode(self.kind, self.components.project(self.pooled(sample)), self.channel)
        plain = self.pool == 1 and self.treatment is None
        return encode(self.kind, sample if plain else self.pooled(sample), self.channel)

    def decode(self, encoded: Encoded) -> Array:
        """Return the float32 features (V, T, L, C) that are stored."""
        return decode(self.kind, encoded, self.channel)

    def pooled(self, sample: Features) -> FloatArray:
        """Return the teacher's features (V, T, L, C_teacher), pooled and treated: what the encoding shall preserve."""
        pooled = pool_tokens(as_features(sample), self.grid, self.pool)
        return pooled if self.treatment is None else self.treatment.apply(pooled)

    def restore(self, stored: Array) -> Array:
        """Return decoded features (..., C) in the teacher's channels (..., C_teacher)."""
        return stored if self.components is None else self.components.restore(stored)
