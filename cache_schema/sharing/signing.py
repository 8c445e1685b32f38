"""Signed caches: SHA-256 of every file under one ed25519 signature, for who has the public key.

The checksums of the journal find accidents; against someone who alters files on purpose they are no proof.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cache_schema.errors import CacheCorrupt, CacheError
from cache_schema.format.identity import canonical_json
from cache_schema.format.manifest_file import SIGNATURE_NAME
from cache_schema.storage.checksum import Bytes
from cache_schema.storage.extras import required
from cache_schema.storage.folder import Folder

_MAX_BYTES = 256 << 20
_MAX_KEY = 1 << 16


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sign(files: Mapping[str, str], key: Path) -> bytes:
    """Return the signature file for files, name to SHA-256, by a private key (PEM or OpenSSH, without a passphrase)."""
    serialization = required("cryptography.hazmat.primitives.serialization", "signing")
    text = _read(key)
    load = serialization.load_ssh_private_key if b"OPENSSH" in text else serialization.load_pem_private_key
    try:
        signature = _ed25519(load(text, password=None)).sign(_message(files))
    except (ValueError, TypeError, AttributeError) as error:
        raise CacheError(f"{key} is no ed25519 private key without a passphrase") from error
    return (canonical_json({"files": dict(files), "signature": signature.hex()}) + "\n").encode("ascii")


def signed_files(folder: Folder, key: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a cache as the owner of a public key (PEM or OpenSSH) signed them.

    Raises CacheCorrupt for a cache that is not signed, or by somebody else.
    """
    serialization = required("cryptography.hazmat.primitives.serialization", "checking signatures")
    exceptions = required("cryptography.exceptions", "checking signatures")
    text = _read(key)
    load = serialization.load_ssh_public_key if text.startswith(b"ssh-") else serialization.load_pem_public_key
    try:
        public = _ed25519(load(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise CacheError(f"{key} is no ed25519 public key") from error
    try:
        document = json.loads(folder.read_bounded(SIGNATURE_NAME, _MAX_BYTES))
        files = {str(name): str(digest) for name, digest in document["files"].items()}
        public.verify(bytes.fromhex(document["signature"]), _message(files))
    except FileNotFoundError:
        raise CacheCorrupt(f"the cache at {folder} is not signed") from None
    except (exceptions.InvalidSignature, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CacheCorrupt(f"the cache at {folder} is not signed by the owner of {key}") from None
    return files


class Hashed:
    """Blocks that pass through, and their SHA-256."""

    def __init__(self, blocks: Iterator[Bytes]) -> None:
        self._blocks, self._digest = blocks, hashlib.sha256()

    def __iter__(self) -> Iterator[Bytes]:
        for block in self._blocks:
            self._digest.update(block)
            yield block

    def hexdigest(self) -> str:
        """Return the SHA-256 of what has passed."""
        return self._digest.hexdigest()


def _message(files: Mapping[str, str]) -> bytes:
    return canonical_json({"dit-distill cache": dict(files)}).encode("ascii")


def _ed25519(key: Any) -> Any:
    if "ed25519" not in type(key).__name__.lower():
        raise ValueError("another kind of key")
    return key


def _read(key: Path) -> bytes:
    try:
        with key.open("rb") as file:
            return file.read(_MAX_KEY)
    except OSError as error:
        raise CacheError(f"cannot read the key {key}: {error.strerror}") from error
