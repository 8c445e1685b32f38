"""Batches for training come in an order that nothing disturbs, in memory that is used again but never too early."""

import contextlib
import gc
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from cache_building import assert_holds_what_it_says, build, is_in_a_slot, many_examples, some_examples
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import (
    Cache,
    CacheCorrupt,
    CacheRequestError,
    FeatureBatch,
    FeatureLoader,
    LoaderError,
    open_cache,
)
from cache_schema.loading.side_by_side import AT_ONCE

CacheOf = Callable[..., Path]
ROWS = 20


@pytest.fixture(scope="module")
def cache(cache_of: CacheOf) -> Cache:
    return open_cache(cache_of(feature_rows=ROWS, kind="int8"))


def seen(batches: Iterable[FeatureBatch]) -> list[tuple[list[int], list[int]]]:
    return [(batch.rows.tolist(), batch.views.tolist()) for batch in batches]


@some_examples
@given(st.data())
def test_the_order_is_the_same_for_any_number_of_workers(cache_of: CacheOf, data: st.DataObject) -> None:
    cache = open_cache(cache_of(feature_rows=ROWS, kind="int8"))
    rows = data.draw(st.none() | st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=30))
    options = {
        "batch_size": data.draw(st.integers(1, 9)),
        "rows": rows,
        "seed": data.draw(st.integers(0, 3)),
        "drop_last": data.draw(st.booleans()),
        "view": data.draw(st.sampled_from([0, "hflip", ["canonical", "hflip"]])),
        "tap": data.draw(st.sampled_from(["hidden", "single.3"])),
    }
    orders = []
    for workers in (0, 1, 2):
        with FeatureLoader(cache, **options, workers=workers) as loader:
            orders.append([])
            for _ in range(2):
                for batch in loader:
                    assert_holds_what_it_says(cache, batch, options["tap"])
                    orders[-1] += seen([batch])
            assert len(orders[-1]) == 2 * len(loader)
    assert orders[0] == orders[1] == orders[2]
    if not options["drop_last"]:
        epoch = [row for batch in orders[0][: len(orders[0]) // 2] for row in batch[0]]
        assert sorted(epoch) == sorted(range(ROWS) if rows is None else rows)


@many_examples
@given(st.integers(1, 8), st.integers(0, 14), st.booleans())
def test_a_resumed_loader_gives_what_the_uninterrupted_one_gives_from_there(
    cache_of: CacheOf, batch_size: int, taken: int, drop_last: bool
) -> None:
    cache = open_cache(cache_of(feature_rows=ROWS, kind="int8"))

    def loader() -> FeatureLoader:
        return FeatureLoader(cache, batch_size, seed=5, view=[0, 1], drop_last=drop_last)

    def endless(loader: FeatureLoader) -> Iterator[FeatureBatch]:
        while True:
            yield from loader

    def next_batches(loader: FeatureLoader, count: int) -> list[tuple[list[int], list[int]]]:
        return seen(batch for batch, _ in zip(endless(loader), range(count), strict=False))

    whole, first, second = next_batches(loader(), taken + 6), loader(), loader()
    # `zip` takes one more than it gives.
    assert next_batches(first, taken) == whole[:taken]
    state = first.state_dict()
    assert state["epoch"] * len(first) + state["batch"] == taken + 1
    second.load_state_dict(json.loads(json.dumps(state)))
    assert next_batches(second, 5) == whole[taken + 1 :]


def test_what_workers_read_ahead_does_not_count_as_taken(cache: Cache) -> None:
    with FeatureLoader(cache, 3, seed=1) as loader:
        whole = seen(loader) + seen(loader)
    state, found = None, []
    for workers, steps in ((2, 2), (0, 3), (1, 1), (2, 8)):
        with FeatureLoader(cache, 3, seed=1, workers=workers) as loader:
            if state:
                loader.load_state_dict(state)
            while steps:
                for batch in loader:
                    found += seen([batch])
                    steps, state = steps - 1, loader.state_dict()
                    if not steps:
                        break
    assert found == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_goes_on_after_a_break_and_then_with_the_next_epoch(cache: Cache, workers: int) -> None:
    with FeatureLoader(cache, 4, workers=workers) as loader:
        first = seen(batch for batch, _ in zip(loader, range(2), strict=False))
        rest = seen(loader)
        assert (len(loader), len(rest)) == (5, 2)  # `zip` took one more than it gave
        assert loader.state_dict()["epoch"] == 1
        assert seen(loader)[:2] != first


def test_a_loader_goes_back_to_where_a_state_says(cache: Cache) -> None:
    with FeatureLoader(cache, 4, workers=1) as loader:
        start = loader.state_dict()
        first = seen(loader)
        loader.load_state_dict(start)
        assert seen(loader) == first


def test_without_a_seed_rows_keep_their_order(cache: Cache) -> None:
    with FeatureLoader(cache, 2, rows=[5, 3, 11, 3, 0], seed=None) as loader:
        assert [rows for rows, _ in seen(loader)] == [[5, 3], [11, 3], [0]] == [rows for rows, _ in seen(loader)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 5}, "batch_size 4, this one has 5"),
        ({"seed": 1}, "seed 0, this one has 1"),
        ({"rows": [1, 2]}, "rows "),
        ({"view": 1}, "views "),
    ],
)
def test_a_state_of_another_order_is_refused(cache: Cache, change: dict, message: str) -> None:
    state = FeatureLoader(cache, 4).state_dict()
    with pytest.raises(CacheRequestError, match=message):
        FeatureLoader(cache, **({"batch_size": 4} | change)).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size ≥ 1"),
        ({"workers": -1}, "workers ≥ 0"),
        ({"tap": "velocity"}, "lacks tap velocity"),
        ({"timesteps": [11]}, "lacks timestep 11"),
        ({"view": "crop.1"}, "lacks view crop.1"),
        ({"view": [0, 2]}, "lacks view 2"),
        ({"view": []}, "needs a view"),
        ({"view": [0, 1], "seed": None}, "a seed to draw"),
        ({"rows": [0, ROWS]}, f"row {ROWS} .* has no features"),
        ({"rows": [-1]}, "row -1 .* has no features"),
        ({"rows": [0.5]}, "row numbers"),
        ({"rows": []}, "no rows"),
    ],
)
def test_what_a_cache_lacks_is_said_before_anything_is_read(cache: Cache, options: dict, message: str) -> None:
    with pytest.raises(CacheRequestError, match=message):
        FeatureLoader(cache, **({"batch_size": 4} | options))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "float8_e4m3"])
