"""Reading float8_e4m3 at the speed of memory, also where the processor knows no such type.

The format has 1 sign, 4 exponent (bias 7) and 3 mantissa bits, no infinity, and one NaN per sign.
Source: https://arxiv.org/abs/2209.05433.
"""

import torch

# What the exponents' biases differ by between float16 (15) and float8_e4m3 (7).
_REBIAS = 2.0 ** (15 - 7)


def float8_to_float32(payload: torch.Tensor) -> torch.Tensor:
    """Return float8_e4m3fn values as float32, exactly; NaN, which no encoder here writes, may become 480 on a CPU."""
    if payload.device.type != "cpu":
        return payload.to(torch.float32)
    # torch converts one value at a time on a CPU. The same exponent and mantissa bits, put where float16 has its own,
    # make the same number but for the bias, subnormal numbers included.
    bits = payload.view(torch.int8).to(torch.int16)
    half = (bits << 7) & 0x3F80 | bits & -0x8000
    return half.view(torch.float16).to(torch.float32).mul_(_REBIAS)
