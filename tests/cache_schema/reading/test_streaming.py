"""A cache at a URL is read as one here is: what a batch needs is fetched, kept up to a bound, and never believed."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import cache_servers as servers
import pytest
import torch
from cache_building import FEATURE_ROWS, IMAGE_ROWS, TAPS, image_of
from cache_proxy import FaultyProxy

from cache_schema import (
    CacheCorrupt,
    CacheDataset,
    CacheError,
    CacheUnreachable,
    FeatureBatch,
    FeatureLoader,
    open_cache,
)
from cache_schema.care.describe import describe
from cache_schema.care.verify import verify
from cache_schema.format.manifest_file import render_manifest
from cache_schema.interrupts import leaving
from cache_schema.storage import blocks as stored
from cache_schema.storage.blocks import BlockStore
from cache_schema.storage.object_store import _store
from cache_schema.storage.places import folder_at
from cache_schema.storage.remote import RemoteFolder
from cache_schema.storage.retrying import Retrying, Transient

CacheOf = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIT_CACHE_LOCAL", str(tmp_path / "blocks"))
    for name, value in servers.s3_environment().items():
        monkeypatch.setenv(name, value)
    return tmp_path / "blocks"


def on_s3(root: Path, name: str) -> str:
    """The URL of a copy of a cache, on the tests' S3 server."""
    folder = folder_at(f"s3://team/{name}")
    for path in sorted(root.rglob("*")):
        if path.is_file():
            folder.write(path.relative_to(root).as_posix(), path.read_bytes())
    return folder.location


@pytest.mark.parametrize(("kind", "compression", "store"), [
    ("int8", "none", "zarr"), ("float16", "zstd", "zarr"), ("bfloat16", "none", "webdataset"),
])  # fmt: skip
def test_a_cache_on_s3_reads_as_the_one_it_is_a_copy_of(
    cache_of: CacheOf, kind: str, compression: str, store: str
) -> None:
    root = cache_of(kind=kind, compression=compression, store=store)
    url = on_s3(root, f"same-{kind}")
    here, there = open_cache(root), open_cache(url)
    rows = [5, 0, 3, 3, FEATURE_ROWS - 1]
    for _ in range(2):  # from a distance, then from the local disk
        for tap in TAPS:
            for steps in (None, [28, 10]):
                a, b = (cache.read(rows, tap=tap, timesteps=steps, view="hflip").decode() for cache in (here, there))
                assert torch.equal(a, b)
        assert there.images(list(range(IMAGE_ROWS))) == [image_of(row) for row in range(IMAGE_ROWS)]
    assert verify(url) == []
    assert {**describe(url), "path": ""} == {**describe(root), "path": ""}


def test_a_cache_that_another_build_replaces_is_read_no_further(cache_of: CacheOf) -> None:
    folder = folder_at(on_s3(cache_of(kind="int8"), "replaced"))
    expected, there = open_cache(cache_of(kind="int8")), open_cache(folder.location)
    assert torch.equal(there.read([0]).decode(), expected.read([0]).decode())

    def put_there(**changes: str) -> None:
        provenance = expected.manifest.provenance.model_copy(update={**changes, "checksum": None})
        folder.write("manifest.json", render_manifest(expected.manifest.model_copy(update={"provenance": provenance})))

    put_there(owner="mia")  # who pushed the same build
    assert torch.equal(there.read([3]).decode(), expected.read([3]).decode())
    put_there(created="2027-01-01T00:00:00+00:00")
    with pytest.raises(CacheCorrupt, match="was replaced by another build while it was read"):
        there.read([FEATURE_ROWS - 1])
    folder.delete("manifest.json")
    with pytest.raises(CacheCorrupt, match="was removed while it was read"):
        there.read([FEATURE_ROWS - 1])


def test_workers_of_a_loader_and_a_web_server_in_forked_processes_read_the_same(cache_of: CacheOf) -> None:
    root = cache_of(kind="int8")
    expected = [batch.payload for batch in FeatureLoader(open_cache(root), 3, seed=1)]
    there = on_s3(root, "workers")
    for workers in (1, 0):
        with FeatureLoader(open_cache(there), 3, seed=1, workers=workers) as loader:
            assert all(torch.equal(a, b.payload) for a, b in zip(expected, loader, strict=True))
    url, files = servers.nginx()
    if not (files / "forked").exists():
        (files / "forked").symlink_to(root)
    cache = open_cache(f"{url}/forked")
    assert torch.equal(cache.read([0]).payload, open_cache(root).read([0]).payload)
    with FeatureLoader(cache, 3, seed=1, workers=1, start_method="fork") as loader:
        assert all(torch.equal(a, b.payload) for a, b in zip(expected, loader, strict=True))


def test_a_bucket_opened_before_a_fork_is_refused_in_the_forked_process_rather_than_waited_for(
    cache_of: CacheOf,
) -> None:
    cache = open_cache(on_s3(cache_of(), "fork"))
    with (
        FeatureLoader(cache, 3, workers=1, start_method="fork") as loader,
        pytest.raises(CacheError, match="spawn"),
    ):
        next(iter(loader))


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy before the S3 server, by which s3:// goes once `AWS_ENDPOINT_URL` is its own."""
    with FaultyProxy(servers.s3_endpoint()) as server:
        yield server
    _store.cache_clear()


def rest_of_an_epoch(url: str, go: Callable[[], None], come: Callable[[], None]) -> list[torch.Tensor]:
    """The batches of an epoch in the middle of which the server is gone for a second."""
    batches = iter(FeatureLoader(open_cache(url), 1, seed=1))
    found = [next(batches).payload.clone()]
    go()
    back = threading.Timer(1.0, come)
    back.start()
    found += [batch.payload.clone() for batch in batches]
    back.join()
    return found


