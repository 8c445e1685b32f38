"""The images that an encoding is calibrated on, whose features go through the teacher once for both uses."""

from collections.abc import Container, Mapping, Sequence

from torch import Tensor

from cache_schema.format.manifest import Manifest

_IMAGES = 64
# More is not kept: these images then go through the teacher twice. A fixed limit, because what a shard holds must not
# depend on the memory of the machine that built it.
_KEPT_BYTES = 4 << 30


class CalibrationImages:
    """Rows spread evenly over those with features, in batches of their own, and their features until they are stored.

    A row of these is computed in its calibration batch and nowhere else, whoever builds the shard it belongs to: the
    last bits of a row may depend on those beside it, and two builders, or one that goes on where another was killed,
    must write the same bytes.
    """

    def __init__(self, manifest: Manifest, batch: int) -> None:
        rows = manifest.dataset.feature_rows
        spread = sorted({round(i * (rows - 1) / (_IMAGES - 1)) for i in range(_IMAGES)})
        self.batches = [spread[i : i + batch] for i in range(0, len(spread), batch)]
        fits = manifest.encoding.calibrated and len(spread) * _image_bytes(manifest) <= _KEPT_BYTES
        self._batch_of = {row: rows for rows in self.batches for row in rows} if fits else {}
        self._kept: dict[int, dict[str, Tensor]] = {}

    def __contains__(self, row: int) -> bool:
        """Whether a row is computed in its calibration batch rather than with those beside it."""
        return row in self._batch_of

    def batch_of(self, row: int) -> Sequence[int]:
        """The calibration batch in which a row is computed."""
        return self._batch_of[row]

    def keep(self, rows: Sequence[int], features: Mapping[str, Tensor], wanted: Container[int]) -> None:
        """Keep the features {tap: (B, V, T, L, C)} of those rows of a calibration batch that are still to be stored."""
        for place, row in enumerate(rows):
            if row in self and row in wanted:
                self._kept[row] = {tap: tokens[place].to("cpu", copy=True) for tap, tokens in features.items()}

    def take(self, row: int) -> dict[str, Tensor] | None:
        """The features of a row, {tap: (V, T, L, C)}, which are kept no longer; None where they are not here."""
        return self._kept.pop(row, None)


def _image_bytes(manifest: Manifest) -> int:
    """Bytes of the features of one image as a teacher computes them, in single precision."""
    tokens = sum(
        tap.tokens * manifest.encoding.pool**2 * (tap.teacher_channels or tap.channels) for tap in manifest.taps
    )
    return 4 * tokens * len(manifest.views) * len(manifest.curriculum.timesteps)
