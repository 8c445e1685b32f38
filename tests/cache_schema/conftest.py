"""Caches that several test modules read; those that damage one build or copy their own."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Test folders are no packages (several have modules of the same name), so their shared code is loaded by its path.
_SPEC = importlib.util.spec_from_file_location("cache_building", Path(__file__).with_name("building.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
building = importlib.util.module_from_spec(_SPEC)
sys.modules["cache_building"] = building
_SPEC.loader.exec_module(building)


@pytest.fixture(scope="session")
def cache_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that builds a sealed tiny cache, once per set of options; it must not be changed."""
    built: dict[tuple, Path] = {}

    def make(**options: object) -> Path:
        key = tuple(sorted(options.items()))
        if key not in built:
            built[key] = building.build(tmp_path_factory.mktemp("cache") / "cache", **options)
        return built[key]

    return make
