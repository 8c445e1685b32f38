"""Plain ustar archives that depend on their contents and names alone: no owner, no time, no extension.

Source: https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html, section "ustar Interchange Format".
"""

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
