"""Bringing a sealed cache to a place where others find it: piece by piece, resumable, visible once it is whole."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cache_schema.errors import CacheCorrupt, CacheError, CacheMismatch, CacheNotFound, CacheUnsealed
from cache_schema.format.journal import (
    MAX_RECORD_BYTES,
    Kind,
    Record,
    committed,
    read_record,
    record_name,
    render_record,
)
from cache_schema.format.manifest import Manifest
from cache_schema.format.manifest_file import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SIGNATURE_NAME,
    build_checksum,
    load_manifest,
    render_manifest,
    revalidate,
)
from cache_schema.sharing.committing import CommittedPieces
from cache_schema.sharing.rewriting import Rewritten, rewrite
from cache_schema.sharing.scrubbing import scrub
from cache_schema.sharing.signing import sha256_of, sign
from cache_schema.sharing.transfer import Advance, committing_place, delete_all, in_parallel, send, sizes_of
from cache_schema.storage.checksum import crc32c
from cache_schema.storage.folder import Folder
from cache_schema.storage.local import LocalFolder, local_folder
from cache_schema.storage.places import folder_at
from cache_schema.storage.remote import RemoteFolder

# Says which build of a cache is on its way, so that no two builds of it are mixed; gone once it is whole.
CLAIM_NAME = "push.json"
_MAX_CLAIM = 1 << 16
_ORDER: dict[Kind, int] = {"layout": 0, "calibration": 1, "images": 2, "features": 3, "seal": 4}


@dataclass(frozen=True)
class Plan:
    """A push as it would be done: what is sent, what of the manifest is changed first, how many bytes it is."""

    source: LocalFolder
    target: Folder
    manifest: Manifest
    changes: list[str]
    pieces: list[Rewritten]
    bytes_total: int
    key: Path | None = field(default=None)


def plan_push(source: str, url: str, key: Path | None = None, owner: str | None = None) -> Plan:
    """Plan the push of the sealed cache in the folder `source` to `url`; nothing is written.

    `key` signs the manifest; `owner` is whom the catalogue names, None who was named before. Raises CacheUnsealed,
    CacheCorrupt, and CacheError for what looks like a secret.
    """
    folder = local_folder(source)
    manifest = load_manifest(folder)
    if not manifest.sealed:
        raise CacheUnsealed(f"cache {folder} is not complete, so it cannot be pushed; run its build again first")
    target = folder_at(url)
    if not target.writable:
        raise CacheError(f"{url} is only read here; push to s3, gs, az, hf, sftp or a folder")
    if owner:
        provenance = manifest.provenance.model_copy(update={"owner": owner, "checksum": None})
        manifest = revalidate(manifest.model_copy(update={"provenance": provenance}))
    scrubbed = scrub(manifest)
    pieces = []
    for kind, shard in sorted(committed(folder), key=lambda piece: (_ORDER[piece[0]], piece[1])):
        record = read_record(folder, kind, shard)
        assert record is not None
        pieces.append(rewrite(scrubbed.manifest, record) if scrubbed.changes else Rewritten(record))
    total = sum(file.bytes for piece in pieces for file in piece.record.files.values())
    place = committing_place(target)
    if place is not None:
        place.check_layout(_layout(pieces, scrubbed.manifest, key is not None))
    return Plan(folder, target, scrubbed.manifest, scrubbed.changes, pieces, total, key)


def is_public(plan: Plan) -> bool:
    """Say whether everybody can read what is at the target, where that can be known: of a repository of the Hub."""
    place = committing_place(plan.target)
    return place is not None and place.is_public()


def push(plan: Plan, take_over: bool = False, advance: Advance = lambda size: None) -> Manifest:
    """Do what was planned and return the manifest as it is there; interrupted, the same call goes on.

    `take_over` goes on although another build of the cache is on its way there. Raises CacheMismatch where another
    cache, or another build of this one, is there already; CacheCorrupt for damage at either end; CacheUnreachable.
    """
    data = render_manifest(plan.manifest)
    ours = build_checksum(plan.manifest)
    there = _found_there(plan.target, plan.manifest, ours)
    first = False
    if there is None:
        missing = _missing(plan, _build_of(plan, ours), take_over)
        advance(plan.bytes_total - sum(_size(piece) for piece in missing))
        if isinstance(plan.target, RemoteFolder) and plan.target.committing is not None:
            first = _send_in_commits(plan, plan.target, missing, data, advance)
        else:
            first = _send_each(plan, missing, data, advance)
        there = plan.manifest if first else _found_there(plan.target, plan.manifest, ours)
    else:
        advance(plan.bytes_total)
    if not first and plan.key is not None:
        # Whoever was faster may have named another owner: what is signed is what is there.
        others = plan.target.read_bounded(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        plan.target.write(SIGNATURE_NAME, sign(_hashes(plan, others), plan.key))
    plan.target.delete(CLAIM_NAME)
    return there or plan.manifest


def _missing(plan: Plan, build: str, take_over: bool) -> list[Rewritten]:
    """Claim the target and return the pieces that are not there, whole; records there of other pieces are removed.

    The record of a piece is written once all of it is there and right: a piece with its record is not sent again.
    """
    there = sizes_of(plan.target)
    recorded = [piece for piece in plan.pieces if _record_name(piece) in there]
    if _claim(plan.target, build, not recorded, take_over):
        # What is there was sent under this claim: nobody needs to ask for it again.
        same = {_record_name(piece) for piece in recorded}
    else:
        same = _those_of_this_build(plan, recorded, there)
        # First, so that no interruption leaves the record of one build beside the files of another.
        delete_all(plan.target, [name for piece in recorded if (name := _record_name(piece)) not in same])
        if committing_place(plan.target) is None:
            plan.target.write(CLAIM_NAME, _render_claim(build, alone=True))
    return [piece for piece in plan.pieces if _record_name(piece) not in same or not _is_whole(piece.record, there)]


def _those_of_this_build(plan: Plan, recorded: list[Rewritten], there: dict[str, int]) -> set[str]:
    """Return the names of the records there that are those of the pieces themselves.

    Another build of the same cache, removed or given up half way, may have left some of the very same size.
    """
    same: set[str] = set()

    def compare(piece: Rewritten) -> None:
        name, ours = _record_name(piece), render_record(piece.record)
        with contextlib.suppress(FileNotFoundError):
            if there[name] == len(ours) and plan.target.read_bounded(name, MAX_RECORD_BYTES) == ours:
                same.add(name)

    in_parallel(compare, recorded)
    return same


def _send_each(plan: Plan, missing: list[Rewritten], manifest: bytes, advance: Advance) -> bool:
    """Send what is missing and make it a cache; say whether that was us, not another who pushes the same."""
    for last in (False, True):  # the seal when everything else is there
        in_parallel(
            lambda piece: _send(plan, piece, advance),
            [piece for piece in missing if (piece.record.kind == "seal") == last],
        )
    if plan.key is not None:
        plan.target.write(SIGNATURE_NAME, sign(_hashes(plan, manifest), plan.key))
    return plan.target.write_new(MANIFEST_NAME, manifest)


def _send_in_commits(
    plan: Plan, target: RemoteFolder, missing: list[Rewritten], manifest: bytes, advance: Advance
) -> bool:
    """Do as `_send_each` where every change is a commit; the last one has the seal's record and the manifest."""
    sending = CommittedPieces(plan.source, target, advance)
    sending.send(missing)  # of which the seal is the last
    last = {**sending.ready, MANIFEST_NAME: manifest}
    if plan.key is not None:
        last[SIGNATURE_NAME] = sign(_hashes(plan, manifest), plan.key)
    return target.commit(last, remove=[CLAIM_NAME], unless=MANIFEST_NAME)


