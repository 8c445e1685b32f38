"""Caches that several test modules read; those that damage one build or copy their own."""

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def _load(name: str, file: str) -> None:
    # Test folders are no packages (several have modules of the same name), so their shared code is loaded by its path,
    # once: servers of one module are not those of another.
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


_load("cache_building", "building.py")
_load("cache_hostile", "hostile.py")
_load("cache_hub", "hub_server.py")
_load("cache_servers", "servers.py")
_load("cache_proxy", "faulty_proxy.py")


@pytest.fixture(scope="session")
def cache_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that builds a sealed tiny cache, once per set of options; it must not be changed."""
    built: dict[tuple, Path] = {}

    def make(**options: object) -> Path:
        key = tuple(sorted(options.items()))
        if key not in built:
            built[key] = sys.modules["cache_building"].build(tmp_path_factory.mktemp("cache") / "cache", **options)
        return built[key]

    return make


@pytest.fixture(scope="session")
def victim() -> Iterator[object]:
    """The process in which hostile caches are used."""
    process = sys.modules["cache_hostile"].Victim()
    yield process
    process.close()


@pytest.fixture
def attack(cache_of: Callable[..., Path], victim: object, tmp_path: Path) -> Callable[..., object]:
    """Return a function that plants something in a tiny cache, has it used, and checks that nothing came of it.

    `plant` gets the cache's directory, inside one of its own in which nothing else may change. The outcome of every
    operation is returned; none may do anything but succeed, report problems or raise a CacheError.
    """

    def run(plant: Callable[[Path], object], operations: object = None, partial: bool = False, **options: object):
        building, hostile = sys.modules["cache_building"], sys.modules["cache_hostile"]
        twin = cache_of(**options)
        home = tmp_path / f"home-{len(list(tmp_path.iterdir()))}"
        root, scratch = home / "team/cache", tmp_path / "scratch"
        shutil.copytree(twin, root)
        (home / "precious").mkdir()
        (home / "precious/notes.txt").write_text("mine")
        if partial:
            _unseal(root, hostile)
        plant(root)
        outside = building.tree(home / "precious")
        around = sorted(path.name for path in [*home.iterdir(), *(home / "team").iterdir()])
        shutil.rmtree(scratch, ignore_errors=True)
        outcome = victim.use(root, twin, scratch, operations or hostile.EVERYTHING)  # type: ignore[attr-defined]
        outcome.check_harmless()
        assert building.tree(home / "precious") == outside
        assert sorted(path.name for path in [*home.iterdir(), *(home / "team").iterdir()]) == around
        shutil.rmtree(home)
        return outcome

    return run


def _unseal(root: Path, hostile: object) -> None:
    """Turn a sealed copy into one that is about to be sealed: everything is built but for one shard of images."""

    def change(document: dict) -> None:
        document |= {"sealed": False, "fidelity": [], "failed_rows": [], "bytes_features": None, "bytes_images": None}

    hostile.forge_manifest(root, change)  # type: ignore[attr-defined]
    for name in ("README.md", "images/index.npy", "journal/seal-00000.json"):
        (root / name).unlink()
