"""Reading and writing `manifest.json`: bounded, versioned, and protected by a checksum of its own."""

import json
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from cache_schema.errors import CacheCorrupt, CacheError, CacheNotFound, UnsupportedSchema
from cache_schema.format.identity import canonical_json
from cache_schema.format.manifest import SCHEMA_VERSION, Manifest
from cache_schema.storage.checksum import crc32c
from cache_schema.storage.folder import Folder

MANIFEST_NAME = "manifest.json"
# Beside a cache that its owner signed; see `cache_schema.sharing.signing`.
SIGNATURE_NAME = "signature.json"
MAX_MANIFEST_BYTES = 64 << 20
# A few for every tap and timestep. In memory, an empty list takes twenty times as much as in the file.
_MAX_CONTAINERS = 1 << 18


def _from_version_1(document: dict[str, Any]) -> dict[str, Any]:
    # Version 2 added pool and pca to the encoding, teacher_channels to the taps, quarantined to the data set and
    # failed_rows; their defaults say what version 1 was. Journal records are migrated in `cache_schema.format.journal`.
    return document


# From an older schema version to the document of the next one. A release that changes the schema adds one line here.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_version_1}


def render_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of `manifest.json`, with the checksum filled in."""
    document = manifest.document()
    document["provenance"]["checksum"] = manifest_checksum(document)
    return render_document(document)


def render_document(document: dict[str, Any]) -> bytes:
    """Return the one JSON text, for people to read, of a document: sorted keys, two spaces, one final newline."""
    return (json.dumps(document, sort_keys=True, indent=2, allow_nan=False) + "\n").encode("ascii")


def manifest_checksum(document: dict[str, Any]) -> str:
    """Return the CRC-32C, as 8 hexadecimal digits, of a manifest document apart from its own checksum field."""
    provenance = {**document["provenance"], "checksum": None}
    text = canonical_json({**document, "provenance": provenance})
    return f"{crc32c(text.encode('ascii')):08x}"


def build_checksum(manifest: Manifest) -> str:
    """Return the checksum of a manifest but for its owner: two may push the same build, each in their own name."""
    document = manifest.document()
    return manifest_checksum({**document, "provenance": {**document["provenance"], "owner": None}})


def load_manifest(folder: Folder) -> Manifest:
    """Read, migrate and validate the manifest of the cache in a folder.

    Raises CacheNotFound where there is none, UnsupportedSchema for a version this release does not know, and
    CacheCorrupt for anything that is not a valid manifest or fails its checksum.
    """
    where = folder.where(MANIFEST_NAME)
    try:
        data = folder.read_bounded(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise CacheNotFound(f"no cache at {folder}: it has no {MANIFEST_NAME}") from None
    except OSError as error:
        raise CacheCorrupt(f"cannot read {where}: {error.strerror}") from error
    return parse_manifest(data, where)


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Turn the bytes of a manifest into a `Manifest`; `where` names them in error messages. See `load_manifest`."""
    document = _parse_json(data, where)
    version = document.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise CacheCorrupt(f"{where} has no schema_version: it is not the manifest of a cache")
    if version != SCHEMA_VERSION and version not in MIGRATIONS:
        raise UnsupportedSchema(
            f"{where} has schema version {version}, this release reads version {SCHEMA_VERSION}"
            + ("; install a newer dit-distill" if version > SCHEMA_VERSION else " and nothing that old")
        )
    _check_checksum(document, where)
    try:
        return Manifest.model_validate(_migrate(document, version, where))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "document"
        raise CacheCorrupt(f"{where} is not a valid manifest: {field}: {first['msg']}") from error


def revalidate(manifest: Manifest) -> Manifest:
    """Return the manifest validated anew, as `model_copy` does not: raises CacheError where it contradicts itself."""
    try:
        return Manifest.model_validate(manifest.model_dump())
    except ValidationError as error:
        raise CacheError(f"this manifest contradicts itself: {error.errors()[0]['msg']}") from error


def as_unsealed(manifest: Manifest) -> Manifest:
    """Return the manifest of the same cache before it was sealed, without what only sealing finds out."""
    unknown = {
        "sealed": False,
        "fidelity": [],
        "failed_rows": [],
        "massive_channels": {},
        "bytes_features": None,
        "bytes_images": None,
    }
    return revalidate(manifest.model_copy(update=unknown))


def _migrate(document: dict[str, Any], version: int, where: str) -> dict[str, Any]:
    while version != SCHEMA_VERSION:
        if version not in MIGRATIONS:
            raise UnsupportedSchema(f"{where}: no migration leads from schema version {version}")
        document = MIGRATIONS[version](document)
        version += 1
        document = {**document, "schema_version": version}
    return document


def _parse_json(data: bytes, where: str) -> dict[str, Any]:
    if data.count(b"[") + data.count(b"{") > _MAX_CONTAINERS:
        raise CacheCorrupt(f"{where} has more lists and objects than a manifest may have")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CacheCorrupt(f"{where} is not JSON: {str(error)[:200]}") from error
    if not isinstance(document, dict):
        raise CacheCorrupt(f"{where} is not a JSON object")
    return document


def _check_checksum(document: dict[str, Any], where: str) -> None:
    provenance = document.get("provenance")
    stored = provenance.get("checksum") if isinstance(provenance, dict) else None
    try:
        matches = stored is None or stored == manifest_checksum(document)
    except (ValueError, RecursionError) as error:
        raise CacheCorrupt(f"{where} holds what JSON cannot say: {str(error)[:200]}") from error
    if not matches:
        raise CacheCorrupt(f"{where} was altered: it does not match its own checksum")
