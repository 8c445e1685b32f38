"""Plain ustar archives that depend on their contents and names alone: no owner, no time, no extension.

Source: https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html, section "ustar Interchange Format".
"""

from collections.abc import Iterable

from cache_schema.errors import CacheCorrupt
from cache_schema.storage.folder import ReadableFile

BLOCK = 512
# What an archive's size is a multiple of.
RECORD = 20 * BLOCK
# The largest size that the 11 octal digits of a ustar header can say.
MAX_MEMBER_BYTES = 8**11 - 1


def member_header(name: str, size: int) -> bytes:
    """Return the block that precedes the contents of a file member."""
    import tarfile

    # A fresh TarInfo has no owner, the epoch as its time, and mode 0644.
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def padded(size: int) -> int:
    """Return the bytes that contents of this size take: whole blocks."""
    return -(-size // BLOCK) * BLOCK


def padding(size: int) -> bytes:
    """Return what follows contents of this size."""
    return bytes(padded(size) - size)


def archive_size(members: int) -> int:
    """Return the size of an archive whose members, headers included, take so many bytes."""
    return -(-(members + 2 * BLOCK) // RECORD) * RECORD


def archive_end(members: int) -> bytes:
    """Return what follows the last of members that take so many bytes."""
    return bytes(archive_size(members) - members)


def check_members(file: ReadableFile, members: Iterable[tuple[str, int]]) -> None:
    """Raise CacheCorrupt unless an archive consists of exactly these members (name and size), one after the other.

    Every byte that is not contents is compared with what `member_header` and the others here write: there is no link,
    no path, no extension and nothing between or after the members for another reader to fall for.
    """
    place = 0
    for name, size in members:
        if not 0 <= size <= MAX_MEMBER_BYTES:
            raise CacheCorrupt(f"{file.path} cannot have a member {name} of {size} bytes")
        contents = place + BLOCK
        if file.read(place, BLOCK) != member_header(name, size):
            raise CacheCorrupt(f"{file.path} does not have the member {name} of {size} bytes at byte {place}")
        end = contents + padded(size)
        if any(file.read(contents + size, end - contents - size)):
            raise CacheCorrupt(f"{file.path} has something after its member {name}")
        place = end
    if file.size != archive_size(place) or any(file.read(place, file.size - place)):
        raise CacheCorrupt(f"{file.path} has something after its last member")
