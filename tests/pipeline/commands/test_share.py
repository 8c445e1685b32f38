"""`dit-cache push`, `pull`, `ls`, `find`, `rm` and `gc` as people type them, against real servers."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cache_servers as servers
import pytest
import torch
from cache_building import build, tree
from cache_hub import Repository
from cache_proxy import FaultyProxy

from cache_schema import Provenance, open_cache
from cache_schema.cli import run
from cache_schema.storage.object_store import _store
from cache_schema.storage.places import folder_at
from pipeline.cli import app

PREFIX = "s3://team/commands"
Command = Callable[..., str]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """S3 is the tests' own server; what the command changes in this process is put back."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for name, value in {**servers.s3_environment(), "DIT_CACHE_LOCAL": str(tmp_path / "blocks")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DIT_CACHE_REMOTE", raising=False)
    _store.cache_clear()


@pytest.fixture
def dit_cache(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `dit-cache` with these arguments and return all that it said, after checking its exit code."""

    def command(*arguments: str, expect: int = 0) -> str:
        with pytest.raises(SystemExit) as left:
            run(app, list(arguments), name="dit-cache")
        captured = capsys.readouterr()
        # What ends a command comes last, however slow the bar beside it was.
        said = captured.out + captured.err if expect else captured.err + captured.out
        assert int(left.value.code or 0) == expect, said
        return said

    return command


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    provenance = Provenance(created="2026-03-03T00:00:00+00:00")
    return build(tmp_path_factory.mktemp("cache") / "cache", provenance, kind="int8", samples_per_shard=1)


@pytest.fixture(scope="module")
def url(cache: Path) -> str:
    """Where the cache is once it was pushed, by the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "excepthook", sys.excepthook)
        for name, value in {**servers.s3_environment(), "DIT_CACHE_REMOTE": PREFIX, "DIT_CACHE_OWNER": "mia"}.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as left:
            run(app, ["push", str(cache)], name="dit-cache")
    assert not left.value.code
    return f"{PREFIX}/{open_cache(cache).manifest.label}"


def last_line(said: str) -> str:
    return said.strip().splitlines()[-1]


def test_a_pulled_cache_is_the_one_that_was_pushed_and_says_where_it_went(
    dit_cache: Command, cache: Path, url: str, tmp_path: Path
) -> None:
    label = open_cache(cache).manifest.label
    assert last_line(dit_cache("pull", url, str(tmp_path / "copy"))) == f"pulled {label} to {tmp_path / 'copy'}"
    assert tree(tmp_path / "copy").keys() == tree(cache).keys()
    assert "every file is as it was written" in dit_cache("verify", str(tmp_path / "copy"))
    assert last_line(dit_cache("pull", url, str(tmp_path / "copy"))).startswith("pulled")  # nothing is left to do
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    assert dit_cache("pull", url, str(tmp_path / "full"), expect=1).endswith(
        "full holds other things; choose an empty folder\n"
    )


