"""One process of a build does its part of it, until a time: slices make a whole cache, and time that is up is said."""

import os
import shutil
import signal
import subprocess
import time
from datetime import datetime
from pathlib import Path

import pytest
from build_process import BuildProcesses, Moment, contents
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cache_schema.errors import CacheNotFound, CacheUnsealed
from cache_schema.format.manifest_file import load_manifest
from cache_schema.storage.local import LocalFolder
from pipeline.build.part import Deadline, Part, PartError, read_slice, read_time
from pipeline.cli import app

OPTIONS = ("--limit", "6", "--features", "train,unlabeled", "--samples-per-shard", "2", "--image-size", "16",
           "--resolution", "32")  # fmt: skip
SCRIPTS = Path(__file__).parents[3] / "examples/slurm"


@pytest.fixture(scope="module")
def whole(builds: BuildProcesses, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("whole") / "cache"
    builds.run(cache, *OPTIONS)
    return cache


def test_slices_of_which_one_was_killed_make_the_cache_that_one_build_makes(builds, whole, tmp_path):
    cache = tmp_path / "cache"
    killed = builds.start(cache, *OPTIONS, "--shard-slice", "0/3", moment=Moment("features-00003", 1, signal.SIGKILL))
    assert killed.wait().code == -signal.SIGKILL
    others = [builds.start(cache, *OPTIONS, "--shard-slice", f"{i}/3") for i in (1, 2)]
    for i, ended in zip((1, 2), [other.wait() for other in others], strict=True):
        assert ended.code == 0
        assert sorted(ended.written) == [i, i + 3]
    assert not load_manifest(LocalFolder(cache)).sealed
    unsealed = CliRunner().invoke(app, ["seal", str(cache)])
    assert isinstance(unsealed.exception, CacheUnsealed)
    assert "(3)" in str(unsealed.exception)
    last = builds.run(cache, *OPTIONS, "--shard-slice", "0/3")
    assert last.written == (3,)
    assert contents(cache) == contents(whole)
    assert CliRunner().invoke(app, ["seal", str(cache)]).output.startswith(f"sealed {cache}: 12 images with features")


def test_a_cache_that_lacks_its_seal_alone_is_sealed_without_a_teacher(builds, whole, tmp_path):
    cache = tmp_path / "cache"
    builds.start(cache, *OPTIONS, moment=Moment("journal/seal", 1, signal.SIGKILL)).wait()
    assert not load_manifest(LocalFolder(cache)).sealed
    assert CliRunner().invoke(app, ["seal", str(cache)]).exit_code == 0
    assert contents(cache) == contents(whole)
    with pytest.raises(CacheNotFound):
        CliRunner().invoke(app, ["seal", str(tmp_path / "none")], catch_exceptions=False)


def test_a_build_whose_time_is_up_begins_no_shard_and_says_so_with_code_75(builds, whole, tmp_path):
    cache = tmp_path / "cache"
    ended = builds.run(cache, *OPTIONS, "--until", str(int(time.time()) - 5), expect=75)
    assert ended.written == ()
    assert ended.said[-1].startswith("stopped early: ")
    assert "run the same command again" in ended.said[-1]
    # With an hour left it is finished.
    builds.run(cache, *OPTIONS, "--until", str(int(time.time()) + 3600))
    assert contents(cache) == contents(whole)


@given(st.integers(1, 40), st.integers(0, 200))
def test_every_shard_is_in_exactly_one_slice(count, shards):
    parts = [read_slice(f"{i}/{count}").of(range(shards)) for i in range(count)]
    assert sorted(shard for part in parts for shard in part) == list(range(shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["", "3", "3/3", "-1/3", "1/0", "a/b", "1/2/3"])
def test_a_slice_that_is_none_is_refused_in_one_line(text):
    with pytest.raises(PartError, match=r"--shard-slice .*: give i/n with i from 0 to n - 1"):
        read_slice(text)


def test_times_are_read_as_people_and_schedulers_write_them():
    now = datetime(2026, 11, 26, 1, 0).astimezone()
    assert read_time("02:30", now) == now.replace(hour=2, minute=30).timestamp()
    assert read_time("0:59", now) - now.timestamp() == pytest.approx(24 * 3600 - 60, abs=3601)  # summer time may end
    assert read_time("1795656600") == 1795656600
    assert read_time("2026-11-26T02:30") == datetime(2026, 11, 26, 2, 30).timestamp()
    with pytest.raises(PartError, match="--until soon: give a time as 02:30"):
        read_time("soon")


@given(st.integers(1, 500), st.floats(0.01, 100), st.floats(0, 10_000))
def test_a_shard_is_begun_only_where_it_and_one_before_it_can_be_finished(rows, per_row, left):
    deadline = Deadline(end=1000 + left, clock=lambda: 1000.0)
    deadline.note(10, 10 * per_row)
    assert deadline.allows(rows) == (1000.0 + 2 * rows * (10 * per_row / 10) < 1000 + left)


def test_the_first_shard_is_begun_while_there_is_any_time():
    assert Deadline(end=1001, clock=lambda: 1000.0).allows(512)
    assert not Deadline(end=999, clock=lambda: 1000.0).allows(1)
    assert list(Part(deadline=Deadline(999, lambda: 1000.0)).in_time(iter([1, 2]), 4)) == []
    assert list(Part().in_time(iter([1, 2]), 4)) == [1, 2]


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (1, False)])
def test_the_array_job_goes_back_into_the_queue_where_work_is_left(tmp_path, code, requeued):
    said = tmp_path / "said"
    for name, does in (("scontrol", "exit 0"), ("dit-cache", f"exit {code}")):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {said}\n{does}\n')
        program.chmod(0o755)
    assert shutil.which("bash") is not None
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_COUNT": "16", "SLURM_JOB_END_TIME": "1795656600",
    }  # fmt: skip
    script = ["bash", SCRIPTS / "build_cache.sbatch", "--dataset", "demo"]
    ended = subprocess.run(script, env=environment, check=False)
    lines = said.read_text().splitlines()
    assert lines[0] == "dit-cache build --dataset demo --shard-slice 3/16"
    assert lines[1:] == (["scontrol requeue 7"] if requeued else [])
    assert ended.returncode == (0 if requeued else code)
