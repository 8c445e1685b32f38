"""Student images: plain tar files, so that any tool can read them, with every image one read away."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np

from cache_schema.encoding.number_formats import Array
from cache_schema.errors import CacheCorrupt
from cache_schema.format.journal import Record, record_name
from cache_schema.storage import tar
from cache_schema.storage.checksum import crc32c
from cache_schema.storage.files import AsideFile
from cache_schema.storage.folder import ReadableFile

# Far more than the largest student image; a hostile index must not have a whole sparse tar read at once.
MAX_IMAGE_BYTES = 1 << 28
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


def check_tar(file: ReadableFile, rows: range, places: Sequence[tuple[int, int]], image_format: str) -> None:
    """Raise CacheCorrupt unless a file is the tar of the images of these rows, each where `places` says."""
    if len(places) != len(rows):
        raise CacheCorrupt(f"the journal speaks of {len(places)} images in {file.path}, there are {len(rows)}")
    tar.check_members(
        file, ((member_name(row, image_format), size) for row, (_, size) in zip(rows, places, strict=True))
    )
    end = 0
    for offset, size in places:
        if offset != end + tar.BLOCK:
            raise CacheCorrupt(f"the journal speaks of an image at byte {offset} of {file.path}, where there is none")
        end = offset + tar.padded(size)


def render_index(offsets: Sequence[tuple[int, int]]) -> bytes:
    """Return the bytes of `images/index.npy`: int64 (rows, 2), the offset and length of every image in its shard."""
    buffer = BytesIO()
    table = np.array(offsets, dtype="<i8").reshape(-1, 2)
    np.lib.format.write_array(buffer, table, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def index_size(rows: int) -> int:
    """Return the size in bytes of `images/index.npy` of a cache with `rows` images."""
    return len(_index_header(rows)) + 16 * rows


def parse_index(data: bytes, rows: int, where: str) -> Array:
    """Parse `images/index.npy` of a cache with `rows` images, int64 (rows, 2); raises CacheCorrupt if it is not one."""
    # The header is known to the byte, so nothing in it needs to be interpreted, least of all a pickled object.
    header = _index_header(rows)
    if len(data) != index_size(rows) or not data.startswith(header):
        raise CacheCorrupt(f"{where} is not the index of this cache's images: no .npy file of {(rows, 2)} int64")
    return np.frombuffer(data, dtype="<i8", offset=len(header)).reshape(rows, 2)


def _index_header(rows: int) -> bytes:
    stream = BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<i8", "fortran_order": False, "shape": (rows, 2)})
    return stream.getvalue()


def recorded_places(record: Record) -> Array:
    """Return where the images of a shard are by its record, int64 (rows, 2); raises CacheCorrupt as `check_places`."""
    places = np.array(record.offsets, dtype=np.int64).reshape(-1, 2)
    return check_places(places, record_name("images", record.shard))


def check_places(places: Array, where: str) -> Array:
    """Return the places (rows, 2) of the images of one shard if they can be those of a tar file.

    Raises CacheCorrupt where images overlap, leave no room for the header before them, or are larger than an image.
    """
    offsets, sizes = places[:, 0], places[:, 1]
    possible = (sizes >= 0) & (sizes <= MAX_IMAGE_BYTES) & (offsets >= tar.BLOCK) & (offsets <= 1 << 62)
    if not possible.all() or (offsets[1:] - tar.BLOCK < offsets[:-1] + sizes[:-1]).any():
        raise CacheCorrupt(f"{where} speaks of images that are not inside their file, one after the other")
    return places
