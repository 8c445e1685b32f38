"""A cache comes to the Hub by its rules, in few commits, and is read back before it counts as there."""

import hashlib
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import cache_servers as servers
import pytest
import torch
from cache_building import build, failures_of_two_at_once, tiny_manifest, tiny_samples, tree
from cache_hub import LARGE, HubServer, Repository
from cache_proxy import FaultyProxy

from cache_schema import CacheCorrupt, CacheError, CacheNotFound, Provenance, TapInfo, open_cache
from cache_schema.care.verify import verify
from cache_schema.format.journal import record_name
from cache_schema.sharing.catalogue import catalogue, remove
from cache_schema.sharing.parts import Selection
from cache_schema.sharing.pull import plan_pull, pull
from cache_schema.sharing.push import is_public, plan_push, push
from cache_schema.storage.hub import HubPlace
from cache_schema.storage.hub_rules import check_layout
from cache_schema.storage.places import folder_at
from cache_schema.storage.retrying import Retrying, Transient
from cache_schema.stores.registry import store_of

URL = "hf://datasets/mia/caches/birds"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    provenance = Provenance(created="2026-01-02T00:00:00+00:00", command="dit-cache build")
    taps = [TapInfo(name="hidden", tokens=6, channels=8, grid=(2, 3))]
    return build(tmp_path_factory.mktemp("hub") / "cache", provenance, samples_per_shard=1, taps=taps)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    servers.hub()
    monkeypatch.setenv("DIT_CACHE_LOCAL", str(tmp_path / "blocks"))
    with HubServer() as server:
        for name, value in servers.hub_environment(server.url).items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def holding(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A hub to which the cache was pushed in small commits; to be read."""
    servers.hub()
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in servers.hub_environment(server.url).items():
            patch.setenv(name, value)
        patch.setattr(HubPlace, "files_per_commit", 12)
        send(root)
        patch.undo()
        yield server


@pytest.fixture
def there(holding: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubServer:
    monkeypatch.setenv("DIT_CACHE_LOCAL", str(tmp_path / "blocks"))
    for name, value in servers.hub_environment(holding.url).items():
        monkeypatch.setenv(name, value)
    return holding


def send(root: Path, url: str = URL) -> None:
    push(plan_push(str(root), url))


def test_what_was_pushed_there_is_the_cache_in_commits_of_fewer_than_a_hundred_files(
    there: HubServer, root: Path, tmp_path: Path
) -> None:
    repository = there.repositories["mia/caches"]
    assert repository.private
    assert len(there.operations) > 3
    assert max(there.operations) <= 12
    # The manifest came in the last commit, in which the claim went.
    (_, before), (_, last) = repository.commits[-2:]
    assert "birds/manifest.json" in last.keys() - before.keys()
    assert "birds/push.json" in before.keys() - last.keys()
    assert verify(URL) == []
    assert [(entry.name, entry.row()["state"]) for entry in catalogue("hf://datasets/mia/caches")] == [
        ("birds", "sealed")
    ]
    here, remote = open_cache(root), open_cache(URL)
    assert torch.equal(here.read([0, 5]).payload, remote.read([0, 5]).payload)
    pull(plan_pull(URL, str(tmp_path / "copy"), Selection(), None))
    assert verify(tmp_path / "copy") == []
    copy, source = tree(tmp_path / "copy"), tree(root)
    assert {name for name in source if copy[name] != source[name]} <= {
        "manifest.json", "README.md", "journal/seal-00000.json"  # from which a path was taken out
    }  # fmt: skip


def test_a_killed_push_moves_no_file_again_and_nobody_sees_a_cache_meanwhile(hub: HubServer, root: Path) -> None:
    late = next(data for name, data in sorted(tree(root).items()) if "hidden/c/5/" in name and len(data) >= LARGE)
    program = textwrap.dedent(f"""
        from cache_schema.sharing.push import plan_push, push
        from cache_schema.storage.hub import HubPlace
        HubPlace.files_per_commit = 12
        push(plan_push({str(root)!r}, {URL!r}))
    """)
    with FaultyProxy(hub.url) as proxy:
        # Read back, so that the commit it was in is there, which had the records of the commit before.
        proxy.stop_once_answered("GET", f"/cdn/{hashlib.sha256(late).hexdigest()}", held="PUT")
        environment = servers.hub_environment(proxy.url)
        sender = subprocess.Popen([sys.executable, "-c", program], env={**environment, "PATH": "/usr/bin:/bin"})
        assert proxy.stopped.wait(60)
        sender.send_signal(signal.SIGKILL)
        sender.wait()
        proxy.go_on()
    assert [entry.row()["state"] for entry in catalogue("hf://datasets/mia/caches")] == ["being pushed"]
    with pytest.raises(CacheNotFound):
        open_cache(URL)
    recorded = [name for name in folder_at(URL).names("journal") if name.startswith("features")]
    assert recorded
    commits = len(hub.repositories["mia/caches"].commits)
    send(root)
    assert len(hub.uploaded) == len(set(hub.uploaded))
    # Files with a record are no part of any commit after it.
    again = hub.repositories["mia/caches"].commits
    for shard in (int(re.findall(r"\d+", name)[0]) for name in recorded):
        name = f"birds/{record_name('features', shard)}"
        assert all(files[name] == again[commits - 1][1][name] for _, files in again[commits:])
    assert verify(URL) == []


def test_two_who_push_at_once_end_with_one_good_cache(hub: HubServer, root: Path) -> None:
    assert failures_of_two_at_once(lambda: send(root)) == []
    assert verify(URL) == []


def test_a_hub_that_stores_other_bytes_and_says_that_all_is_well_is_not_believed(hub: HubServer, root: Path) -> None:
    hub.lies = True
    with pytest.raises(CacheCorrupt, match="is not what was written there, read twice"):
        send(root)
    assert folder_at(URL).size("manifest.json") is None
    assert not [name for name in folder_at(URL).names("journal") if name.startswith("features")]


def test_requests_that_fail_in_passing_are_made_again(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyProxy(hub.url) as proxy:
        monkeypatch.setenv("HF_ENDPOINT", proxy.url)
        folder = folder_at(URL)
        for fault, part in (("cut", "/commit/"), ("500", "/commit/"), ("429", "/resolve/"), ("truncated", "/cdn/")):
            proxy.fail(fault, part, 1)
            folder.write(fault, bytes(1000))
            assert folder.read_bounded(fault, 1000) == bytes(1000)
        assert proxy.failed == 4


def test_a_server_that_asks_to_be_left_alone_is_and_that_is_not_held_against_the_deadline() -> None:
    waited: list[float] = []
    answers = iter([Transient("too many requests (429)", wait=200.0), Transient("lost"), None])

    def ask() -> str:
        if (error := next(answers)) is not None:
            raise error
        return "answer"

    assert Retrying(deadline=1.0, sleep=waited.append).call("here", ask) == "answer"
    assert waited[0] == 200.0
    with pytest.raises(CacheError, match="too many requests"):
        Retrying(deadline=0.2, sleep=waited.append).call("here", _always(Transient("too many requests", wait=300.0)))


def _always(error: Exception):
    def ask() -> None:
        raise error

    return ask


def test_a_commit_that_is_refused_for_being_busy_is_made_when_the_hub_says(hub: HubServer) -> None:
    hub.busy = 1
    folder_at(URL).write("a", b"contents")
    assert folder_at(URL).read_bounded("a", 8) == b"contents"
    assert hub.busy == 0


def test_without_credentials_it_is_said_where_they_are_stored(
    there: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    for ask in (lambda: open_cache(URL), lambda: send(root), lambda: send(root, "hf://datasets/mia/other")):
        with pytest.raises(CacheError, match="not public: `hf auth login`"):
            ask()
    with pytest.raises(CacheError, match="write hf://datasets/OWNER/NAME"):
        folder_at("hf://mia/caches")


def test_whether_everybody_will_read_a_cache_is_known_before_it_is_pushed(
    there: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_public(plan_push(str(root), "hf://datasets/mia/new"))
    assert not is_public(plan_push(str(root), URL))
    monkeypatch.setattr(there.repositories["mia/caches"], "private", False)
    assert is_public(plan_push(str(root), URL))


def test_a_cache_is_removed_by_commits_of_many_files_and_what_is_beside_it_stays(hub: HubServer) -> None:
    files = dict.fromkeys(("manifest.json", *(f"journal/features-{i:05d}.json" for i in range(120))), b"{}")
    hub.repositories["mia/caches"] = Repository(private=True)
    contents = {f"birds/{name}": data for name, data in files.items()} | {"other/notes.txt": b"no cache"}
    hub.repositories["mia/caches"].commits.append(("1" * 40, contents))
    assert remove(URL) == 121
    (_, first), (_, last) = hub.repositories["mia/caches"].commits[-2:]
    assert "birds/manifest.json" not in first
    assert hub.operations == [99, 22]
    assert last == {"other/notes.txt": b"no cache"}


def files_of(shards: int) -> dict[str, int]:
    """The names of the files of a cache of so many shards, a sample in each, and a size."""
    store = store_of(tiny_manifest(*tiny_samples()))
    names = [*store.documents(), "manifest.json", "samples.parquet"]
    for shard in range(shards):
        names += [record_name("features", shard), *store.shard_files(shard)]
    return dict.fromkeys(names, 1000)


def test_caches_of_many_shards_are_laid_out_as_the_hub_allows_or_refused_before_anything_is_sent() -> None:
    check_layout(URL, files_of(9_990))
    with pytest.raises(
        CacheError, match=r"features/hidden/c would hold 10001 files.*fewer than 10 000 a folder.*--samples-per"
    ):
        check_layout(URL, files_of(10_001))
    with pytest.raises(CacheError, match=r"would hold 100000 files.*fewer than 100 000 a repository"):
        check_layout(URL, {"a": 1}, (f"{i // 5000}/{i}" for i in range(99_999)))
    with pytest.raises(CacheError, match=r"features/a has 20\.0 GB"):
        check_layout(URL, {"features/a": 20_000_000_000})


def test_a_layout_that_breaks_the_rules_with_what_is_there_already_is_refused_by_the_plan(
    there: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = len(tree(root))
    monkeypatch.setattr("cache_schema.storage.hub_rules.MOST_FILES", 2 * count)
    plan_push(str(root), URL)
    with pytest.raises(CacheError, match="a repository"):
        plan_push(str(root), "hf://datasets/mia/caches/other")