def test_a_server_that_dies_in_the_middle_of_an_epoch_costs_the_time_that_it_was_gone_and_not_the_run(
    cache_of: CacheOf, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = cache_of(kind="int8")
    expected = [batch.payload for batch in FeatureLoader(open_cache(root), 1, seed=1)]
    url = on_s3(root, "dies")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr("cache_schema.storage.retrying._LONGEST_WAIT", 0.2)
    _store.cache_clear()
    found = rest_of_an_epoch(url, proxy.go_away, proxy.come_back)
    assert proxy.failed  # requests were under way or made while it was gone
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_server_that_stands_still_in_the_middle_of_an_epoch_costs_that_time_and_not_the_run(
    cache_of: CacheOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = cache_of(kind="int8")
    expected = [batch.payload for batch in FeatureLoader(open_cache(root), 1, seed=1)]
    url = on_s3(root, "stands-still")
    process = servers.s3_server()[1]
    # Silence counts as a lost connection long before the server goes on.
    monkeypatch.setattr("cache_schema.storage.retrying._LONGEST_STALL", 0.3)
    _store.cache_clear()
    try:
        found = rest_of_an_epoch(
            url, lambda: process.send_signal(signal.SIGSTOP), lambda: process.send_signal(signal.SIGCONT)
        )
    finally:
        process.send_signal(signal.SIGCONT)
        _store.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


FAULTS = ["cut", "500", "429", "truncated", "wrong bytes", "slow"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_nothing(
    cache_of: CacheOf, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    root = cache_of(kind="int8")
    url = on_s3(root, f"fault-{fault.replace(' ', '-')}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    _store.cache_clear()
    cache, rows = open_cache(url), list(range(FEATURE_ROWS))
    proxy.fail(fault, "/features/", 3)
    assert torch.equal(cache.read(rows).decode(), open_cache(root).read(rows).decode())
    assert proxy.failed == 3


def test_what_stays_wrong_is_named_and_is_right_again_when_the_server_is(
    cache_of: CacheOf, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = cache_of()
    url = on_s3(root, "wrong")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    _store.cache_clear()
    cache = open_cache(url)
    proxy.fail("wrong bytes", "/features/hidden/c/0/", 1000)
    with pytest.raises(CacheCorrupt, match=r"s3://team/wrong/features/hidden/c/0/.*sample"):
        cache.read([0])
    proxy.fail("none", "", 0)
    assert torch.equal(cache.read([0]).payload, open_cache(root).read([0]).payload)


def test_a_server_that_does_not_answer_is_said_to_be_unreachable_after_the_deadline(tmp_path: Path) -> None:
    waits: list[float] = []
    with servers.refusing_port() as port:
        folder = folder_at(f"http://127.0.0.1:{port}/cache")
        assert isinstance(folder, RemoteFolder)
        patient = RemoteFolder(folder.url, folder.place, Retrying(deadline=0.5, sleep=waits.append))
        with pytest.raises(CacheUnreachable, match="cannot be reached: the connection was refused"):
            patient.read_bounded("manifest.json", 100)
    assert waits == sorted(waits, key=lambda wait: wait > 0.1)  # ever longer


def test_a_process_that_was_told_to_end_does_not_ask_again_for_what_failed() -> None:
    asked = []

    def ask() -> None:
        asked.append(leaving.set())
        raise Transient("the server is gone", wait=60)

    try:
        with pytest.raises(CacheUnreachable, match="the server is gone"):
            Retrying(60).call("s3://x/y", ask)
    finally:
        leaving.clear()
    assert len(asked) == 1


def test_a_block_that_was_garbled_after_it_was_read_is_found_by_its_checksum_and_fetched_again(
    cache_of: CacheOf, own_blocks: Path
) -> None:
    root = cache_of(kind="int8")
    here, there = open_cache(root), open_cache(on_s3(root, "garbled"))
    rows = list(range(FEATURE_ROWS))
    for _ in range(2):
        assert torch.equal(there.read(rows).decode(), here.read(rows).decode())
        for path in BlockStore(own_blocks, 1 << 30).files():
            with path.open("r+b") as file:
                file.seek(-50, os.SEEK_END)
                file.write(bytes(50))


def test_what_an_epoch_left_here_is_read_by_the_loop_itself_and_without_a_request(
    cache_of: CacheOf, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = cache_of(kind="int8")
    url = on_s3(root, "second-epoch")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    _store.cache_clear()
    readers: list[str] = []
    read = CacheDataset.read

    def noted(self: CacheDataset, *args: object) -> FeatureBatch:
        readers.append(threading.current_thread().name)
        return read(self, *args)

    monkeypatch.setattr(CacheDataset, "read", noted)
    with FeatureLoader(open_cache(url), 2, seed=1) as loader:
        whole = [batch.payload.clone() for _ in range(3) for batch in loader]
        assert all(name.startswith("ahead") for name in readers[: len(loader)])
        proxy.go_away()
        readers.clear()
        assert len([batch for _ in range(2) for batch in loader]) == 2 * len(loader)
        assert set(readers) == {threading.current_thread().name}
    expected = FeatureLoader(open_cache(root), 2, seed=1)
    assert all(torch.equal(a, b.payload) for a, b in zip(whole, (b for _ in range(3) for b in expected), strict=True))


def test_a_local_disk_that_is_full_costs_what_would_be_kept_and_not_the_run(
    cache_of: CacheOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = cache_of(kind="int8")
    here, there = open_cache(root), open_cache(on_s3(root, "full"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stored.os, "ftruncate", full)
    rows = list(range(FEATURE_ROWS))
    for _ in range(2):
        assert torch.equal(there.read(rows).decode(), here.read(rows).decode())
        assert there.waits
