"""What of a manifest is nobody else's business: paths, names of user and host; and what looks secret."""

import getpass
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_schema.errors import CacheError
from cache_schema.format.manifest import Manifest

# By the forms that their issuers document.
_SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{30,}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}",
    "a password": r"(?i)(?:password|passwd|secret|token|api[_-]?key)[=:]\s*[^\s,;]{6,}",
    "a URL with a password": r"[a-z][a-z0-9+.-]*://[^\s/:@]+:[^\s/@]+@",
}
# An absolute path where a word begins, or after what joins an option to its value.
_PATH = re.compile(r"(?:(?<=^)|(?<=[\s='\",:(]))(?:file://)?(?:/|~[\w.-]*/|[A-Za-z]:\\)[^\s'\",;)]*")
# Fields of free text about one build; all others have values of known forms.
_TEXTS = (("provenance", "command"), ("provenance", "device"), ("provenance", "converted"), ("teacher", "source"))


@dataclass(frozen=True)
class Scrubbed:
    """A manifest that may be shown to others, and a line for every change: the field, what it said, what it says."""

    manifest: Manifest
    changes: list[str]


def scrub(manifest: Manifest, names: tuple[str, ...] | None = None) -> Scrubbed:
    """Return the manifest without absolute paths and without the names of this user and host.

    `names` replaces those of this machine. What determines the features is left as it is: the cache id stays. Raises
    CacheError, naming the field, for what looks like a token or a password, without repeating it.
    """
    document = manifest.document()
    _refuse_secrets(document)
    found = _own_names() if names is None else names
    changes = []
    for part, field in _TEXTS:
        before = document[part][field]
        after = None if before is None else _clean(before, found)
        if after != before:
            document[part][field] = after
            changes.append(f"{part}.{field}: {before!r} becomes {after!r}")
    if not changes:
        return Scrubbed(manifest, [])
    document["provenance"]["checksum"] = None
    return Scrubbed(Manifest.model_validate(document), changes)


def _clean(text: str, names: tuple[str, ...]) -> str:
    text = _PATH.sub(lambda path: Path(path[0].rstrip("/\\")).name or "…", text)
    for name in names:
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", "…", text)
    return text


def _own_names() -> tuple[str, ...]:
    host = socket.gethostname()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = ""
    names = {host, host.partition(".")[0], user, Path(os.path.expanduser("~")).name}  # noqa: PTH111 -- never raises
    # Names that say nothing of anybody, or are ordinary words of a command.
    return tuple(sorted(name for name in names if len(name) > 2 and name not in ("root", "localhost", "user", "runs")))


def _refuse_secrets(value: Any, where: str = "") -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_secrets(item, f"{where}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            _refuse_secrets(item, where)
    elif isinstance(value, str):
        for kind, pattern in _SECRETS.items():
            if re.search(pattern, value):
                raise CacheError(
                    f"the manifest's {where} holds what looks like {kind}, so the cache is not pushed; revoke it if it "
                    "is one, and build the cache anew without it on the command line"
                )
