"""Student images: plain tar files, so that any tool can read them, with every image one read away."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np

from cache_schema import tar
from cache_schema.encoding import Array
from cache_schema.errors import CacheCorrupt
from cache_schema.files import AsideFile, crc32c
from cache_schema.manifest import Manifest

EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}


def member_name(row: int, image_format: str) -> str:
    """Return the name of a row's image inside its tar file."""
    return f"{row:08d}.{EXTENSIONS[image_format]}"


def write_tar(
    file: AsideFile, rows: range, images: Sequence[bytes], image_format: str
) -> tuple[list[tuple[int, int]], list[int]]:
    """Write images as a tar file that depends on nothing else; return each one's (offset, length) and CRC-32C."""
    offsets, checksums = [], []
    for row, image in zip(rows, images, strict=True):
        file.write(tar.member_header(member_name(row, image_format), len(image)))
        offsets.append((file.size, len(image)))
        checksums.append(crc32c(image))
        file.write(image + tar.padding(len(image)))
    file.write(tar.archive_end(file.size))
    return offsets, checksums


def render_index(offsets: Sequence[tuple[int, int]]) -> bytes:
    """Return the bytes of `images/index.npy`: int64 (rows, 2), the offset and length of every image in its shard."""
    buffer = BytesIO()
    table = np.array(offsets, dtype="<i8").reshape(-1, 2)
    np.lib.format.write_array(buffer, table, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def parse_index(data: bytes, rows: int, where: str) -> Array:
    """Parse `images/index.npy` of a cache with `rows` images, int64 (rows, 2); raises CacheCorrupt if it is not one."""
    try:
        if not data.startswith(np.lib.format.magic(1, 0)):
            raise ValueError("no .npy file of version 1.0")
        stream = BytesIO(data)
        np.lib.format.read_magic(stream)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if shape != (rows, 2) or fortran or dtype != np.dtype("<i8"):
            raise ValueError(f"an array {shape} of {dtype}, expected {(rows, 2)} of int64")
        return np.frombuffer(data, dtype="<i8", offset=stream.tell(), count=2 * rows).reshape(rows, 2)
    except (ValueError, SyntaxError) as error:
        raise CacheCorrupt(f"{where} is not the index of this cache's images: {error}") from error


def count_image_rows(manifest: Manifest, image_states: Sequence[str]) -> int:
    """Return how many rows have a student image: all that are not quarantined, if the cache has images at all."""
    return 0 if manifest.images is None else sum(state == "ok" for state in image_states)