def test_before_a_push_to_a_public_place_the_teachers_licence_is_shown_and_that_everybody_will_read_it(
    dit_cache: Command, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in servers.hub_environment().items():
        monkeypatch.setenv(name, value)
    place = "hf://datasets/mia/public/cache"
    assert "is public" not in dit_cache("push", str(cache), place, "--dry-run")
    servers.hub().repositories["mia/public"] = Repository(private=False)
    said = dit_cache("push", str(cache), place, "--dry-run").splitlines()
    licence = next(i for i, line in enumerate(said) if line.startswith("teacher's licence: "))
    assert said[licence + 1] == f"{place} is public: everybody may read the cache, which that licence must allow"


def test_a_cache_is_pulled_from_a_web_server_and_over_ssh(
    dit_cache: Command, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web, files = servers.nginx()
    if not (files / "commands").exists():
        (files / "commands").symlink_to(cache)
    dit_cache("pull", f"{web}/commands", str(tmp_path / "web"))
    assert tree(tmp_path / "web") == tree(cache)
    host, home = servers.ssh_host()
    monkeypatch.setenv("HOME", str(home))
    small = build(tmp_path / "small", feature_rows=2, with_images=False)
    place = f"{host}{tmp_path}/team/birds"
    assert f"pushed: `dit-cache pull {place} FOLDER`" in dit_cache("push", str(small), place)
    dit_cache("pull", place, str(tmp_path / "ssh"))
    assert open_cache(tmp_path / "ssh").manifest.cache_id == open_cache(small).manifest.cache_id
    assert "birds" in dit_cache("ls", f"{host}{tmp_path}/team")


def test_what_is_there_is_listed_and_found(
    dit_cache: Command, cache: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIT_CACHE_REMOTE", PREFIX)
    (entry,) = json.loads(dit_cache("ls", "--json"))
    assert (entry["url"], entry["state"], entry["owner"], entry["built"]) == (url, "sealed", "mia", "2026-03-03")
    header, line = dit_cache("ls").splitlines()
    assert header.split()[:3] == ["name", "data", "set"]
    assert line.startswith(url.rpartition("/")[2])
    assert url.rpartition("/")[2] in dit_cache("find", "dataset=tiny", "encoding=int8", "--place", PREFIX)
    # Whoever pushes the same build again in another name changes nothing.
    assert "pushed" in dit_cache("push", str(cache), url, "--owner", "ben")
    assert url.rpartition("/")[2] in dit_cache("find", "owner=mia")
    assert dit_cache("find", "encoding=float8") == f"no such cache at {PREFIX}\n"
    assert last_line(dit_cache("find", "colour=red", expect=1)).startswith("error: there is no column 'colour'; there")
    monkeypatch.delenv("DIT_CACHE_REMOTE")
    assert dit_cache("ls", expect=1) == "error: name a place, for example s3://team/caches, or set DIT_CACHE_REMOTE\n"


def test_removing_is_shown_first_and_done_when_told(dit_cache: Command, cache: Path, tmp_path: Path) -> None:
    place = f"file://{tmp_path}/team"
    for name in ("used", "old"):
        shutil.copytree(cache, tmp_path / "team" / name)
    (tmp_path / "runs/a").mkdir(parents=True)
    # The id would keep both.
    (tmp_path / "runs/a/config.json").write_text(json.dumps({"cache": f"{place}/used"}))
    before = tree(tmp_path / "team")
    said = dit_cache("gc", place, "--runs", str(tmp_path / "runs"))
    assert "old" in said
    assert "used" not in said
    assert "Add --yes to remove them" in last_line(said)
    assert last_line(dit_cache("rm", f"{place}/old")).endswith("files would be removed; add --yes to remove them")
    assert tree(tmp_path / "team") == before
    assert "removed" in dit_cache("gc", place, "--runs", str(tmp_path / "runs"), "--yes")
    assert [entry["name"] for entry in json.loads(dit_cache("ls", place, "--json"))] == ["used"]
    assert "every cache is used by a run" in dit_cache("gc", place, "--runs", str(tmp_path / "runs"))
    for sure in ((), ("--yes",)):
        assert last_line(dit_cache("rm", f"{place}/nothing", *sure, expect=1)).startswith("error: no cache at")
    assert "nowhere is no folder" in dit_cache("gc", place, "--runs", "nowhere", expect=2)
    dit_cache("rm", f"{place}/used", "--yes")
    assert dit_cache("ls", place) == f"no cache at {place}\n"


def test_a_killed_pull_goes_on_without_moving_or_asking_about_what_is_here(
    dit_cache: Command, cache: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    with FaultyProxy(servers.s3_endpoint()) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        _store.cache_clear()
        # By then one of the six that are fetched at once has made room for this one.
        proxy.stop_once_answered("GET", "/journal/features-00006")
        program = f"from pipeline.cli import app; app(['pull', {url!r}, {str(folder)!r}])"
        puller = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[3])
        assert proxy.stopped.wait(60)
        puller.send_signal(signal.SIGKILL)
        assert puller.wait() == -signal.SIGKILL
        proxy.go_on()
        assert not (folder / "manifest.json").exists()
        records = {path.name: json.loads(path.read_text())["files"] for path in (folder / "journal").glob("*-*.json")}
        assert any(name.startswith("features") for name in records)
        here = [f"journal/{name}" for name in records] + [file for files in records.values() for file in files]
        before = {file: (folder / file).stat().st_mtime_ns for file in here}
        proxy.log.clear()
        dit_cache("pull", url, str(folder))
        asked = [path for method, path in proxy.log if method in ("GET", "HEAD")]
    # The table of the samples says which pieces there are.
    moved = {name for name in here for path in asked if path.endswith(f"/{name}")}
    assert moved <= {"samples.parquet"}
    assert {file: (folder / file).stat().st_mtime_ns for file in here} == before
    assert tree(folder).keys() == tree(cache).keys()
    assert open_cache(folder).manifest.sealed


def test_a_part_says_of_what_it_is_one(dit_cache: Command, cache: Path, url: str, tmp_path: Path) -> None:
    folder, whole = str(tmp_path / "part"), open_cache(cache)
    said = last_line(dit_cache("pull", url, folder, "--timesteps", "28,16", "--taps", "hidden", "--samples", "0:3"))
    assert "; a part: samples 0:3, taps hidden, timesteps 28,16 of cache " in said
    assert f"of cache {whole.manifest.cache_id[:12]}, manifest " in dit_cache("info", folder)
    part = open_cache(folder)
    assert list(part.feature_rows) == [0, 1, 2]
    assert torch.equal(part.read([2]).decode(), whole.read([2], timesteps=[16, 28]).decode())
    assert "a part: images only" in dit_cache("pull", url, str(tmp_path / "images"), "--images-only")
    assert "a part: split test" in dit_cache("pull", url, str(tmp_path / "split"), "--split", "test")
    for option, text in (("--timesteps", "ten"), ("--timesteps", "11"), ("--samples", "3"), ("--split", "dev")):
        assert len(dit_cache("pull", url, str(tmp_path / "none"), option, text, expect=1).splitlines()) == 1


def test_a_server_that_is_gone_ends_a_command_in_one_line_after_the_time_given(
    dit_cache: Command, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than a server on a busy machine takes for any other request.
    monkeypatch.setenv("DIT_CACHE_TIMEOUT", "4")
    with FaultyProxy(servers.s3_endpoint()) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        _store.cache_clear()
        proxy.fail("cut", "/features/", 1_000_000)
        said = dit_cache("pull", url, str(tmp_path / "copy"), expect=1)
        assert len(said.splitlines()) == 1
        assert said.startswith(f"error: {url}/features/")
        assert "cannot be reached: the connection was lost (asked for " in said
        assert "run the same command again: finished work is kept" in said
        proxy.fail("none", "", 0)
        dit_cache("pull", url, str(tmp_path / "copy"))
    monkeypatch.setenv("DIT_CACHE_TIMEOUT", "0.5")
    with servers.refusing_port() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        _store.cache_clear()
        said = dit_cache("ls", PREFIX, expect=1)
    assert said.startswith(f"error: {PREFIX} cannot be reached: the connection was refused")
    monkeypatch.setenv("DIT_CACHE_TIMEOUT", "soon")
    _store.cache_clear()
    assert (
        dit_cache("ls", PREFIX, expect=1) == "error: DIT_CACHE_TIMEOUT=soon: give a number of seconds, for example 30\n"
    )


OPTIONS = ("--limit", "6", "--timesteps", "22", "--samples-per-shard", "4", "--image-size", "16", "--resolution", "32")


def test_what_the_team_has_is_not_built_again(
    dit_cache: Command, flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("build", "--teacher", str(flux_folder), *OPTIONS, "--output")
    dit_cache(*command, str(tmp_path / "a"))
    monkeypatch.setenv("DIT_CACHE_REMOTE", f"{PREFIX}/built")
    dit_cache("push", str(tmp_path / "a"))
    place = f"{PREFIX}/built/{open_cache(tmp_path / 'a').manifest.label}"
    # The pipe by which a step learns that its run is gone.
    monkeypatch.setattr("pipeline.chain.process.end_with_standard_input", lambda: None)
    run_of_it = ("run", "--teacher", str(flux_folder), "--set", "steps=build", *_as_settings(), "--step", "build")
    for again, output in ((command, tmp_path / "b"), ((*run_of_it, "--output"), tmp_path / "run")):
        said = last_line(dit_cache(*again, str(output), expect=1))
        assert said.startswith(f"error: this cache exists: `dit-cache pull {place} {output}")
        assert f"`dit-train run --cache {place}` streams it" in said
        assert not list(output.rglob("manifest.json"))
    dit_cache("pull", place, str(tmp_path / "b"))
    assert open_cache(tmp_path / "b").manifest.sealed
    folder_at(place).delete("manifest.json")
    # A build that has begun here is gone on with, whatever the team has; and who cannot ask builds.
    with servers.refusing_port() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("DIT_CACHE_TIMEOUT", "0.3")
        _store.cache_clear()
        assert "whether this cache exists already is not known" in dit_cache(*command, str(tmp_path / "c"))


def _as_settings() -> list[str]:
    settings = ("data.limit=6", "build.timesteps=22", "build.samples_per_shard=4", "build.image_size=16",
                "teacher.resolution=32")  # fmt: skip
    return [word for setting in settings for word in ("--set", setting)]
