"""Sending the pieces of a cache to a place that writes in commits: few of them, each read back before it counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cache_schema.errors import CacheCorrupt
from cache_schema.format.journal import FileRecord, record_name, render_record
from cache_schema.sharing.rewriting import Rewritten
from cache_schema.sharing.transfer import Advance, in_parallel, matches
from cache_schema.storage.checksum import Bytes
from cache_schema.storage.local import LocalFolder
from cache_schema.storage.remote import RemoteFolder

# A commit also holds the records of the pieces that the one before completed, and at the end the manifest.
_LEFT_FREE = 6
_MOST_BYTES = 4_000_000_000  # of a commit: what is behind it is not sent again


@dataclass(frozen=True)
class _File:
    name: str
    expected: FileRecord
    piece: int  # its place among the pieces


@dataclass
class CommittedPieces:
    """Sends pieces in commits. `ready` are the records of pieces that are there, read back and right.

    They go with the next commit, so that a piece with a record is whole, and an interruption sends only the files of
    the commit under way again.
    """

    source: LocalFolder
    target: RemoteFolder
    advance: Advance
    ready: dict[str, bytes] = field(default_factory=dict)

    def send(self, pieces: Sequence[Rewritten]) -> None:
        """Send all files of some pieces; raises CacheCorrupt where either end has other bytes than the records say."""
        left = [len(piece.record.files) for piece in pieces]
        for batch in self._batches(pieces):
            in_parallel(lambda file: self._check_here(pieces[file.piece], file), batch)
            contents: dict[str, Bytes | Path] = {
                file.name: pieces[file.piece].made.get(file.name, self.source.path / file.name) for file in batch
            }
            self.target.commit({**self.ready, **contents})
            self.ready = {}
            in_parallel(self._check_there, batch)
            for file in batch:
                left[file.piece] -= 1
                if not left[file.piece]:
                    record = pieces[file.piece].record
                    self.ready[record_name(record.kind, record.shard)] = render_record(record)

    def _batches(self, pieces: Sequence[Rewritten]) -> Iterator[list[_File]]:
        place = self.target.committing
        assert place is not None
        most = (place.files_per_commit - _LEFT_FREE) // 2
        batch: list[_File] = []
        total = 0
        for number, piece in enumerate(pieces):
            for name, expected in piece.record.files.items():
                if batch and (len(batch) == most or total + expected.bytes > _MOST_BYTES):
                    yield batch
                    batch, total = [], 0
                batch.append(_File(name, expected, number))
                total += expected.bytes
        if batch:
            yield batch

    def _check_here(self, piece: Rewritten, file: _File) -> None:
        if file.name not in piece.made and not matches(self.source.digest(file.name), file.expected):
            raise CacheCorrupt(
                f"{self.source.where(file.name)} does not match its checksum", remedy="verify lists all damage",
                cache=str(self.source), copied=True,
            )  # fmt: skip

    def _check_there(self, file: _File) -> None:
        # Sending again would not help: a hub that believes to have these bytes takes no others.
        if not any(matches(self.target.digest(file.name), file.expected) for _ in range(2)):
            raise CacheCorrupt(
                f"{self.target.where(file.name)} is not what was written there, read twice; do not trust that place"
            )
        self.advance(file.expected.bytes)