def test_timesteps_are_chosen_and_every_encoding_passes_through_a_slot(cache_of: CacheOf, kind: str) -> None:
    cache = open_cache(cache_of(kind=kind))
    with FeatureLoader(cache, 4, timesteps=[28, 10], workers=1, pin_memory=True) as loader:
        for batch in loader:
            assert is_in_a_slot(batch.payload)
            expected = cache.read(batch.rows.numpy(), timesteps=[28, 10])
            assert torch.equal(batch.payload.view(torch.uint8), expected.payload.view(torch.uint8))
            assert torch.equal(batch.decode(), expected.decode())


# --- memory


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_is_kept_never_changes_and_one_let_go_of_is_used_again(cache: Cache, workers: int) -> None:
    chance = random.Random(workers)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    places = set()
    with FeatureLoader(cache, 3, seed=2, view=[0, 1], workers=workers) as loader:
        for _ in range(12):
            for batch in loader:
                places.add(batch.payload.data_ptr())
                # A view of one sample alone keeps the whole batch as it is.
                part = chance.choice([batch.payload, batch.scale, batch.payload[1]])
                if chance.random() < 0.6:
                    kept.append((part, part.clone()))
                del part
                while len(kept) > 2:
                    kept.pop(chance.randrange(2))
                assert all(torch.equal(kept_now, as_it_was) for kept_now, as_it_was in kept)
    assert len(places) <= 2 * workers + 4


@pytest.mark.parametrize("workers", [0, 1])
def test_all_batches_may_be_kept_at_once_even_after_the_loader_is_gone(cache: Cache, workers: int) -> None:
    loader = FeatureLoader(cache, 2, seed=2, workers=workers)
    batches = list(loader) + list(loader)
    loader.close()
    del loader
    gc.collect()
    assert len(batches) == ROWS
    assert sum(is_in_a_slot(batch.payload) for batch in batches) == (2 * workers or AT_ONCE) + 4
    for batch in batches:
        assert_holds_what_it_says(cache, batch)


def test_a_steady_loop_needs_few_slots(cache: Cache) -> None:
    with FeatureLoader(cache, 2) as loader:
        places = {batch.payload.data_ptr() for _ in range(3) for batch in loader}
    assert len(places) == 2


