"""Shards, tars, indexes and compressed chunks that were altered and signed again."""

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_building import damage
from cache_hostile import READING, forge_record, vouch_for
from numcodecs import Zstd

from cache_schema.storage.checksum import crc32c
from cache_schema.storage.open_file import OpenFile
from cache_schema.storage.tar import archive_end, check_members, member_header, padding

Attack = Callable[..., Any]
SHARD = "features/hidden/c/0/0/0/0/0"
CHUNKS = 18
CHUNK = 6 * 8 * 4
MISSING = 2**64 - 1


def forge_index(change: Callable[[np.ndarray, int], object], grow: int = 0) -> Callable[[Path], None]:
    """Alter the chunk index of a shard, given its table (chunks, 2) and the bytes before it, and sign all of it."""

    def plant(root: Path) -> None:
        data = (root / SHARD).read_bytes()
        body = len(data) - 16 * CHUNKS - 4
        table = np.frombuffer(data[body:-4], dtype="<u8").reshape(-1, 2).copy()
        change(table, body + grow)
        index = table.tobytes()
        with (root / SHARD).open("wb") as file:
            file.write(data[:body])
            file.seek(body + grow)
            file.write(index + crc32c(index).to_bytes(4, "little"))
        if grow < 1 << 30:
            vouch_for(root, "features-00000", SHARD)

    return plant


def put(row: int, offset: int, length: int | None = None) -> Callable[[np.ndarray, int], None]:
    def change(table: np.ndarray, _: int) -> None:
        table[row] = [offset, table[row, 1] if length is None else length]

    return change


INDEXES = {
    "outside": forge_index(put(3, 1 << 40)),
    "just outside": forge_index(put(3, CHUNK * CHUNKS - 1)),
    "into the index": forge_index(lambda table, body: put(17, body - 8)(table, body)),
    "negative": forge_index(put(3, 2**64 - CHUNK)),
    "huge": forge_index(put(3, 0, 2**63)),
    "all the same": forge_index(lambda table, _: table.__setitem__((slice(None), 0), 0)),
    "overlapping": forge_index(put(3, 2 * CHUNK + 1)),
    "half missing": forge_index(put(3, MISSING)),
    "missing": forge_index(put(3, MISSING, MISSING)),
}


@pytest.mark.parametrize("what", INDEXES)
def test_a_signed_chunk_index_that_lies_is_refused(attack: Attack, what: str) -> None:
    outcome = attack(INDEXES[what], (*READING, "convert"))
    expected = {"read", "convert"} if what == "missing" else {"read", "verify", "convert"}
    assert expected <= outcome.refused()


@pytest.mark.parametrize("compression", ["zstd", "blosc:lz4", "blosc:zstd"])
def test_chunks_of_a_terabyte_in_a_compressed_shard_are_refused(attack: Attack, compression: str) -> None:
    outcome = attack(forge_index(put(17, 0, 1 << 40), 1 << 40), ("read",), compression=compression)
    assert "read" in outcome.refused()


@pytest.mark.parametrize(("compression", "bomb"), [("zstd", "zstd"), ("blosc:lz4", "lz4"), ("blosc:zstd", "zstd")])
def test_a_decompression_bomb_is_not_unpacked(attack: Attack, compression: str, bomb: str) -> None:
    """One chunk that is valid, expands to 64 MB where 192 bytes are due, and whose every checksum is right."""
    from numcodecs import Blosc

    codec = Zstd(level=3) if compression == "zstd" else Blosc(cname=bomb)
    packed = bytes(codec.encode(np.zeros(64 << 20, np.uint8)))

    def plant(root: Path) -> None:
        forge_index(lambda table, body: put(17, body - len(packed), len(packed))(table, body), len(packed))(root)
        with (root / SHARD).open("r+b") as file:
            file.seek(-16 * CHUNKS - 4 - len(packed), os.SEEK_END)
            file.write(packed)
        vouch_for(root, "features-00000", SHARD)

        def checksum(record: dict[str, Any]) -> None:
            pieces = record["files"][SHARD]["piece_crc32c"]
            record["files"][SHARD]["piece_crc32c"] = f"{pieces[:-8]}{crc32c(packed):08x}"

        forge_record(root, "features-00000", checksum)

    assert {"read", "convert"} <= attack(plant, (*READING, "convert"), compression=compression).refused()


