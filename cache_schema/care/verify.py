"""Checking a cache: every byte against the journal, every file against what the manifest promises."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from cache_schema.advice import how_to_mend
from cache_schema.errors import CacheCorrupt, CacheError, printable
from cache_schema.format import layout
from cache_schema.format.journal import JOURNAL_FOLDER, FileRecord, Kind, Record, committed, read_record, record_name
from cache_schema.format.layout import ArrayLayout
from cache_schema.format.manifest import Manifest
from cache_schema.format.manifest_file import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SIGNATURE_NAME,
    load_manifest,
    render_document,
)
from cache_schema.format.samples import check_against_manifest, count_usable, load_samples
from cache_schema.read_ahead import ReadAhead
from cache_schema.storage.files import FileDigest, is_aside
from cache_schema.storage.folder import Folder
from cache_schema.storage.places import folder_at
from cache_schema.stores.base import FeatureStore
from cache_schema.stores.checked_rows import ArrayRows, ImageRows
from cache_schema.stores.images import check_tar, render_index
from cache_schema.stores.registry import store_of

_KINDS_WITH_SHARDS: tuple[Kind, Kind] = ("features", "images")


@dataclass(frozen=True)
class Problem:
    """Something wrong in a cache: the file, relative to it, and, where it is one's, the shard and its rows [a, b).

    `samples` are the ids of the first and the last of those rows, where the samples table can be read; `kind` is the
    kind of the piece that the file is of, None for the manifest and for what does not belong to the cache.
    """

    file: str
    shard: int | None
    rows: tuple[int, int] | None
    reason: str
    kind: Kind | None = field(default=None, compare=False)
    samples: tuple[str, str] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        where = [] if self.shard is None else [f"shard {self.shard}"]
        if self.rows is not None:
            first, last = self.rows[0], self.rows[1] - 1
            one = first == last
            where.append(f"row {first}" if one else f"rows {first} to {last}")
            if self.samples is not None:
                names = [repr(name) for name in self.samples]
                where.append(f"sample {names[0]}" if one else f"samples {names[0]} to {names[1]}")
        address = f" ({', '.join(where)})" if where else ""
        return printable(f"{self.file}{address}: {self.reason}")


@dataclass(frozen=True)
class Piece:
    """A piece that the manifest promises: its record, the rows it covers and the files it consists of.

    Files of features come with the arrays that are in them.
    """

    kind: Kind
    shard: int
    rows: tuple[int, int] | None
    files: Mapping[str, Sequence[ArrayLayout]]

    @property
    def problem_shard(self) -> int | None:
        return self.shard if self.kind in _KINDS_WITH_SHARDS else None


def verify(path: str | os.PathLike[str], threads: int = 4) -> list[Problem]:
    """Check every file of a cache and return all that is wrong with it, in an order that only depends on the damage.

    `threads` files are read at a time. In a cache that is not sealed, pieces that were never committed are no problem.
    Raises CacheNotFound where there is no cache and UnsupportedSchema for one this release cannot read.
    """
    folder = folder_at(path)
    try:
        manifest = load_manifest(folder)
    except CacheCorrupt as error:
        return [Problem(MANIFEST_NAME, None, None, str(error))]
    problems = list(_check_manifest_bytes(folder))
    known = {MANIFEST_NAME, SIGNATURE_NAME}
    store, done = store_of(manifest), set(committed(folder))
    samples = _load_table(folder, manifest)

    def check(piece: Piece) -> tuple[Piece, list[Problem]]:
        return piece, [_named(problem, piece, samples) for problem in _check_if_due(folder, store, piece, done)]

    with ReadAhead(check, threads=threads) as ahead:
        for piece, found in ahead.over(_pieces(store, done, samples)):
            problems += found
            # Files of an uncommitted piece are what a builder was putting in place; it will write them again.
            known.update([record_name(piece.kind, piece.shard), *piece.files])
    problems += [Problem(name, None, None, reason) for name, reason in _strangers(folder, known)]
    return problems


def advice(problems: list[Problem], path: str | os.PathLike[str]) -> str:
    """Return one line that counts the problems of the cache at `path` and says what to do about them."""
    folder = folder_at(path)
    count = f"{len(problems)} problem{'' if len(problems) == 1 else 's'} in {folder}"
    if any(problem.kind is not None for problem in problems):
        return f"{count}; {how_to_mend(folder)}"
    if any(problem.file == MANIFEST_NAME for problem in problems):
        return f"{count}; copy the cache here again, or build it anew in an empty directory"
    return f"{count}; nothing of the cache itself is damaged: remove what does not belong to it"


def _check_if_due(folder: Folder, store: FeatureStore, piece: Piece, done: set[tuple[Kind, int]]) -> Iterator[Problem]:
    if piece.kind == "seal" and not store.manifest.sealed:
        # Whoever was sealing the cache did not finish, and will write this again.
        return
    if (piece.kind, piece.shard) in done:
        yield from _check_piece(folder, store, piece)
    elif store.manifest.sealed:
        name = record_name(piece.kind, piece.shard)
        yield Problem(name, piece.problem_shard, piece.rows, "the journal record is missing")


def _named(problem: Problem, piece: Piece, samples: pa.Table | None) -> Problem:
    rows = problem.rows
    if samples is None or rows is None or not rows[0] < rows[1] <= samples.num_rows:
        return replace(problem, kind=piece.kind)
    ids = (samples["id"][rows[0]].as_py(), samples["id"][rows[1] - 1].as_py())
    return replace(problem, kind=piece.kind, samples=ids)


def pieces_of(folder: Folder, manifest: Manifest) -> Iterator[Piece]:
    """Yield what the cache in a folder should consist of."""
    return _pieces(store_of(manifest), set(committed(folder)), _load_table(folder, manifest))


def _pieces(store: FeatureStore, done: set[tuple[Kind, int]], samples: pa.Table | None) -> Iterator[Piece]:
    """Yield what the cache should consist of; without a table to bear the manifest out, what the journal speaks of."""
    manifest, sizes = store.manifest, store.manifest.store
    image_rows = None if samples is None else count_usable(samples)
    yield Piece("layout", 0, None, _plain([*store.documents(), layout.SAMPLES_NAME]))
    if manifest.encoding.calibrated:
        yield Piece("calibration", 0, None, _plain(map(store.calibration_file, layout.all_calibrations(manifest))))
    for shard in _shards(sizes.feature_shards, "features", done, image_rows):
        rows = layout.rows_of_shard(shard, sizes.samples_per_shard, manifest.dataset.feature_rows)
        yield Piece("features", shard, (rows.start, rows.stop), store.shard_files(shard))
    for shard in _shards(sizes.image_shards, "images", done, image_rows):
        rows = layout.rows_of_shard(shard, sizes.images_per_shard, image_rows or 0)
        known_rows = None if image_rows is None else (rows.start, rows.stop)
        yield Piece("images", shard, known_rows, _plain([layout.image_file(shard)]))
    sealed = [layout.CARD_NAME] + ([] if manifest.images is None else [layout.IMAGE_INDEX_NAME])
    yield Piece("seal", 0, None, _plain(sealed))


def _plain(files: Iterable[str]) -> dict[str, Sequence[ArrayLayout]]:
    return dict.fromkeys(files, ())


def _shards(count: int, kind: Kind, done: set[tuple[Kind, int]], image_rows: int | None) -> Iterable[int]:
    if image_rows is not None:
        return range(count)
    return sorted(shard for found, shard in done if found == kind and shard < count)


def _load_table(folder: Folder, manifest: Manifest) -> pa.Table | None:
    """Return the samples table, or None unless it bears the manifest out.

    A damaged table is reported with the other files; here it means that the manifest's counts, which could be in the
    billions, are not to be believed.
    """
    try:
        samples = load_samples(folder)
        check_against_manifest(samples, manifest)
    except CacheError:
        return None
    return samples


def _check_manifest_bytes(folder: Folder) -> Iterator[Problem]:
    # The checksum covers what the manifest says; this covers white space and digits that do not change a number.
    data = folder.read_bounded(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    document = json.loads(data)
    if data != render_document(document):
        yield Problem(MANIFEST_NAME, None, None, "the file was altered without changing what it says")
    elif document.get("sealed") and document["provenance"].get("checksum") is None:
        yield Problem(MANIFEST_NAME, None, None, "the checksum of the manifest is missing")


def _check_piece(folder: Folder, store: FeatureStore, piece: Piece) -> Iterator[Problem]:
    name = record_name(piece.kind, piece.shard)
    try:
        record = read_record(folder, piece.kind, piece.shard)
    except (CacheCorrupt, OSError) as error:
        yield Problem(name, piece.problem_shard, piece.rows, str(error))
        return
    assert record is not None
    if piece.rows is None and piece.kind in _KINDS_WITH_SHARDS:
        piece = replace(piece, rows=record.rows)
    if piece.rows is not None and record.rows != piece.rows:
        yield Problem(name, piece.shard, piece.rows, f"the record says it covers rows {record.rows}")
        return
    if record.files.keys() != piece.files.keys():
        wrong = sorted(record.files.keys() ^ piece.files.keys())
        yield Problem(name, piece.problem_shard, piece.rows, f"the record names the wrong files ({wrong[0]})")
        return
    for file, expected in record.files.items():
        yield from _check_file(folder, store, piece, record, file, expected)


def _check_file(
    folder: Folder, store: FeatureStore, piece: Piece, record: Record, name: str, expected: FileRecord
) -> Iterator[Problem]:
    shard, size = piece.problem_shard, folder.size(name)
    if size is None or folder.is_link(name):
        reason = "the file is missing" if not folder.exists(name) else "this is not a plain file"
        yield Problem(name, shard, piece.rows, reason)
        return
    try:
        # A file of the wrong size need not be read, and one with a petabyte of holes could not be.
        found = folder.digest(name) if size == expected.bytes else FileDigest(size, "")
    except OSError as error:
        yield Problem(name, shard, piece.rows, f"the file cannot be read: {error.strerror}")
        return
    if found.bytes != expected.bytes:
        yield Problem(name, shard, piece.rows, f"the file has {found.bytes} bytes instead of {expected.bytes}")
    elif found.crc32c != expected.crc32c:
        yield from _locate_damage(folder, store, piece, record, name, expected)
    else:
        yield from _check_contents(folder, store, piece, record, name)


def _check_contents(folder: Folder, store: FeatureStore, piece: Piece, record: Record, name: str) -> Iterator[Problem]:
    """Say what is wrong with a file that matches its record: whoever altered one may have altered the other."""
    try:
        if piece.kind == "features":
            file = folder.open(name)
            store.check_frame(file, piece.shard)
            for array in piece.files[name]:
                store.read_index(file, array, piece.shard)
        elif piece.kind == "images" and piece.rows is not None and store.manifest.images is not None:
            check_tar(folder.open(name), range(*piece.rows), record.offsets, store.manifest.images.format)
        elif piece.kind == "layout" and name in (documents := store.documents()):
            if folder.read_bounded(name, len(documents[name])) != documents[name]:
                raise CacheCorrupt("this is not the metadata that the manifest implies")
        elif name == layout.SAMPLES_NAME:
            check_against_manifest(load_samples(folder), store.manifest)
        elif piece.kind == "calibration":
            files = {store.calibration_file(known): known for known in layout.all_calibrations(store.manifest)}
            data = folder.read_bounded(name, store.calibration_size(files[name]))
            store.parse_calibration(files[name], data, folder.where(name))
        elif name == layout.IMAGE_INDEX_NAME:
            _check_index(folder)
    except CacheError as error:
        yield Problem(name, piece.problem_shard, piece.rows, str(error))


def _check_index(folder: Folder) -> None:
    try:
        records = [read_record(folder, *piece) for piece in sorted(committed(folder)) if piece[0] == "images"]
    except CacheCorrupt:
        # That is reported by itself.
        return
    expected = render_index([place for record in records if record is not None for place in record.offsets])
    if folder.read_bounded(layout.IMAGE_INDEX_NAME, len(expected)) != expected:
        raise CacheCorrupt("this is not where the journal says that the images are")


def _locate_damage(
    folder: Folder, store: FeatureStore, piece: Piece, record: Record, name: str, expected: FileRecord
) -> Iterator[Problem]:
    """Say which rows of a file of the right size are damaged."""
    checksums = expected.piece_checksums()
    if piece.rows is None or checksums is None:
        yield Problem(name, piece.problem_shard, piece.rows, "the contents are damaged (checksum)")
        return
    first = piece.rows[0]
    try:
        bad = damaged_rows(folder, store, record, name)
    except CacheCorrupt as error:
        yield Problem(name, piece.shard, piece.rows, f"none of its rows can be found: {error}")
        return
    for start, stop in _ranges(bad):
        yield Problem(name, piece.shard, (first + start, first + stop), "the contents are damaged (checksum)")
    if not bad:
        yield Problem(name, piece.shard, piece.rows, "damaged between the rows, which are themselves intact")


def damaged_rows(folder: Folder, store: FeatureStore, record: Record, name: str) -> list[int]:
    """Return which rows of a shard file, counted from its first, do not match their checksums.

    `name` is the file's in the record. Raises CacheCorrupt where rows cannot be told apart.
    """
    file = folder.open(name)
    if record.kind == "images":
        images = ImageRows(file, record, name)
        return [row for row in range(len(images)) if images.image(row) is None]
    rows = range(record.rows[1] - record.rows[0])
    arrays = [ArrayRows(store, file, record, array) for array in store.shard_files(record.shard)[name]]
    return [row for row in rows if any(array.chunks(row) is None for array in arrays)]


def _ranges(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Group ascending numbers into half-open ranges."""
    start = stop = None
    for number in numbers:
        if start is None or stop is None:
            start, stop = number, number + 1
        elif number == stop:
            stop += 1
        else:
            yield start, stop
            start, stop = number, number + 1
    if start is not None and stop is not None:
        yield start, stop


def _strangers(folder: Folder, known: set[str]) -> Iterator[tuple[str, str]]:
    """Yield what lies in the folder without belonging to the cache."""
    for name in folder.walk():
        if is_aside(name):
            yield name, "a file that a writer left behind; resuming the build removes it"
        elif name not in known:
            yield name, "this file does not belong to the cache"
        elif name.startswith((MANIFEST_NAME, f"{JOURNAL_FOLDER}/")) and folder.is_link(name):
            # Of the other files, the check against their record says so.
            yield name, "this is not a plain file"
