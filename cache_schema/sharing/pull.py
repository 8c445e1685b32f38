"""Fetching a cache, or a part of it, into a folder of this machine: resumable, a cache once all of it is here."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from cache_schema.care.verify import Piece, pieces_of
from cache_schema.errors import CacheCorrupt, CacheMismatch, CacheNotFound, CacheRequestError, CacheUnsealed
from cache_schema.format import layout
from cache_schema.format.journal import (
    MAX_RECORD_BYTES,
    Record,
    parse_record,
    read_record,
    record_name,
    render_record,
    write_record,
)
from cache_schema.format.manifest import Manifest
from cache_schema.format.manifest_file import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    load_manifest,
    manifest_checksum,
    render_manifest,
)
from cache_schema.format.samples import MAX_SAMPLES_BYTES, check_against_manifest, load_samples
from cache_schema.sharing.cutting import cut_calibration, cut_shard
from cache_schema.sharing.parts import EVERYTHING, Selection, manifest_of, shards_of
from cache_schema.sharing.rewriting import Rewritten, rewrite
from cache_schema.sharing.signing import sha256_of, signed_files
from cache_schema.sharing.transfer import Advance, in_parallel, receive
from cache_schema.storage.files import is_aside
from cache_schema.storage.folder import Folder
from cache_schema.storage.local import LocalFolder, local_folder
from cache_schema.storage.names import is_inside
from cache_schema.storage.places import folder_at
from cache_schema.stores.registry import store_of

# Says of what the files are that are here so far; gone once it is a cache.
CLAIM_NAME = "pull.json"


@dataclass(frozen=True)
class PullPlan:
    """A pull as it would be done: the pieces that are not here yet, and the bytes of all of them, here or not."""

    source: Folder
    target: LocalFolder
    manifest: Manifest
    whole: Manifest
    pieces: list[Piece]
    signed: dict[str, str] | None

    @property
    def cut(self) -> bool:
        """Whether shards are made of some of the timesteps of those that are there."""
        return self.manifest.curriculum.timesteps != self.whole.curriculum.timesteps


def plan_pull(url: str, target: str, selection: Selection = EVERYTHING, key: Path | None = None) -> PullPlan:
    """Plan the pull of a cache, or what is selected of it, into the folder `target`; nothing is written.

    `key` is the public key by whose owner the cache must be signed. Raises CacheNotFound, CacheUnsealed,
    CacheRequestError for what the cache does not hold, CacheMismatch where something else is in the folder.
    """
    source, here = folder_at(url), local_folder(target)
    whole = load_manifest(source)
    if not whole.sealed:
        raise CacheUnsealed(f"cache {source} is not complete, so it cannot be pulled")
    signed = None if key is None else signed_files(source, key)
    if signed is not None:
        _check_signed(source, MANIFEST_NAME, render_manifest(whole), signed)
    manifest = manifest_of(selection, whole, source.location)
    _check_target(here, manifest, whole)
    pieces = _wanted(source, whole, selection)
    plan = PullPlan(source, here, manifest, whole, pieces, signed)
    if plan.cut and key is not None:
        raise CacheRequestError(
            "what is signed are whole files, which --timesteps does not fetch; leave one of them out"
        )
    return plan


def pull(plan: PullPlan, advance: Advance = lambda size: None) -> Manifest:
    """Do what was planned and return the manifest of what is here; interrupted, the same call goes on.

    Raises CacheCorrupt for what is damaged there, CacheUnreachable, CacheStorageError.
    """
    here = plan.target
    here.create()
    here.refuse_links()
    here.sweep()
    if not here.exists(MANIFEST_NAME):
        here.write(CLAIM_NAME, json.dumps({"manifest": manifest_checksum(plan.manifest.document())}).encode())
    in_parallel(lambda piece: _receive(plan, piece, advance), plan.pieces)
    if plan.signed is not None and plan.manifest.provenance.pulled is None:
        here.write(SIGNATURE_NAME, plan.source.read_bounded(SIGNATURE_NAME, 256 << 20))
    if not plan.manifest.sealed:
        # Shards that an earlier pull brought belong to the part as well.
        plan = _widened(plan)
    here.write(MANIFEST_NAME, render_manifest(plan.manifest))
    here.delete(CLAIM_NAME)
    return plan.manifest


def bytes_of(plan: PullPlan) -> int:
    """Return about how many bytes a pull is about, for a progress bar: pieces have about the same size."""
    whole, store = plan.whole, plan.whole.store
    features = sum(piece.kind == "features" for piece in plan.pieces)
    images = sum(piece.kind == "images" for piece in plan.pieces)
    values = [sum(array.row_bytes for array in layout.all_layouts(each)) for each in (plan.manifest, whole)]
    total = (whole.bytes_features or 0) * values[0] * features // max(1, values[1] * store.feature_shards)
    return total + (whole.bytes_images or 0) * images // max(1, store.image_shards)


def _wanted(source: Folder, whole: Manifest, selection: Selection) -> list[Piece]:
    pieces = list(pieces_of(source, whole))
    if not selection.partial:
        return pieces
    samples = load_samples(source)
    check_against_manifest(samples, whole)
    shards = shards_of(selection, whole, samples)
    # Only a whole cache has a seal.
    return [piece for piece in pieces if piece.kind in ("layout", "calibration") or (piece.kind, piece.shard) in shards]


def _check_target(here: LocalFolder, manifest: Manifest, whole: Manifest) -> None:
    ours = manifest_checksum(manifest.document())
    try:
        found = load_manifest(here)
    except CacheNotFound:
        found = None
    if found is not None:
        part = found.provenance.pulled
        same = manifest_checksum(found.document()) == ours
        # What is here as a part of this very cache may grow.
        grows = part is not None and found.cache_id == manifest.cache_id and not found.sealed
        grows = grows and part is not None and manifest_checksum(whole.document()) in part
        if not same and not grows:
            raise CacheMismatch(f"{here} holds another cache ({found.label}); choose another folder")
        return
    try:
        begun = json.loads(here.read_bounded(CLAIM_NAME, 1 << 16)).get("manifest")
    except (FileNotFoundError, NotADirectoryError):
        if not all(map(is_aside, here.names())):
            raise CacheMismatch(f"{here} holds other things; choose an empty folder") from None
        return
    except (ValueError, AttributeError):
        begun = None
    if begun != ours:
        raise CacheMismatch(f"{here} holds what was pulled so far of something else; choose another folder")


def _receive(plan: PullPlan, piece: Piece, advance: Advance) -> None:
    here = read_record_or_none(plan.target, piece)
    if here is not None and plan.signed is None and _are_here(plan, here):
        advance(sum(file.bytes for file in here.files.values()))
        return
    original, data = _record_there(plan, piece)
    if plan.cut and piece.kind == "features":
        _cut(plan, piece, original)
        advance(sum(plan.target.size(name) or 0 for name in store_of(plan.manifest).shard_files(piece.shard)))
        return
    made = cut_calibration(plan.source, plan.manifest, plan.whole) if plan.cut and piece.kind == "calibration" else {}
    wanted = rewrite(plan.manifest, original, made) if plan.manifest.provenance.pulled else Rewritten(original)
    if here is not None and here != wanted.record:
        plan.target.delete(record_name(piece.kind, piece.shard))  # before its files become others
    for name, expected in wanted.record.files.items():
        sha256 = None if plan.signed is None or name in wanted.made else _signed(plan, name)
        if name in wanted.made:
            plan.target.write(name, wanted.made[name])
        elif sha256 is None or not _is_file(plan.target, name, expected.bytes, sha256):
            receive(plan.source, plan.target, name, expected, sha256)
        advance(expected.bytes)
    rewritten = render_record(wanted.record) if plan.manifest.provenance.pulled else data
    plan.target.write(record_name(piece.kind, piece.shard), rewritten)


def _are_here(plan: PullPlan, record: Record) -> bool:
    return all(plan.target.size(name) == file.bytes for name, file in record.files.items())


def _is_file(folder: LocalFolder, name: str, size: int, sha256: str) -> bool:
    return folder.size(name) == size and sha256_of(folder.path / name) == sha256


def _cut(plan: PullPlan, piece: Piece, original: Record) -> None:
    record = rewrite(plan.manifest, original).record
    files = cut_shard(plan.source, plan.target, plan.manifest, plan.whole, original)
    write_record(plan.target, record.model_copy(update={"files": files, "checksum": None}))


def read_record_or_none(folder: LocalFolder, piece: Piece) -> Record | None:
    """Return the record of a piece that is here, None where there is none or it is damaged: it is fetched again."""
    try:
        return read_record(folder, piece.kind, piece.shard)
    except CacheCorrupt:
        return None


def _record_there(plan: PullPlan, piece: Piece) -> tuple[Record, bytes]:
    """Return a record and its bytes; raises CacheCorrupt for one that names files which are not those of the piece."""
    name = record_name(piece.kind, piece.shard)
    where = plan.source.where(name)
    try:
        data = plan.source.read_bounded(name, MAX_RECORD_BYTES)
    except FileNotFoundError:
        raise CacheCorrupt(
            f"{where} is missing; have the cache removed there (dit-cache rm) and pushed again"
        ) from None
    record = parse_record(data, where)
    wrong = sorted(record.files.keys() ^ piece.files.keys())
    if (record.kind, record.shard) != (piece.kind, piece.shard) or wrong or not all(map(is_inside, record.files)):
        raise CacheCorrupt(f"{where} is not the record of that piece of the cache")
    if plan.signed is not None:
        _check_signed(plan.source, name, data, plan.signed)
    if record.kind == "layout":
        expected = record.files[layout.SAMPLES_NAME].bytes
        if expected > MAX_SAMPLES_BYTES:
            raise CacheCorrupt(f"{where} speaks of a samples table of {expected} bytes")
    return record, data


def _signed(plan: PullPlan, name: str) -> str:
    assert plan.signed is not None
    if name not in plan.signed:
        raise CacheCorrupt(f"{plan.source.where(name)} is not among what was signed")
    return plan.signed[name]


def _check_signed(source: Folder, name: str, data: bytes, signed: dict[str, str]) -> None:
    if signed.get(name) != hashlib.sha256(data).hexdigest():
        raise CacheCorrupt(f"{source.where(name)} is not what was signed")


def _widened(plan: PullPlan) -> PullPlan:
    try:
        before = load_manifest(plan.target).provenance.pulled
    except CacheNotFound:
        return plan
    now = plan.manifest.provenance.pulled
    if before is None or now is None or before == now or before.startswith(now.partition(" of cache ")[0]):
        return plan
    said = f"{before.partition(' of cache ')[0]}; {now}"
    provenance = plan.manifest.provenance.model_copy(update={"pulled": said, "checksum": None})
    widened = plan.manifest.model_copy(update={"provenance": provenance})
    return replace(plan, manifest=widened)