def _layout(pieces: list[Rewritten], manifest: Manifest, signed: bool) -> dict[str, int]:
    """Return the names and sizes of all files that will be there."""
    files = {name: file.bytes for piece in pieces for name, file in piece.record.files.items()}
    files |= {_record_name(piece): len(render_record(piece.record)) for piece in pieces}
    files |= {MANIFEST_NAME: len(render_manifest(manifest)), CLAIM_NAME: 0}
    return files | ({SIGNATURE_NAME: 0} if signed else {})


def _hashes(plan: Plan, manifest: bytes) -> dict[str, str]:
    """Return the SHA-256 of every file as it was sent."""
    found = {MANIFEST_NAME: hashlib.sha256(manifest).hexdigest()}
    for piece in plan.pieces:
        for name in piece.record.files:
            made = piece.made.get(name)
            found[name] = sha256_of(plan.source.path / name) if made is None else hashlib.sha256(made).hexdigest()
        record = render_record(piece.record)
        found[_record_name(piece)] = hashlib.sha256(record).hexdigest()
    return found


def _build_of(plan: Plan, manifest: str) -> str:
    """Return what tells this build's files from those of another build of the same cache."""
    records = b"".join(render_record(piece.record) for piece in plan.pieces)
    return f"{manifest}-{crc32c(records):08x}"


def _record_name(piece: Rewritten) -> str:
    return record_name(piece.record.kind, piece.record.shard)


def _size(piece: Rewritten) -> int:
    return sum(file.bytes for file in piece.record.files.values())


def _is_whole(record: Record, there: dict[str, int]) -> bool:
    return all(there.get(name) == file.bytes for name, file in record.files.items())


def _found_there(target: Folder, manifest: Manifest, ours: str) -> Manifest | None:
    """Return the manifest of this very build where it is there, whole; raises CacheMismatch for anything else."""
    try:
        found = load_manifest(target)
    except CacheNotFound:
        return None
    if found.cache_id != manifest.cache_id:
        raise CacheMismatch(f"{target} holds another cache ({found.label}); choose another place")
    if build_checksum(found) != ours:
        raise CacheMismatch(
            f"{target} holds this cache already, from another build ({found.provenance.created or 'undated'}); "
            "pull or stream that, or choose another place"
        )
    return found


def _claim(target: Folder, ours: str, alone: bool, take_over: bool) -> bool:
    """Say that this build is on its way to the target; return whether all records there are known to be of it.

    `alone`: whether there are none. Raises CacheMismatch where another build has the claim.
    """
    claim = _render_claim(ours, alone)
    if target.write_new(CLAIM_NAME, claim):
        return alone
    try:
        found = json.loads(target.read_bounded(CLAIM_NAME, _MAX_CLAIM))
        theirs, theirs_alone = found["manifest"], found.get("alone") is True
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError, AttributeError, CacheCorrupt):
        theirs, theirs_alone = None, False
    if theirs == ours:
        return theirs_alone
    if not take_over:
        raise CacheMismatch(
            f"another build of this cache is being pushed to {target}; wait for it and pull that, or, if that push was "
            "given up, take its place with --take-over"
        )
    target.write(CLAIM_NAME, _render_claim(ours, alone=False))
    return False


def _render_claim(build: str, alone: bool) -> bytes:
    """Return the claim of a build; alone: nothing is there but what was sent under it."""
    return json.dumps({"manifest": build, "alone": alone}).encode()


def _send(plan: Plan, piece: Rewritten, advance: Callable[[int], None]) -> None:
    for name, expected in piece.record.files.items():
        if name in piece.made:
            plan.target.write(name, piece.made[name])
        else:
            send(plan.source, plan.target, name, expected)
        advance(expected.bytes)
    plan.target.write(_record_name(piece), render_record(piece.record))
