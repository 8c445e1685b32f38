"""Which versions made something: what records of builds and annotations hold of the software."""

import platform
from collections.abc import Sequence
from importlib import metadata

NOT_INSTALLED = "not installed"  # this project itself, where it runs from a source tree that pip has not seen


def versions_of(distributions: Sequence[str]) -> dict[str, str]:
    """Distribution → version, and Python's."""
    return {name: _version(name) for name in distributions} | {"python": platform.python_version()}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED
