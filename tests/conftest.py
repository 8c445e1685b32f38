"""How thorough property tests are: quickly by default, `HYPOTHESIS_EXAMPLES=2000` (or `make fuzz`) now and then."""

import importlib.util
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from cache_schema import devices

# Test folders are no packages, so what tests of all three packages share is loaded by its path.
_spec = importlib.util.spec_from_file_location("strict_device", Path(__file__).with_name("strict_device.py"))
assert _spec is not None
assert _spec.loader is not None
sys.modules["strict_device"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["strict_device"])

# Machines that run several things at once make any deadline a matter of luck.
settings.register_profile("quick", deadline=None)
settings.register_profile("nightly", deadline=None, max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "2000")))
settings.load_profile("nightly" if "HYPOTHESIS_EXAMPLES" in os.environ else "quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that hypothesis gives examples to, so that `-m property` runs these alone."""
    for item in items:
        if getattr(getattr(item, "function", None), "is_hypothesis_test", False):
            item.add_marker("property")


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Behave as in a terminal where the tests run in the background or under nohup, which ignore SIGINT and SIGHUP.

    Programs that the tests start inherit that; that the commands themselves respect it is a test of its own.
    """
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(autouse=True, scope="session")
def _freed_memory_is_given_back() -> None:
    """Leave malloc as it is in this process: a test that allows itself little memory counts on what others gave back.

    Commands that the tests start keep it, as they do for users.
    """
    devices.keep_freed_memory = lambda: None


@pytest.fixture
def no_large_files() -> Iterator[None]:
    """No file can grow beyond 100 kB, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
