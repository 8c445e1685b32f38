"""How feature values become bytes and come back.

`float32`, `float16` and `bfloat16` are plain roundings. `int8` and `float8_e4m3` divide every channel by its own
calibrated amplitude first and every token by its own scale then, `x = payload * scale[token] * channel[timestep,
channel]`, because the hidden states of large diffusion transformers carry a few channels a thousand times larger than
the others: one scale for all of them would round the others to zero.

What the error is at most, with `peak` the largest |x / channel| of a token: int8 errs by half a step, `peak / 254 *
channel`; float8_e4m3 by half a unit in the last of 4 significant bits, `|x| / 16`, or half its smallest number,
`peak / 448 / 1024 * channel`, whichever is larger.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_schema.errors import InvalidFeatures
from cache_schema.layout import PAYLOAD_DTYPES
from cache_schema.manifest import EncodingKind

if TYPE_CHECKING:
    import torch

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]
Array = np.ndarray[Any, np.dtype[Any]]

# The number that the largest value of a token becomes: the largest that the format has.
_PEAK = {"int8": 127.0, "float8_e4m3": 448.0}
# Tokens are encoded in blocks of about this many values, so that temporary arrays stay in the processor's caches.
_BLOCK_VALUES = 1 << 16


@dataclass(frozen=True)
class Encoded:
    """Encoded features: payload (..., T, L, C) and, where the format has them, float32 scales per token (..., T, L)."""

    payload: Array
    scale: Array | None = None


def as_features(values: "np.ndarray | torch.Tensor") -> FloatArray:
    """Return features as a NumPy array of a floating type, without a copy where that is possible."""
    if not isinstance(values, np.ndarray):
        import torch

        tensor = values.detach().cpu()
        values = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if values.dtype not in (np.float16, np.float32, np.float64):
        raise InvalidFeatures(f"features must be floating point, not {values.dtype}")
    return values


def first_not_finite(sample: FloatArray) -> tuple[int, ...] | None:
    """Return where in a sample's features (V, T, L, C) the first NaN or infinite value stands, or None."""
    # A sum is not finite if one of its terms is not; where finite terms overflow, the slow test decides.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.sum(sample, dtype=np.float32)):
            return None
    finite = np.isfinite(sample)
    return None if finite.all() else tuple(int(i) for i in np.argwhere(~finite)[0])


def encode(kind: EncodingKind, values: FloatArray, channel: Array | None = None) -> Encoded:
    """Encode finite features (..., T, L, C); int8 and float8_e4m3 need the channel calibration (T, C).

    Raises InvalidFeatures where a value is beyond the range of the encoding.
    """
    if kind in _PEAK:
        if channel is None:
            raise InvalidFeatures(f"{kind} needs a channel calibration")
        return _encode_scaled(kind, values, channel)
    if kind == "float32":
        if values.dtype == np.dtype("<f4"):
            return Encoded(values)
        with np.errstate(over="ignore"):
            payload = values.astype("<f4")
        return Encoded(_in_range(payload, kind, payload))
    if kind == "float16":
        with np.errstate(over="ignore"):
            payload = values.astype("<f2")
        return Encoded(_in_range(payload, kind, payload))
    return Encoded(_encode_bfloat16(values))


def decode(kind: EncodingKind, encoded: Encoded, channel: Array | None = None) -> Array:
    """Return the float32 features (..., T, L, C) that `encoded` stands for."""
    payload = encoded.payload
    if kind == "bfloat16":
        return (payload.astype(np.uint32) << 16).view(np.float32)
    if kind not in _PEAK:
        return payload.astype(np.float32)
    assert encoded.scale is not None
    assert channel is not None
    values = _from_float8(payload) if kind == "float8_e4m3" else payload.astype(np.float32)
    return values * encoded.scale[..., None] * channel[:, None, :]


def _in_range(payload: Array, kind: EncodingKind, finite_part: Array) -> Array:
    if not np.isfinite(finite_part).all():
        raise InvalidFeatures(f"a value is beyond the range of {kind}; choose bfloat16, int8 or float32")
    return payload


def _encode_bfloat16(values: FloatArray) -> Array:
    with np.errstate(over="ignore"):
        bits = values.astype("<f4").view(np.uint32)
    # Round to nearest, ties to even, as the hardware does.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    payload = rounded.astype(PAYLOAD_DTYPES["bfloat16"])
    if ((payload & 0x7F80) == 0x7F80).any():
        raise InvalidFeatures("a value is beyond the range of bfloat16; divide the features")
    return payload


def _encode_scaled(kind: EncodingKind, values: FloatArray, channel: Array) -> Encoded:
    T, L, C = values.shape[-3:]
    if channel.shape != (T, C):
        raise InvalidFeatures(f"the channel calibration has shape {channel.shape}, features need {(T, C)}")
    flat = values.reshape(-1, T, L, C)
    payload = np.empty(flat.shape, dtype=PAYLOAD_DTYPES[kind])
    scale = np.empty(flat.shape[:-1], dtype="<f4")
    inverse = (1.0 / channel.astype(np.float64)).astype(np.float32)
    step = max(1, _BLOCK_VALUES // C)
    for i in range(flat.shape[0]):
        for t in range(T):
            for start in range(0, L, step):
                block = slice(start, start + step)
                scaled, scale[i, t, block] = _scale_tokens(flat[i, t, block], inverse[t], _PEAK[kind])
                payload[i, t, block] = _to_float8(scaled) if kind == "float8_e4m3" else _to_int8(scaled)
    return Encoded(payload.reshape(values.shape), scale.reshape(values.shape[:-1]))


def _scale_tokens(tokens: FloatArray, inverse: Array, largest: float) -> tuple[Array, Array]:
    """Return tokens (L, C) divided by their scales (L,), which make `largest`, up to rounding, of each token's peak."""
    with np.errstate(over="ignore", invalid="ignore"):
        calibrated = np.multiply(tokens, inverse, dtype=np.float32, casting="same_kind")
    peak = np.maximum(calibrated.max(axis=1), -calibrated.min(axis=1))
    if not np.isfinite(peak).all():
        raise InvalidFeatures("a value is beyond the range of its channel's calibration; calibrate on more samples")
    scale = peak / np.float32(largest)
    # A token so small that its scale underflows is stored as zeros.
    divisor = np.where(scale > np.finfo(np.float32).tiny, scale, np.float32(np.inf))
    scale = np.where(np.isinf(divisor), np.float32(0), scale)
    np.divide(calibrated, divisor[:, None], out=calibrated)
    return calibrated, scale


def _to_int8(scaled: Array) -> Array:
    # The division may end a little above the largest value; rounding takes that away.
    return np.rint(scaled, out=scaled).astype(np.int8)


def _to_float8(scaled: Array) -> Array:
    import torch

    largest = _PEAK["float8_e4m3"]
    np.clip(scaled, -largest, largest, out=scaled)
    return torch.from_numpy(scaled).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _from_float8(payload: Array) -> Array:
    import torch

    from cache_schema.float8 import float8_to_float32

    return float8_to_float32(torch.from_numpy(payload).view(torch.float8_e4m3fn)).numpy()
