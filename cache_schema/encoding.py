"""How feature values become bytes and come back.

`float32`, `float16` and `bfloat16` are plain roundings. `int8` and `float8_e4m3` divide every channel by its own
calibrated amplitude first and every token by its own scale then, `x = payload * scale[token] * channel[timestep,
channel]`, because the hidden states of large diffusion transformers carry a few channels a thousand times larger than
the others: one scale for all of them would round the others to zero.

What the error is at most, with `peak` the largest |x / channel| of a token: int8 errs by half a step, `peak / 254 *
channel`; float8_e4m3 by half a unit in the last of 4 significant bits, `|x| / 16`, or half its smallest number,
`peak / 448 / 1024 * channel`, whichever is larger.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from cache_schema.errors import InvalidFeatures
from cache_schema.layout import PAYLOAD_DTYPES
from cache_schema.manifest import EncodingKind

if TYPE_CHECKING:
    import torch

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]
Array = np.ndarray[Any, np.dtype[Any]]
Features = Union["torch.Tensor", np.ndarray]

# The number that the largest value of a token becomes: the largest that the format has.
_PEAK = {"int8": 127.0, "float8_e4m3": 448.0}
# Tokens are encoded in blocks of about this many values: small enough that a block stays in the processor's caches from
# one pass to the next, large enough that what a pass costs before it begins, a few microseconds, does not count.
_BLOCK_VALUES = 3 << 16


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
    """Encode finite features (..., T, L, C); int8 and float8_e4m3 need the channel calibration (T, C).

    Raises InvalidFeatures where a value is beyond the range of the encoding.
    """
    if kind in _PEAK:
        if channel is None:
            raise InvalidFeatures(f"{kind} needs a channel calibration")
        return _encode_scaled(kind, values, channel)
    values = as_features(values)
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


def _encode_scaled(kind: EncodingKind, values: Features, channel: Array) -> Encoded:
    T, L, C = values.shape[-3:]
    if channel.shape != (T, C):
        raise InvalidFeatures(f"the channel calibration has shape {channel.shape}, features need {(T, C)}")
    flat = _values_or_bits(values).reshape(-1, T, L, C)
    payload = np.empty(flat.shape, dtype=PAYLOAD_DTYPES[kind])
    scale = np.empty(flat.shape[:-1], dtype="<f4")
    inverse = (1.0 / channel.astype(np.float64)).astype(np.float32)
    most = min(T * L * C, max(_BLOCK_VALUES, C))
    # Not a multiple of 4 kB apart, or the two would evict each other from the caches.
    room = np.empty((2, most + 528), dtype=np.float32)[:, :most]
    for place in _blocks(*flat.shape):
        tokens = flat[place]
        scaled, spare = (part[: tokens.size].reshape(tokens.shape) for part in room)
        _calibrate(tokens, inverse[place[1]] if tokens.ndim == 2 else inverse[:, None], scaled)
        scale[place] = _scale_tokens(scaled, _PEAK[kind], spare)
        (_to_int8 if kind == "int8" else _to_float8)(scaled, payload[place])
    return Encoded(payload.reshape(values.shape), scale.reshape(values.shape[:-1]))


def _values_or_bits(values: Features) -> Array:
    """Return features as a NumPy array; of bfloat16, which NumPy does not have, the bits as uint16."""
    if not isinstance(values, np.ndarray):
        import torch

        if values.dtype == torch.bfloat16:
            return values.detach().cpu().view(torch.uint16).numpy()
    return as_features(values)


def _blocks(count: int, T: int, L: int, C: int) -> Iterator[tuple[int, slice | int, slice]]:
    """Cut (count, T, L, C) into what is encoded at once: whole samples, or else tokens of one timestep."""
    if T * L * C <= _BLOCK_VALUES:
        yield from ((i, slice(None), slice(None)) for i in range(count))
        return
    step = max(1, _BLOCK_VALUES // C)
    for i, t in np.ndindex(count, T):
        yield from ((i, t, slice(start, start + step)) for start in range(0, L, step))


def _calibrate(tokens: Array, inverse: Array, out: Array) -> None:
    """Put tokens (..., L, C), numbers or the bits of bfloat16, divided by the amplitudes of their channels in `out`."""
    with np.errstate(over="ignore", invalid="ignore"):
        if tokens.dtype == np.uint16:
            np.left_shift(tokens, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
            tokens = out
        np.multiply(tokens, inverse, out=out, dtype=np.float32, casting="same_kind")


def _scale_tokens(calibrated: Array, largest: float, spare: Array) -> Array:
    """Divide tokens (..., L, C) by scales that make `largest`, up to rounding, of each token's peak; return these."""
    # Without their signs, floating-point numbers are in the order of their bits: half the time of a maximum and a
    # minimum. NaN comes after infinity.
    magnitude = np.bitwise_and(calibrated.view(np.int32), np.int32(0x7FFFFFFF), out=spare.view(np.int32))
    peak = magnitude.max(axis=-1).view(np.float32)
    if not np.isfinite(peak).all():
        raise InvalidFeatures("a value is beyond the range of its channel's calibration; calibrate on more samples")
    scale = peak / np.float32(largest)
    # A token so small that its scale underflows is stored as zeros.
    heard = scale > np.finfo(np.float32).tiny
    np.divide(calibrated, np.where(heard, scale, np.float32(np.inf))[..., None], out=calibrated)
    return np.where(heard, scale, np.float32(0))


def _to_int8(scaled: Array, out: Array) -> None:
    # The division may end a little above the largest value; rounding takes that away.
    np.copyto(out, np.rint(scaled, out=scaled), casting="unsafe")


def _to_float8(scaled: Array, out: Array) -> None:
    import torch

    largest = _PEAK["float8_e4m3"]
    np.clip(scaled, -largest, largest, out=scaled)
    out[...] = torch.from_numpy(scaled).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _from_float8(payload: Array) -> Array:
    import torch

    from cache_schema.float8 import float8_to_float32

    return float8_to_float32(torch.from_numpy(payload).view(torch.float8_e4m3fn)).numpy()