class Exploit:
    """Leaves a trace when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self._canary),))


def pickled_array(canary: Path, version: tuple[int, int] = (1, 0)) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([Exploit(canary)] * 10, dtype=object), version=version)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("store", "record", "name"),
    [
        ("zarr", "seal-00000", "images/index.npy"),
        ("webdataset", "calibration-00000", "features/hidden.channel.npy"),
        ("zarr", "calibration-00000", "features/hidden.channel/c/0/0"),
        ("webdataset", "features-00000", "features/00000.tar"),
        ("zarr", "layout-00000", "samples.parquet"),
    ],
)
def test_nothing_pickled_is_executed(attack: Attack, tmp_path: Path, store: str, record: str, name: str) -> None:
    canary = tmp_path / "executed"
    for data in (pickled_array(canary), pickle.dumps(Exploit(canary))):

        def plant(root: Path, data: bytes = data) -> None:
            (root / name).write_bytes(data)
            vouch_for(root, record, name)

        outcome = attack(plant, (*READING, "convert"), kind="int8", store=store)
        assert "convert" in outcome.refused() or name == "images/index.npy"
        assert {"read", "images", "samples", "verify"} & outcome.refused()
    assert not canary.exists()


@pytest.mark.parametrize(
    "header",
    ["(" * 5000, "{'descr': '<i8', 'fortran_order': False, 'shape': (1 << 60, 2)}", "\0"],
    ids=["deep", "lie", "zero"],
)
def test_the_header_of_an_array_is_compared_not_interpreted(attack: Attack, header: str) -> None:
    def plant(root: Path) -> None:
        for name, record in (("images/index.npy", "seal-00000"), ("features/hidden.channel.npy", "calibration-00000")):
            text = header.encode()
            (root / name).write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
            vouch_for(root, record, name)

    assert {"read", "images", "verify"} <= attack(plant, READING, kind="int8", store="webdataset").refused()


def tar_of(*members: tarfile.TarInfo, form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, linked: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, linked
    return info


TARS = {
    "a path upwards": tar_of(member("../../precious/notes.txt", 9)),
    "an absolute path": tar_of(member("/tmp/owned", 9)),
    "a symbolic link": tar_of(member("00000000.png", kind=tarfile.SYMTYPE, linked="../../precious")),
    "a hard link": tar_of(member("00000000.png", kind=tarfile.LNKTYPE, linked="/etc/passwd")),
    "a device": tar_of(member("00000000.png", kind=tarfile.CHRTYPE)),
    "a long name": tar_of(member("../" * 90 + "tmp/owned", 9)),
    "a pax path": tar_of(member("../" * 90 + "tmp/owned", 9), form=tarfile.PAX_FORMAT),
    "a sparse member": tar_of(member("00000000.png", kind=tarfile.GNUTYPE_SPARSE)),
    "nothing": tar_of(),
}


@pytest.mark.parametrize("what", TARS)
@pytest.mark.parametrize("kind", ["features", "images"])
def test_a_signed_tar_of_strange_members_is_reported_and_never_extracted(attack: Attack, kind: str, what: str) -> None:
    name, record = f"{kind}/00000.tar", f"{kind}-00000"

    def plant(root: Path) -> None:
        # As long as the real one, so that its size says nothing.
        size = (root / name).stat().st_size
        (root / name).write_bytes(TARS[what][:size].ljust(size, b"\0"))
        vouch_for(root, record, name)

    outcome = attack(plant, (*READING, "convert"), store="webdataset")
    assert {"verify", "convert"} <= outcome.refused()


@pytest.mark.parametrize("kind", ["features", "images"])
def test_one_altered_header_in_a_signed_tar_is_reported(attack: Attack, kind: str) -> None:
    name = f"{kind}/00000.tar"

    def plant(root: Path) -> None:
        path = root / name
        link = member("00000000.png", kind=tarfile.SYMTYPE, linked="/etc").tobuf(tarfile.USTAR_FORMAT)
        path.write_bytes(link + path.read_bytes()[512:])
        vouch_for(root, f"{kind}-00000", name)

    outcome = attack(plant, (*READING, "convert"), store="webdataset")
    assert "does not have the member" in outcome.by_operation["verify"]
    assert outcome.by_operation["read"] == outcome.by_operation["images"] == outcome.by_operation["convert"] == "done"


def test_an_archive_is_what_its_members_make_it_to_the_last_byte(tmp_path: Path) -> None:
    members = [("a", 3), ("b", 512)]
    data = b"".join(member_header(name, size) + b"x" * size + padding(size) for name, size in members)
    path = tmp_path / "tar"
    path.write_bytes(data + archive_end(len(data)))
    check_members(OpenFile(str(path)), members)
    contents = [*range(512, 515), *range(1536, 2048)]
    for place in [*range(0, 512, 37), 515, 600, 1023, 1024, 1100, 2048, 3000, path.stat().st_size - 1]:
        assert place not in contents
        damage(path, place)
        with pytest.raises(Exception, match=r"does not have the member|has something after"):
            check_members(OpenFile(str(path)), members)
        damage(path, place)
