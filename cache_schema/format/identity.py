"""What a cache is called: the SHA-256 of everything that determines its numbers.

A document, here, is a manifest as plain JSON values.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# The fields of each part of a manifest that determine the numbers in the cache. Left out on purpose: where things came
# from (paths, repositories, revisions: the digests of the weights say more), how the bytes are laid out (compression,
# shard sizes) and everything about one particular build (provenance, fidelity, sizes, sealed).
_DETERMINING: dict[str, tuple[str, ...]] = {
    "dataset": ("name", "protocol", "fingerprint", "superclass", "feature_splits", "feature_rows"),
    "teacher": (
        "family",
        "pipeline_class",
        "digests",
        "lora_digest",
        "dtype",
        "resolution",
        "text",
        "guidance",
        "quantization",
        "context",
        "input",
        "crop",
    ),
    "curriculum": ("num_steps", "timesteps", "sigmas", "seed"),
    "encoding": ("kind", "pool", "pca", "massive", "massive_factor"),
    "images": ("size", "format", "quality", "shape"),
}
_DETERMINING_WHOLE = ("taps", "views")
# Fields that came with a later schema version are left out where they say what was always so: ids do not change.
_SINCE_VERSION_2: dict[str, dict[str, Any]] = {
    "encoding": {"pool": 1, "pca": None, "massive": "keep", "massive_factor": None},
    "images": {"shape": "square"},
    "taps": {"teacher_channels": None},
    "teacher": {"quantization": None, "context": "joint", "input": "object", "crop": "box"},
}


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, ASCII, floats as Python's `repr` writes them.

    Raises ValueError for NaN and infinities, which JSON cannot say.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def determining_fields(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a document that determines the numbers in the cache."""
    fields: dict[str, Any] = {name: document[name] for name in _DETERMINING_WHOLE}
    for part, names in _DETERMINING.items():
        value = document[part]
        fields[part] = None if value is None else {name: value[name] for name in names if name in value}
    for part in ("encoding", "teacher", "images"):
        if fields[part] is not None:
            fields[part] = _without_defaults(part, fields[part])
    fields["taps"] = [_without_defaults("taps", tap) for tap in fields["taps"]]
    if document.get("crops") is not None:
        fields["crops"] = document["crops"]
    return fields


def _without_defaults(part: str, value: dict[str, Any]) -> dict[str, Any]:
    defaults = _SINCE_VERSION_2[part]
    return {name: item for name, item in value.items() if name not in defaults or item != defaults[name]}


def compute_cache_id(document: Mapping[str, Any]) -> str:
    """Return the cache id, 64 hexadecimal digits, equal for equal inputs on any machine."""
    return hashlib.sha256(canonical_json(determining_fields(document)).encode("ascii")).hexdigest()


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the dotted names of the determining fields in which two documents differ, sorted."""
    mine, other = _flatten(determining_fields(ours)), _flatten(determining_fields(theirs))
    return sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = canonical_json(value)
    return flat
