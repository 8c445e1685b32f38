"""Repairing a cache: what can be made again from the rest of it is, the rest is given back to the build to do."""

import os
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from cache_schema.care.verify import Problem, pieces_of, verify
from cache_schema.errors import CacheCorrupt
from cache_schema.format import layout
from cache_schema.format.journal import Kind, committed, file_record, read_record, record_name
from cache_schema.format.manifest import Manifest
from cache_schema.format.manifest_file import MANIFEST_NAME, as_unsealed, load_manifest, render_manifest
from cache_schema.storage.files import digest
from cache_schema.storage.local import LocalFolder, local_folder
from cache_schema.stores.registry import store_of
from cache_schema.writing.writer import write_seal

Action = Literal["restored", "removed", "rebuild", "left"]
_PieceId = tuple[Kind, int]
_LAYOUT: _PieceId = ("layout", 0)
_CALIBRATION: _PieceId = ("calibration", 0)
_SEAL: _PieceId = ("seal", 0)
_WORDS: dict[Action, str] = {
    "restored": "made again from the rest of the cache",
    "removed": "removed",
    "rebuild": "taken out, for the build to make again",
    "left": "left alone: it does not belong to the cache, remove it yourself",
}


@dataclass(frozen=True)
class Repair:
    """A problem and what was done about it."""

    problem: Problem
    action: Action

    def __str__(self) -> str:
        return f"{self.problem}; {_WORDS[self.action]}"


def repair(path: str | os.PathLike[str]) -> list[Repair]:
    """Verify the cache at `path` and mend what is damaged; return what was found and done, in the order of `verify`.

    The card, the index of the images and the arrays' metadata are made again from the manifest and the journal. Every
    other damaged piece is taken out with its journal record and the cache becomes an unsealed one, which the build that
    made it completes: it computes exactly those pieces and seals the cache again. Intact pieces are not touched, nor is
    anything that does not belong to the cache, apart from what dead writers left aside. It may be interrupted at any
    moment and done again.

    Raises CacheNotFound, UnsupportedSchema, CacheStorageError, and CacheCorrupt if the manifest itself is damaged, for
    nothing in a cache can replace it.
    """
    folder = local_folder(path)
    try:
        manifest = load_manifest(folder)
    except CacheCorrupt as error:
        raise CacheCorrupt(
            f"{error}; a cache cannot be mended without its manifest: copy that file back, or build the cache anew in "
            "an empty directory"
        ) from error
    folder.refuse_links()
    with folder.lock():
        problems = verify(folder.path)
        damage = _Damage(folder, manifest, problems)
        damage.mend()
    swept = set(folder.sweep())
    return [Repair(problem, damage.action(problem, swept)) for problem in [*problems, *damage.consequences]]


class _Damage:
    """The damaged pieces of a cache, sorted into those that can be restored and those to be built again."""

    def __init__(self, folder: LocalFolder, manifest: Manifest, problems: list[Problem]) -> None:
        self.folder, self.manifest = folder, manifest
        self.files: dict[_PieceId, set[str]] = defaultdict(set)
        for problem in problems:
            if problem.kind is not None:
                self.files[problem.kind, problem.shard or 0].add(problem.file)
        self.manifest_altered = any(problem.file == MANIFEST_NAME for problem in problems)
        self.consequences: list[Problem] = []
        self.pieces = {(piece.kind, piece.shard): piece for piece in pieces_of(folder, manifest)}
        self.metadata = self._restorable_metadata()
        self.rebuilt = {piece for piece in self.files if piece[0] != "seal"}
        if self.metadata:
            self.rebuilt.discard(_LAYOUT)
        if _CALIBRATION in self.rebuilt and self._calibration_lost():
            # Nothing is left to say which calibration the shards were encoded with.
            self._give_up_features()
        # What a manifest says without its checksum is only believed as far as the cache id covers it.
        unsure = manifest.sealed and manifest.provenance.checksum is None
        self.unseals = manifest.sealed and (unsure or bool(self.rebuilt))

    def action(self, problem: Problem, swept: set[str]) -> Action:
        """Say what was done about a problem."""
        if problem.kind is None and problem.file != MANIFEST_NAME:
            return "removed" if problem.file in swept else "left"
        if problem.kind in (None, "seal"):
            return "rebuild" if self.unseals else "restored"
        assert problem.kind is not None
        return "rebuild" if (problem.kind, problem.shard or 0) in self.rebuilt else "restored"

    def mend(self) -> None:
        """Do it. Whatever is interrupted leaves a cache in which `verify` finds the rest."""
        for name, data in self.metadata.items():
            self.folder.write(name, data)
        if self.unseals or self.manifest_altered:
            # Before anything is taken out: from here on nobody takes the cache for a complete one.
            manifest = as_unsealed(self.manifest) if self.unseals else self.manifest
            self.folder.write(MANIFEST_NAME, render_manifest(manifest))
        if _SEAL in self.files and not self.unseals:
            write_seal(self.folder, self.manifest)
        self._take_out()

    def _give_up_features(self) -> None:
        store, rows = self.manifest.store, self.manifest.dataset.feature_rows
        for piece in sorted(committed(self.folder)):
            if piece[0] == "features" and piece in self.pieces and piece not in self.rebuilt:
                self.rebuilt.add(piece)
                covered = layout.rows_of_shard(piece[1], store.samples_per_shard, rows)
                reason = "it was encoded with a calibration that is lost"
                self.consequences.append(
                    Problem(record_name(*piece), piece[1], (covered.start, covered.stop), reason, "features")
                )

    def _take_out(self) -> None:
        taken = self.rebuilt | ({_SEAL} if self.unseals else set())
        # Features before the calibration that says how they were encoded.
        for piece in sorted(taken, key=lambda piece: (piece == _CALIBRATION, piece)):
            if piece != _CALIBRATION:
                # Without its record a piece does not exist, whatever lies there.
                self.folder.delete(record_name(*piece))
            # What is intact of the calibration tells the build whether what it computes is the same.
            whole = piece not in (_CALIBRATION, _LAYOUT)
            for name in self.pieces[piece].files if whole else self.files[piece]:
                self.folder.delete(name)

    def _restorable_metadata(self) -> dict[str, bytes]:
        """Return the arrays' metadata files to write again; none unless that mends all of the layout."""
        wanted = self.files.get(_LAYOUT, set())
        documents = store_of(self.manifest).documents()
        try:
            record = read_record(self.folder, "layout")
        except (CacheCorrupt, OSError):
            return {}
        known = {} if record is None else record.files
        if not all(name in documents and known.get(name) == file_record(digest(documents[name])) for name in wanted):
            return {}
        return {name: documents[name] for name in sorted(wanted)}

    def _calibration_lost(self) -> bool:
        """Say whether nothing is left that a calibration computed again could be compared with."""
        record = record_name(*_CALIBRATION)
        files = set(self.pieces[_CALIBRATION].files)
        return record in self.files[_CALIBRATION] and not all(self.folder.size(name) is not None for name in files)