@pytest.mark.parametrize("end", ["close", "break", "forget"])
def test_nothing_is_left_of_a_loader(cache: Cache, end: str) -> None:
    def resources() -> tuple[int, bool, int]:
        gc.collect()
        opened = []
        for descriptor in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # that of the listing
                opened.append(str(descriptor.readlink()))
        kinds = ("pipe:", "socket:", "/memfd:", "/dev/shm", "anon_inode:")  # the cache itself keeps files open
        mapped = "dit-distill-batches" in Path("/proc/self/maps").read_text()
        return sum(name.startswith(kinds) for name in opened), mapped, len(children())

    before, threads = resources(), set(threading.enumerate())
    assert not before[1]
    loader = FeatureLoader(cache, 4, workers=2)
    for batch in loader:
        assert_holds_what_it_says(cache, batch)
        if end == "break":
            break
    workers = children()
    if end != "forget":
        loader.close()
    del batch, loader
    gc.collect()
    for worker in workers:
        worker.join()
    # The thread that looked after them closes their pipes, a moment after the last of them is gone.
    # Nothing may hold that thread either: its pipes are closed with what it had.
    # Those of this process that read files side by side, where a disk is slow, are not the loader's and stay.
    while later := {each for each in threading.enumerate() if not each.name.startswith("files-")} - threads:
        later.pop().join()
    assert len(workers) == 2
    del workers, worker
    assert resources() == before


def children() -> list[multiprocessing.process.BaseProcess]:
    return multiprocessing.active_children()


def test_spawned_workers_read_into_the_same_slots(cache: Cache) -> None:
    with FeatureLoader(cache, 6, seed=4) as loader:
        expected = seen(loader)
    with FeatureLoader(cache, 6, seed=4, workers=1, start_method="spawn") as loader:
        found = []
        for batch in loader:
            assert is_in_a_slot(batch.payload)
            assert_holds_what_it_says(cache, batch)
            found += seen([batch])
    assert found == expected


# --- when something goes wrong


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_the_same_error_in_any_process_after_the_batches_before_it(
    tmp_path: Path, workers: int
) -> None:
    root = build(tmp_path / "cache", kind="int8", samples_per_shard=3)
    shard = root / "features/hidden/c/1/0/0/0/0"
    shard.write_bytes(b"")
    found = []
    with FeatureLoader(open_cache(root), 1, seed=None, workers=workers) as loader:
        for _ in range(2):  # it does not go on behind the damage
            with pytest.raises(CacheCorrupt) as caught:
                found.extend(batch.rows.tolist() for batch in loader)
            assert str(shard) in str(caught.value)
            assert "\n" not in str(caught.value)
        assert found == [[0], [1], [2]]
        assert loader.state_dict()["batch"] == 3
    assert not children()


def test_a_worker_that_is_killed_is_one_clear_error_and_the_loader_can_go_on(cache: Cache) -> None:
    with FeatureLoader(cache, 3, workers=2) as reference:
        expected = [batch for _ in range(3) for batch in seen(reference)]
    found = []

    def take(epochs: int) -> None:
        while loader.state_dict()["epoch"] < epochs:
            for batch in loader:
                found.extend(seen([batch]))

    with FeatureLoader(cache, 3, workers=2) as loader:
        take(1)
        children()[0].kill()
        with pytest.raises(LoaderError, match="a worker process of the loader was killed") as caught:
            take(10_000)
        assert "\n" not in str(caught.value)
        assert not children()
        del found[len(expected) :]
        loader.load_state_dict(loader.state_dict() | {"epoch": 1, "batch": 0})
        del found[len(loader) :]
        take(3)
    assert found == expected


def test_workers_leave_interrupts_and_a_schedulers_sigterm_to_the_parent(cache: Cache) -> None:
    with FeatureLoader(cache, 3, workers=2) as loader:
        expected = seen(loader)
        workers = children()
        for name in ("-INT", "-TERM"):
            subprocess.run(["kill", name, *(str(worker.pid) for worker in workers)], check=True)
        loader.load_state_dict(loader.state_dict() | {"epoch": 0})
        assert seen(loader) == expected
        assert children() == workers
        assert all(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_process_that_uses_them(cache: Cache, number: int) -> None:
    script = """
        import multiprocessing, signal, sys
        from cache_schema import FeatureLoader, open_cache
        pressed = []
        # Noted and raised between batches: Python drops an exception that falls into the moment a batch is let go of.
        signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
        with FeatureLoader(open_cache(sys.argv[1]), 3, workers=2) as loader:
            told = False
            while True:
                for batch in loader:
                    if pressed:
                        raise KeyboardInterrupt
                    if not told:
                        print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
                        told = True
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(cache.root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    assert process.stdout is not None
    try:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.kill()
        # The workers hold the other end of both pipes: these end when the last of them has ended.
        _, errors = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -number
    if number == signal.SIGINT:
        assert errors.count("Traceback") == 1  # the script's own KeyboardInterrupt
