"""CRC-32C, the checksum of everything in a cache.

Of the packages that compute it, awscrt's is the one that uses the processor's widest registers: 59 GB/s with AVX-512,
where those with the CRC instruction, google-crc32c and crc32c, come to 29 GB/s. Checking what was read from the page
cache then takes a third of the time that reading it took, instead of two thirds.
"""

from typing import TYPE_CHECKING, Union

from awscrt import checksums

if TYPE_CHECKING:
    import numpy as np

Bytes = bytes | bytearray | memoryview


def crc32c(data: Union[Bytes, "np.ndarray"], previous: int = 0) -> int:
    """Return the CRC-32C of the bytes of contiguous data, continuing from `previous`."""
    return checksums.crc32c(data, previous)  # type: ignore[arg-type]


def combine_crc32c(first: int, second: int, size: int) -> int:
    """Return the CRC-32C of two pieces put together, from the CRC of each and the size in bytes of the second one."""
    return checksums.combine_crc32c(first, second, size)
