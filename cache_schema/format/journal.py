"""The journal: one small record per committed piece of a cache. A piece exists when its record exists."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, FiniteFloat, ValidationError

from cache_schema.errors import CacheCorrupt
from cache_schema.format.identity import canonical_json
from cache_schema.format.manifest import Count, FrozenModel
from cache_schema.storage.checksum import crc32c
from cache_schema.storage.files import FileDigest, digest
from cache_schema.storage.folder import Folder

JOURNAL_FOLDER = "journal"
MAX_RECORD_BYTES = 64 << 20

# "layout": the samples table and the arrays' metadata. "calibration": the channel calibrations. "features" and
# "images": one shard each. "seal": what is written when everything else is there.
Kind = Literal["layout", "calibration", "features", "images", "seal"]
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
_NAME = re.compile(r"(?P<kind>layout|calibration|features|images|seal)-(?P<shard>[0-9]{5,10})\.json")


class FileRecord(FrozenModel):
    """A file's size and CRC-32C and, for shards, the CRC-32C of every piece, so that damage has an address.

    A piece is what can be read alone: a chunk (one sample, view and timestep of an array), or an image. Checksums are
    joined into one string, in the order of the pieces in the file; in a tar of features, array after array. Chunks
    that are missing, those of samples without features in a Zarr shard, have the checksum 0.
    """

    bytes: Count
    crc32c: Checksum
    piece_crc32c: Annotated[str, Field(pattern=r"^([0-9a-f]{8})*$")] | None = None

    def piece_checksums(self) -> np.ndarray | None:
        """Return the CRC-32C of every piece, uint32 (pieces,), or None where the file has no pieces."""
        if self.piece_crc32c is None:
            return None
        return np.frombuffer(bytes.fromhex(self.piece_crc32c), dtype=">u4").astype(np.uint32)


class FailedRow(FrozenModel):
    """A row on whose features the teacher failed, and how."""

    row: Count
    reason: str


class QuarantinedSample(FrozenModel):
    """An image that was set aside before the build, and why."""

    id: str
    reason: str


class FidelitySums(FrozenModel):
    """What `cache_schema.encoding.fidelity` needs of one shard to compute the figures of the whole cache."""

    tap: str
    timestep: int
    tokens: Annotated[int, Field(ge=1)]
    cosine_sum: FiniteFloat
    cosine_min: FiniteFloat
    squared_error: Annotated[FiniteFloat, Field(ge=0)]
    energy: Annotated[FiniteFloat, Field(ge=0)]
    channel_error: Annotated[FiniteFloat, Field(ge=0)]


class Record(FrozenModel):
    """One committed piece: the rows `[a, b)` it covers, its files and, where it has them, fidelity and image places.

    `offsets` holds, for every row of an image shard, the first byte and the length of its image inside the tar file;
    `failed` the rows of a feature shard that have no features; `quarantined`, in the layout's record, the images that
    were set aside before the build.
    """

    kind: Kind
    shard: Count = 0
    rows: tuple[Count, Count] = (0, 0)
    files: dict[str, FileRecord]
    fidelity: list[FidelitySums] = Field(default_factory=list)
    offsets: list[tuple[Count, Count]] = Field(default_factory=list)
    failed: list[FailedRow] = Field(default_factory=list)
    quarantined: list[QuarantinedSample] = Field(default_factory=list)
    checksum: Checksum | None = None


def file_record(digest: FileDigest, piece_crc32c: Iterable[int] | None = None) -> FileRecord:
    """Make the record of a file from its digest and, for shards, the checksums of its pieces."""
    pieces = None if piece_crc32c is None else "".join(f"{crc:08x}" for crc in piece_crc32c)
    return FileRecord(bytes=digest.bytes, crc32c=digest.crc32c, piece_crc32c=pieces)


def record_name(kind: Kind, shard: int = 0) -> str:
    """Return the path of a record inside the cache."""
    return f"{JOURNAL_FOLDER}/{kind}-{shard:05d}.json"


def render_record(record: Record) -> bytes:
    """Return the bytes of a record's file, with its checksum filled in."""
    return _render(record.model_dump(mode="json"))


