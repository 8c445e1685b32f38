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
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from cache_schema.errors import InvalidFeatures
from cache_schema.format.layout import PAYLOAD_DTYPES
from cache_schema.format.manifest import EncodingKind

if TYPE_CHECKING:
    import torch

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]
Array = np.ndarray[Any, np.dtype[Any]]
Features = Union["torch.Tensor", np.ndarray]

_SCALED = ("int8", "float8_e4m3")
# What to do about features that a format cannot hold.
_WIDER: dict[str, str] = {
    "float32": "quarantine the sample",
    "float16": "choose bfloat16, int8 or float32",
    "bfloat16": "divide the features",
}
# The bits of infinity in formats whose larger bits are NaN.
_INFINITY: dict[str, int] = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}


@dataclass(frozen=True)
class Encoded:
    """Encoded features: payload (..., T, L, C) and, where the format has them, float32 scales per token (..., T, L)."""

    payload: Array
    scale: Array | None = None


def as_features(values: Features) -> FloatArray:
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


def encode(kind: EncodingKind, values: Features, channel: Array | None = None) -> Encoded:
    """Encode features (..., T, L, C); int8 and float8_e4m3 need the channel calibration (T, C).

    float32 values become their own payload, without a copy. Raises InvalidFeatures for a NaN or infinite value and for
    one beyond the range of the encoding.
    """
    if kind in _SCALED:
        if channel is None:
            raise InvalidFeatures(f"{kind} needs a channel calibration")
        return _encode_scaled(kind, values, channel)
    if kind == "bfloat16":
        payload = _to_bfloat16(values)
    else:
        with np.errstate(over="ignore"):
            payload = np.ascontiguousarray(as_features(values), dtype=PAYLOAD_DTYPES[kind])
    if not _all_finite(payload, kind):
        raise InvalidFeatures(f"a value is beyond the range of {kind}; {_WIDER[kind]}")
    return Encoded(payload)


def decode(kind: EncodingKind, encoded: Encoded, channel: Array | None = None) -> Array:
    """Return the float32 features (..., T, L, C) that `encoded` stands for."""
    payload = encoded.payload
    if kind == "bfloat16":
        bits = payload.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if kind not in _SCALED:
        return payload.astype(np.float32)
    assert encoded.scale is not None
    assert channel is not None
    values = _from_float8(payload) if kind == "float8_e4m3" else payload.astype(np.float32)
    values *= encoded.scale[..., None]
    values *= channel[:, None, :]
    return values


def _encode_scaled(kind: EncodingKind, values: Features, channel: Array) -> Encoded:
    from cache_schema.encoding.compiled import to_float8, to_int8

    T, L, C = values.shape[-3:]
    if channel.shape != (T, C):
        raise InvalidFeatures(f"the channel calibration has shape {channel.shape}, features need {(T, C)}")
    bits = _as_bits(values).reshape(-1, T, L, C)
    payload = np.empty(bits.shape, dtype=PAYLOAD_DTYPES[kind])
    scale = np.empty(bits.shape[:-1], dtype="<f4")
    inverse = (1.0 / channel.astype(np.float64)).astype(np.float32)
    if not (to_int8 if kind == "int8" else to_float8)(bits, inverse, payload, scale):
        raise InvalidFeatures("a value is beyond the range of its channel's calibration; calibrate on more samples")
    return Encoded(payload.reshape(values.shape), scale.reshape(values.shape[:-1]))


def _to_bfloat16(values: Features) -> Array:
    from cache_schema.encoding.compiled import to_bfloat16

    bits = _as_bits(values)
    if bits.dtype == np.uint16:
        return bits
    payload = np.empty(bits.shape, dtype=PAYLOAD_DTYPES["bfloat16"])
    to_bfloat16(bits.reshape(-1), payload.reshape(-1))
    return payload


def _as_bits(values: Features) -> Array:
    """Return the bits of features, contiguous: of bfloat16 as uint16, of all other types, as float32, as uint32."""
    if not isinstance(values, np.ndarray):
        import torch

        if values.dtype == torch.bfloat16:
            return values.detach().cpu().contiguous().view(torch.uint16).numpy()
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(as_features(values), dtype=np.float32).view(np.uint32)


def _all_finite(payload: Array, kind: EncodingKind) -> bool:
    from cache_schema.encoding.compiled import largest_bits

    bits = payload.reshape(-1).view(f"u{payload.itemsize}")
    return bool(largest_bits(bits, bits.dtype.type(np.iinfo(bits.dtype).max >> 1)) < _INFINITY[kind])


def _from_float8(payload: Array) -> Array:
    import torch

    from cache_schema.encoding.float8 import float8_to_float32

    return float8_to_float32(torch.from_numpy(payload).view(torch.float8_e4m3fn)).numpy()
