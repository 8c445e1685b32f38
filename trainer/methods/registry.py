"""Which methods there are; each is loaded when it is asked for, its config without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from trainer.config import TrainConfig
from trainer.errors import TrainError

if TYPE_CHECKING:
    from trainer.methods.method import Method


@dataclass(frozen=True)
class Entry:
    """Where a method's config class and the method itself are, as `module:name`, or the classes themselves."""

    config: str | type[TrainConfig]
    method: str | type[Method]


METHODS: dict[str, Entry] = {
    "baseline": Entry("trainer.methods.baseline.config:BaselineConfig", "trainer.methods.baseline.method:Baseline"),
    "regression": Entry(
        "trainer.methods.regression.config:RegressionRunConfig", "trainer.methods.regression.method:Regression"
    ),
    "relational": Entry(
        "trainer.methods.relational.config:RelationalConfig", "trainer.methods.relational.method:Relational"
    ),
    "gcd": Entry("trainer.methods.gcd.config:GcdConfig", "trainer.methods.gcd.method:Gcd"),
    "auxiliary": Entry(
        "trainer.methods.auxiliary.config:AuxiliaryConfig", "trainer.methods.auxiliary.method:Auxiliary"
    ),
}
DEFAULT = "gcd"
# What `--mode` calls a method, and results and summaries with it.
MODES = {"distill": "gcd"}


def method_name(mode: str) -> str:
    """The method that a `--mode` stands for; raises TrainError for one that is not there."""
    name = MODES.get(mode, mode)
    if name not in METHODS:
        modes = " or ".join(repr(mode_name(method)) for method in METHODS)
        raise TrainError(f"mode: no such mode, use {modes} (got {mode!r})")
    return name


def mode_name(method: str) -> str:
    """What `--mode` calls a method."""
    return next((mode for mode, name in MODES.items() if name == method), method)


def config_class(name: str) -> type[TrainConfig]:
    """The config class of a method; raises TrainError for a name that is not there."""
    entry = _entry(name).config
    return resolve_name(entry) if isinstance(entry, str) else entry


def find_method(name: str) -> type[Method]:
    """The class of a method; raises TrainError for a name that is not there."""
    entry = _entry(name).method
    return resolve_name(entry) if isinstance(entry, str) else entry


def _entry(name: str) -> Entry:
    if name not in METHODS:
        raise TrainError(f"method: there is no method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
