"""What several threads do for one batch is over when the batch is, however it ends."""

import threading

import pytest

from cache_schema.errors import CacheCorrupt
from cache_schema.reading.fetching import at_once


def test_after_a_failure_nothing_is_written_any_more_into_memory_that_the_caller_may_use_again() -> None:
    memory, failed = bytearray(1 << 16), threading.Event()

    def fill(item: int) -> None:
        if item == 0:
            failed.set()
            raise CacheCorrupt("damaged")
        failed.wait()
        for place in range(len(memory)):
            memory[place] = 1

    with pytest.raises(CacheCorrupt):
        at_once(fill, [0, 1])
    assert memory.count(1) in (0, len(memory))
