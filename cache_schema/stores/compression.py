"""Lossless compression of chunks with codecs that Zarr knows, and decompression of chunks that nobody vouches for.

Every chunk declares its decompressed size; nothing is decompressed unless that is the size of the buffer waiting for
it. Sources: zstd frames, RFC 8878; Blosc headers,
https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst; their Zarr names,
https://github.com/zarr-developers/zarr-extensions/tree/main/codecs.
"""

import struct
from typing import Any

import numpy as np

from cache_schema.errors import CacheCorrupt
from cache_schema.format.manifest import Compression

Array = np.ndarray[Any, np.dtype[Any]]

_ZSTD_LEVEL = 3
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

# What Blosc calls level 2 of zstd is zstd's own level 3.
_BLOSC_LEVELS = {"lz4": 5, "zstd": 2}
# The number of each compressor's format in the upper three bits of the flags.
_BLOSC_FORMATS = {"lz4": 1, "zstd": 4}
_BLOSC_FORMAT_VERSION = 2
_BLOSC_SHUFFLED, _BLOSC_PLAIN, _BLOSC_UNSPLIT = 0b1, 0b10, 0b10000
_BLOSC_HEADER = struct.Struct("<BBBBIII")


def codec_metadata(compression: Compression, itemsize: int) -> list[dict[str, Any]]:
    """Return the Zarr v3 codecs that stand for a compression of values of `itemsize` bytes."""
    if compression == "none":
        return []
    if compression == "zstd":
        return [{"name": "zstd", "configuration": {"level": _ZSTD_LEVEL, "checksum": False}}]
    name = _blosc_name(compression)
    configuration = {
        "cname": name,
        "clevel": _BLOSC_LEVELS[name],
        "shuffle": "shuffle",
        "typesize": itemsize,
        "blocksize": 0,
    }
    return [{"name": "blosc", "configuration": configuration}]


def compress(chunk: Array, compression: Compression) -> bytes:
    """Return the compressed bytes of a contiguous chunk; equal chunks give equal bytes."""
    if compression == "zstd":
        from numcodecs import Zstd

        return bytes(Zstd(level=_ZSTD_LEVEL).encode(chunk))
    name = _blosc_name(compression)
    codec = _blosc().Blosc(cname=name, clevel=_BLOSC_LEVELS[name], shuffle=1, typesize=chunk.itemsize)
    return bytes(codec.encode(chunk))


def max_compressed(size: int) -> int:
    """Return more bytes than any codec makes of `size` bytes that it cannot compress."""
    return size + size // 128 + 4096


def decompress(data: bytes, out: Array, compression: Compression, where: str) -> None:
    """Decompress one chunk into `out` (uint8), whose size it must have exactly.

    Raises CacheCorrupt if it has another or is damaged; `where` names its file in the message.
    """
    # The decoders accept chunks smaller than the buffer and would leave the rest of it as it was.
    size = zstd_content_size(data) if compression == "zstd" else _blosc_content_size(data, _blosc_name(compression))
    if size != out.nbytes:
        raise CacheCorrupt(f"a chunk of {where} does not decompress to {out.nbytes} bytes")
    try:
        if compression == "zstd":
            from numcodecs import Zstd

            Zstd().decode(data, out)
        else:
            _blosc().decompress(data, out)
    except (RuntimeError, ValueError) as error:
        raise CacheCorrupt(f"a chunk of {where} is damaged: {error}") from error


def zstd_content_size(frame: bytes) -> int | None:
    """Return the content size that a zstd frame declares, or None if it declares none (RFC 8878, 3.1.1.1)."""
    if len(frame) < 5 or frame[:4] != _ZSTD_MAGIC:
        return None
    descriptor = frame[4]
    single_segment = descriptor >> 5 & 1
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    size = (single_segment, 2, 4, 8)[descriptor >> 6]
    if size == 0 or len(frame) < start + size:
        return None
    value = int.from_bytes(frame[start : start + size], "little")
    return value + 256 if size == 2 else value


def _blosc_content_size(data: bytes, name: str) -> int | None:
    """Return the content size that a Blosc chunk declares, or None for a header that no writer of caches makes.

    The decoder is told neither where the chunk ends nor where its blocks may lie; all it knows is the chunk's word.
    """
    if len(data) < _BLOSC_HEADER.size:
        return None
    version, _, flags, typesize, nbytes, blocksize, cbytes = _BLOSC_HEADER.unpack_from(data)
    known_flags = _BLOSC_SHUFFLED | _BLOSC_PLAIN | _BLOSC_UNSPLIT | _BLOSC_FORMATS[name] << 5
    if version != _BLOSC_FORMAT_VERSION or flags & ~known_flags or flags >> 5 != _BLOSC_FORMATS[name]:
        return None
    if cbytes != len(data) or typesize == 0 or not 0 < blocksize <= nbytes:
        return None
    if flags & _BLOSC_PLAIN:
        return nbytes if cbytes == nbytes + _BLOSC_HEADER.size else None
    first = _BLOSC_HEADER.size + 4 * -(-nbytes // blocksize)
    if first > len(data):
        return None
    starts = np.frombuffer(data, dtype="<u4", count=(first - _BLOSC_HEADER.size) // 4, offset=_BLOSC_HEADER.size)
    return nbytes if ((starts >= first) & (starts < len(data))).all() else None


def _blosc_name(compression: Compression) -> str:
    return compression.removeprefix("blosc:")


def _blosc() -> Any:
    from numcodecs import blosc

    # Its own threads hang after a fork, and write blocks in the order in which they happen to finish.
    blosc.use_threads = False
    return blosc