def write_record(folder: Folder, record: Record) -> None:
    """Commit a piece: from here on it exists."""
    folder.write(record_name(record.kind, record.shard), render_record(record))


def parse_record(data: bytes, where: str) -> Record:
    """Turn the bytes of a record into a `Record`; anything but the exact bytes once written raises CacheCorrupt."""
    try:
        document = json.loads(data)
        intact = isinstance(document, dict) and data == _render(document)
        record = Record.model_validate(_migrate(document))
    except (ValueError, RecursionError, ValidationError) as error:
        raise CacheCorrupt(f"journal record {where} is not valid: {str(error).splitlines()[0][:200]}") from error
    if not intact:
        raise CacheCorrupt(f"journal record {where} was altered: it does not match its own checksum")
    return record


def read_record(folder: Folder, kind: Kind, shard: int = 0) -> Record | None:
    """Return a record of the cache in a folder, or None where that piece was not committed."""
    name = record_name(kind, shard)
    where = folder.where(name)
    try:
        data = folder.read_bounded(name, MAX_RECORD_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheCorrupt(f"journal record {where} cannot be read ({error.strerror})") from error
    record = parse_record(data, where)
    if (record.kind, record.shard) != (kind, shard):
        raise CacheCorrupt(f"journal record {where} is that of {record.kind} {record.shard}")
    return record


def read_committed(folder: Folder, kind: Kind, name: str, limit: int) -> bytes | None:
    """Return the contents of a file of the layout, the calibration or the seal, exactly as they were committed.

    `limit` is the largest size in bytes that such a file can have, whatever its record says. None where that piece was
    not committed; raises CacheCorrupt where the file is not what the record says.
    """
    record = read_record(folder, kind)
    if record is None:
        return None
    where, expected = folder.where(name), record.files.get(name)
    if expected is None:
        raise CacheCorrupt(f"journal record {folder.where(record_name(kind))} does not know {name}")
    try:
        data = folder.read_bounded(name, min(expected.bytes, limit))
    except FileNotFoundError:
        raise CacheCorrupt(f"{where} is missing") from None
    except OSError as error:
        raise CacheCorrupt(f"{where} cannot be read ({error.strerror})") from error
    if (len(data), digest(data).crc32c) != (expected.bytes, expected.crc32c):
        raise CacheCorrupt(f"{where} is damaged: it does not match its checksum")
    return data


def is_committed(folder: Folder, kind: Kind, shard: int = 0) -> bool:
    """Say whether a piece is committed."""
    return folder.exists(record_name(kind, shard))


def committed(folder: Folder) -> Iterator[tuple[Kind, int]]:
    """Yield the kind and number of every committed piece, in no particular order."""
    try:
        names = folder.names(JOURNAL_FOLDER)
    except OSError as error:
        raise CacheCorrupt(f"cannot list {folder.where(JOURNAL_FOLDER)}: {error.strerror}") from error
    for name in names:
        match = _NAME.fullmatch(name)
        if match is not None:
            kind: Any = match["kind"]
            yield kind, int(match["shard"])


def committed_shards(folder: Folder, kind: Kind) -> set[int]:
    """Return the numbers of the committed shards of one kind."""
    return {shard for found, shard in committed(folder) if found == kind}


def _render(document: dict[str, Any]) -> bytes:
    return (canonical_json({**document, "checksum": _checksum(document)}) + "\n").encode("ascii")


def _migrate(document: dict[str, Any]) -> dict[str, Any]:
    """Return a record as this release knows it; in schema version 1 a piece was a whole row, listed in `row_crc32c`."""
    if not isinstance(document, dict) or not isinstance(document.get("files"), dict):
        return document
    files = {}
    for name, file in document["files"].items():
        if isinstance(file, dict) and "row_crc32c" in file:
            rows = file["row_crc32c"]
            file = {key: value for key, value in file.items() if key != "row_crc32c"}
            file["piece_crc32c"] = "".join(map(str, rows)) if isinstance(rows, list) else rows
        files[name] = file
    return {**document, "files": files}


def _checksum(document: dict[str, Any]) -> str:
    body = {name: value for name, value in document.items() if name != "checksum"}
    return f"{crc32c(canonical_json(body).encode('ascii')):08x}"
