"""The loops over every feature that a cache is made of, compiled by Numba.

What they compute is defined in `number_formats` and `fidelity`. In NumPy an encoding takes half a dozen passes, each
through an array of float32; here a token is read from memory once and what is made of it stays in the nearest cache
until its last byte is written: a fifth of the time, and the same bytes.

Features are given as their bits, uint32 of float32 or uint16 of bfloat16, so that one loop reads either. The bits of
numbers without their signs are in the order of the numbers, with infinity and then NaN behind all others.
"""

import contextlib
import functools
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

import numpy as np
from numba import njit

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
_SIGNLESS = np.int32(0x7FFFFFFF)
_SMALLEST = np.finfo(np.float32).tiny
_INT8_PEAK = np.float32(127)
_FLOAT8_PEAK = np.float32(448)
# The smallest normal number of float8_e4m3, and what lies between it and the next: below, numbers are that far apart.
_FLOAT8_NORMAL = np.float32(2.0**-6)
_FLOAT8_STEPS = np.float32(2.0**9)


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function for the types it is first called with, and keep that for other processes where possible."""

    def compile_later(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = kept = njit(**_OPTIONS, **options)(function)
        # If neither beside this file nor in the user's cache folder may anything be written, nothing is kept.
        with contextlib.suppress(RuntimeError):
            kept = njit(cache=True, **_OPTIONS, **options)(function)

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            try:
                return kept(*arguments)
            except (OSError, EOFError, UnpicklingError):  # no room to keep it, or what was kept is damaged
                return compiled(*arguments)

        return call

    return compile_later


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _calibrate(bits: Any, inverse: Any, largest: Any, calibrated: Any) -> Any:
    """Put a token (C,), divided by the amplitudes of its channels, into float32 (C,).

    Return by what to divide it so that its peak becomes `largest`: NaN if the peak is not finite, infinity for a token
    so small that this number underflows, which is stored as zeros.
    """
    shift = np.uint32(32 - 8 * bits.itemsize)
    for c in range(len(bits)):
        calibrated[c] = np.uint32(np.uint32(bits[c]) << shift).view(np.float32) * inverse[c]
    signed = calibrated.view(np.int32)
    magnitude = np.int32(0)
    for c in range(len(bits)):
        magnitude = max(magnitude, np.int32(signed[c] & _SIGNLESS))
    peak = np.int32(magnitude).view(np.float32)
    if not np.isfinite(peak):
        return np.float32(np.nan)
    divisor = peak / largest
    return divisor if divisor > _SMALLEST else np.float32(np.inf)


@_compiled()
def to_int8(bits: Any, inverse: Any, payload: Any, scale: Any) -> bool:
    """Fill payload int8 (n, T, L, C) and scale float32 (n, T, L) from bits (n, T, L, C) and 1 / calibration (T, C).

    Return False, with the rest undefined, at a token whose peak is not finite.
    """
    calibrated = np.empty(bits.shape[3], np.float32)
    for n, t, l in np.ndindex(scale.shape):  # noqa: E741
        divisor = _calibrate(bits[n, t, l], inverse[t], _INT8_PEAK, calibrated)
        if np.isnan(divisor):
            return False
        scale[n, t, l] = divisor if divisor < np.inf else np.float32(0)
        out = payload[n, t, l]
        for c in range(len(out)):
            # The division may end a little above the largest value; rounding takes that away.
            out[c] = np.int32(np.rint(calibrated[c] / divisor))
    return True


@_compiled()
def to_float8(bits: Any, inverse: Any, payload: Any, scale: Any) -> bool:
    """Do as `to_int8` with payload uint8, the bits of float8_e4m3."""
    calibrated = np.empty(bits.shape[3], np.float32)
    for n, t, l in np.ndindex(scale.shape):  # noqa: E741
        divisor = _calibrate(bits[n, t, l], inverse[t], _FLOAT8_PEAK, calibrated)
        if np.isnan(divisor):
            return False
        scale[n, t, l] = divisor if divisor < np.inf else np.float32(0)
        signed, out = calibrated.view(np.int32), payload[n, t, l]
        for c in range(len(out)):
            out[c] = (signed[c] >> np.int32(24)) & np.int32(0x80)
            calibrated[c] = min(abs(calibrated[c] / divisor), _FLOAT8_PEAK)
        for c in range(len(out)):
            # 3 of 23 mantissa bits stay, rounded to nearest, ties to even; the exponent's bias falls from 127 to 7.
            odd = (signed[c] >> np.int32(20)) & np.int32(1)
            normal = ((signed[c] + np.int32(0x7FFFF) + odd) >> np.int32(20)) - np.int32(120 << 3)
            small = np.int32(np.rint(calibrated[c] * _FLOAT8_STEPS))
            out[c] |= np.uint8(normal if calibrated[c] >= _FLOAT8_NORMAL else small)
    return True


@_compiled()
def to_bfloat16(bits: Any, payload: Any) -> None:
    """Round the bits of float32 (n,) to those of bfloat16, uint16 (n,), to nearest, ties to even, as the hardware does.

    NaN stays NaN.
    """
    for i in range(len(bits)):
        odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
        magnitude = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        rounded = np.uint32(np.uint32(magnitude + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        payload[i] = min(rounded, np.uint32(0x7FFF)) | ((bits[i] >> np.uint32(16)) & np.uint32(0x8000))


@_compiled()
def largest_bits(bits: Any, signless: Any) -> int:
    """Return the largest of bits (n,) after `signless`, all bits but the sign, is applied to them."""
    largest = signless ^ signless
    for i in range(len(bits)):
        largest = max(largest, bits[i] & signless)
    return largest


# Sums may be taken in any order, or they could not be taken several terms at a time.
@_compiled(fastmath={"reassoc"})
def compare_tokens(x: Any, y: Any, tokens: Any, channels: Any) -> None:
    """Compare float tokens (n, C) with others: add to channels (2, C) the sums of x² and (y - x)² over tokens.

    Fill tokens (3, n) with the sums of x², y² and x y over channels. Sums are float64.
    """
    for n in range(len(x)):
        xx, yy, xy = 0.0, 0.0, 0.0
        for c in range(x.shape[1]):
            a, b = np.float64(x[n, c]), np.float64(y[n, c])
            xx += a * a
            yy += b * b
            xy += a * b
            channels[0, c] += a * a
            channels[1, c] += (b - a) * (b - a)
        tokens[0, n], tokens[1, n], tokens[2, n] = xx, yy, xy
