"""What others build on: the names that can be imported from the contract, and its schema."""

import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import cache_schema
from cache_schema.format.schema import SCHEMA_PATH

CARE = [("verify", "verify"), ("verify", "advice"), ("describe", "describe"), ("describe", "describe_text")]


@pytest.mark.parametrize("name", cache_schema.__all__)
def test_every_public_name_can_be_imported_from_the_package(name: str) -> None:
    value = getattr(cache_schema, name)
    namespace: dict[str, object] = {}
    exec(f"from cache_schema import {name}", namespace)
    assert namespace[name] is value


@pytest.mark.parametrize(("module", "name"), CARE)
def test_what_one_does_with_a_finished_cache_can_be_imported_by_its_public_name(module: str, name: str) -> None:
    assert callable(getattr(import_module(f"cache_schema.{module}"), name))


def test_a_name_that_the_package_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = cache_schema.Nothing


def test_the_module_of_the_schema_writes_the_committed_one_byte_for_byte(tmp_path: Path) -> None:
    package = shutil.copytree(Path(cache_schema.__file__).parent, tmp_path / "cache_schema")
    copy = package / SCHEMA_PATH.relative_to(Path(cache_schema.__file__).parent)
    copy.unlink()
    subprocess.run([sys.executable, "-m", "cache_schema.format.schema"], cwd=tmp_path, check=True)
    assert copy.read_bytes() == SCHEMA_PATH.read_bytes()
