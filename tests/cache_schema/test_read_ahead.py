"""What is made ahead comes in order, never more of it than asked for, and nothing hangs whatever goes wrong."""

import gc
import itertools
import math
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator

import pytest
from cache_building import some_examples
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import LoaderError
from cache_schema.read_ahead import ReadAhead


class RefusalError(Exception):
    """Raised by `make` for some items."""


class Square:
    """A `make` that refuses some items, or ends the process that runs it, as the kernel does."""

    def __init__(self, refused: frozenset[int] = frozenset(), deadly: int | None = None) -> None:
        self.refused, self.deadly = refused, deadly

    def __call__(self, item: int) -> int:
        if item in self.refused:
            raise RefusalError(item)
        if item == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item


def taken(results: Iterator[int]) -> tuple[list[int], int | None]:
    """What came, and the item whose refusal ended it."""
    found = []
    try:
        for result in results:
            found.append(result)
    except RefusalError as error:
        return found, error.args[0]
    return found, None


@some_examples
@given(
    items=st.lists(st.integers(0, 50), max_size=30),
    refused=st.frozensets(st.integers(0, 50), max_size=3),
    threads=st.integers(0, 4),
    depth=st.none() | st.integers(1, 9),
)
def test_results_come_in_order_up_to_the_first_refusal(
    items: list[int], refused: frozenset[int], threads: int, depth: int | None
) -> None:
    with ReadAhead(Square(refused), threads=threads, depth=depth) as ahead:
        results = taken(ahead.over(items))
        assert taken(ahead.over(items)) == results  # as often as one likes
    bad = next((place for place, item in enumerate(items) if item in refused), len(items))
    assert results == ([item * item for item in items[:bad]], items[bad] if bad < len(items) else None)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_give_the_same(method: str) -> None:
    with ReadAhead(math.sqrt, processes=2, start_method=method) as ahead:
        results = ahead.over([4.0, 9.0, 16.0, -1.0, 25.0])
        assert list(itertools.islice(results, 3)) == [2.0, 3.0, 4.0]
        with pytest.raises(ValueError, match="math domain error"):
            next(results)
        assert list(ahead.over([25.0, 36.0])) == [5.0, 6.0]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("threads", "depth", "allowed"), [(0, None, 0), (1, 1, 1), (3, None, 6), (3, 2, 2), (0, 5, 0)])
def test_no_more_is_drawn_from_the_items_than_is_made_ahead(threads: int, depth: int | None, allowed: int) -> None:
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        while drawn < 100:
            drawn += 1
            yield drawn

    with ReadAhead(Square(), threads=threads, depth=depth) as ahead:
        assert ahead.depth == allowed
        for number, _ in enumerate(ahead.over(items()), start=1):
            assert drawn <= number + allowed
    assert number == 100


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 4))
def test_nothing_is_made_ahead_while_it_would_not_pay_and_the_order_is_the_same(quick: list[bool], depth: int) -> None:
    drawn = taken_so_far = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for item in range(len(quick)):
            drawn += 1
            yield item

    here = threading.get_ident()
    makers: list[int] = []
    ahead = ReadAhead(
        lambda item: (item, threading.get_ident()), threads=2, depth=lambda: 0 if quick[taken_so_far] else depth
    )
    with ahead:
        for item, maker in ahead.over(items()):
            assert (item, quick[item:] and drawn <= item + 1 + depth) == (taken_so_far, True)
            makers.append(maker)
            taken_so_far = min(taken_so_far + 1, len(quick) - 1)
    assert len(makers) == len(quick)
    assert not all(quick) or set(makers) == {here}
    assert any(quick) or here not in makers


def test_endless_items_end_with_their_loop_and_the_workers_go_on() -> None:
    with ReadAhead(Square(), processes=1) as ahead:
        for _ in range(3):
            assert [result for result, _ in zip(ahead.over(itertools.count()), range(4), strict=False)] == [0, 1, 4, 9]
            (worker,) = multiprocessing.active_children()
        assert [worker] == multiprocessing.active_children()


def test_a_result_is_let_go_of_with_its_loop_variable() -> None:
    class Large:
        pass

    with ReadAhead(lambda _: Large(), threads=1) as ahead:
        for large in ahead.over(range(4)):
            left = weakref.ref(large)
            del large
            gc.collect()
            assert left() is None


def test_closing_in_the_middle_leaves_no_thread() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def make(item: int) -> int:
        if item:
            begun.set()
            may_end.wait()
        return item

    ahead = ReadAhead(make, threads=1, depth=20)
    results = ahead.over(range(50))
    assert next(results) == 0
    begun.wait()
    closing = threading.Thread(target=ahead.close)
    closing.start()
    may_end.set()
    closing.join()
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())
    ahead.close()  # as often as one likes


def test_a_process_that_is_killed_is_one_line_and_the_next_loop_has_new_ones() -> None:
    with ReadAhead(Square(deadly=3), processes=2) as ahead:
        with pytest.raises(LoaderError, match="a worker process of the loader was killed") as caught:
            list(ahead.over(range(8)))
        assert "\n" not in str(caught.value)
        assert not multiprocessing.active_children()
        assert list(ahead.over([1, 2])) == [1, 4]


@pytest.mark.parametrize("workers", [{"threads": 1}, {"processes": 1}])
def test_work_that_hangs_is_not_waited_for_when_nobody_wants_it_any_more(
    workers: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache_schema.read_ahead._GRACE", 0.05)
    end = threading.Event()
    with ReadAhead(lambda item: item or end.wait(), **workers) as ahead:
        assert list(ahead.over([0, 0], unless=lambda: True)) == []
    assert not multiprocessing.active_children()
    end.set()
