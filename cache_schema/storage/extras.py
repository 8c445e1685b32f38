"""Libraries that only some places need, installed by the extra `remote`."""

from importlib import import_module
from typing import Any

from cache_schema.errors import CacheError


def required(module: str, what: str) -> Any:
    """Return a module of the extra; raises CacheError that names the extra where it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        raise CacheError(
            f"{what} needs {module.split('.')[0]}, which is not installed; pip install 'dit-distill[remote]'"
        ) from None
