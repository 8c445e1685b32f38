"""What pyproject.toml asks to be installed is what the code imports: no less, and nothing that could be left out."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"cache_schema", "pipeline", "trainer"}
# Distributions that are imported by another name than their own.
DISTRIBUTION = {"PIL": "pillow", "huggingface_hub": "huggingface-hub", "sklearn": "scikit-learn"}
# What other libraries import where it is there, and fail or do less without.
IMPORTED_BY_OTHERS = {
    "pipeline": {
        "protobuf": "tokenizers of transformers",
        "sentencepiece": "tokenizers of transformers",
        "tensorboard": "torch.utils.tensorboard",
        "torchvision": "image processors of transformers",
    },
    "trainer": {"tensorboard": "torch.utils.tensorboard", "torchvision": "timm"},
}
# Extras of their own: one method, and caches elsewhere.
OPTIONAL_IN_CONTRACT = {
    "webdataset": {"webdataset"},
    "remote": {"botocore", "cryptography", "httpx", "huggingface-hub", "obstore", "paramiko"},
}
# Extras of their own: a build on a cluster; training in several processes, forms in which students are exported,
# maps of embeddings, approximate search, a page.
OPTIONAL_IN = {
    "pipeline": {"ray": {"ray"}},
    "trainer": {
        "distributed": {"accelerate"},
        "export": {"onnx", "onnxruntime", "onnxscript"},
        "report": {"scikit-learn"},
        "search": {"usearch"},
        "serve": {"starlette", "uvicorn"},
    },
}


def imported(package: str) -> set[str]:
    """The distributions that the modules of a package import, wherever in the file."""
    found = {name.split(".")[0] for path in (ROOT / package).rglob("*.py") for name in imports_of(path)}
    return {DISTRIBUTION.get(name, name) for name in found - OURS - sys.stdlib_module_names}


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "required":
            module = node.args[0]
            assert isinstance(module, ast.Constant)
            yield module.value


def asked_for(extra: str | None = None) -> set[str]:
    """The distributions of the base install, or of an extra, by name."""
    listed = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    return {re.split(r"[^\w.-]", item)[0].lower() for item in listed}


def test_a_base_install_is_what_the_contract_imports() -> None:
    optional = set().union(*OPTIONAL_IN_CONTRACT.values())
    assert asked_for() == imported("cache_schema") - optional
    assert optional <= imported("cache_schema")
    for extra, distributions in OPTIONAL_IN_CONTRACT.items():
        assert asked_for(extra) == distributions


@pytest.mark.parametrize("package", ["pipeline", "trainer"])
def test_an_extra_is_what_its_package_imports_beyond_the_base(package: str) -> None:
    found = imported(package) - set().union(*OPTIONAL_IN[package].values())
    assert asked_for(package) == (found - asked_for()) | IMPORTED_BY_OTHERS[package].keys()


@pytest.mark.parametrize("package", ["pipeline", "trainer"])
def test_a_packages_own_extras_are_imported_where_they_are_needed(package: str) -> None:
    for extra, distributions in OPTIONAL_IN[package].items():
        assert asked_for(extra) == distributions
        assert distributions <= imported(package)


def test_no_two_lists_ask_for_different_versions_of_one_distribution() -> None:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    bounds: dict[str, set[str]] = {}
    for item in (item for listed in lists for item in listed):
        bounds.setdefault(re.split(r"[^\w.-]", item)[0].lower(), set()).add(item)
    assert {name: items for name, items in bounds.items() if len(items) > 1 and name != "dit-distill"} == {}
