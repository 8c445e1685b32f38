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
from pipeline.build.part import Deadline, Part, PartError, StoppedEarly, read_slice, read_time
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


@given(st.integers(2, 500), st.integers(1, 499), st.floats(0.01, 100), st.floats(1, 10_000))
def test_a_shard_for_which_no_time_will_ever_do_is_an_error_and_not_a_reason_to_come_back(rows, done, per_row, given_):
    now = [1000.0]
    deadline = Deadline(end=1000 + given_, clock=lambda: now[0])
    deadline.check(rows)
    deadline.note(done, done * per_row)
    now[0] = deadline.end
    endless = done < rows and rows * (done * per_row) / done > deadline.end - 1000
    with pytest.raises(PartError if endless else StoppedEarly, match="give more time" if endless else "run the same"):
        deadline.check(rows)


class Job:
    """A script of examples/slurm, run as SLURM runs it: with programs that note down how they were called."""

    def __init__(self, folder: Path) -> None:
        assert shutil.which("bash") is not None
        self._folder, self.said = folder, folder / "said"

    def program(self, name: str, does: str) -> None:
        program = self._folder / name
        program.write_text(f'#!/bin/bash\necho "{name} $*" >> {self.said}\n{does}\n')
        program.chmod(0o755)

    def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, list[str]]:
        """Its exit code, and what was called."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        path = f"{self._folder}{os.pathsep}{os.environ['PATH']}"
        ended = subprocess.run(
            ["bash", SCRIPTS / script, *arguments], env=clean | {"PATH": path} | environment, check=False
        )
        return ended.returncode, self.said.read_text().splitlines() if self.said.exists() else []


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def array(number: int, numbers: range, job: str = "8", of: str = "7") -> dict[str, str]:
    """What SLURM tells a job of an array."""
    return {
        "SLURM_JOB_ID": job, "SLURM_ARRAY_JOB_ID": of, "SLURM_ARRAY_TASK_ID": str(number),
        "SLURM_ARRAY_TASK_COUNT": str(len(numbers)), "SLURM_ARRAY_TASK_MIN": str(numbers.start),
        "SLURM_ARRAY_TASK_STEP": str(numbers.step), "SLURM_JOB_END_TIME": "1795656600",
    }  # fmt: skip


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (1, False)])
@pytest.mark.parametrize("number", ["8", "7"])  # the last job of an array has the array's own
def test_the_array_job_alone_goes_back_into_the_queue_where_work_is_left(job, code, requeued, number):
    job.program("scontrol", "exit 0")
    job.program("dit-cache", f"exit {code}")
    ended, said = job.run("build_cache.sbatch", "--dataset", "demo", **array(3, range(16), number))
    assert said[0] == "dit-cache build --dataset demo --shard-slice 3/16"
    assert said[1:] == (["scontrol requeue 7_3"] if requeued else [])
    assert ended == (0 if requeued else code)


def test_a_job_that_may_not_go_back_into_the_queue_says_that_it_stopped_early(job):
    job.program("scontrol", "exit 1")
    job.program("dit-cache", "exit 75")
    assert job.run("build_cache.sbatch", **array(3, range(16)))[0] == 75


@pytest.mark.parametrize(
    ("given", "slice_"),
    [
        ({"SLURM_JOB_ID": "7"}, "0/1"),
        (array(16, range(1, 17)), "15/16"),
        (array(8, range(4, 9, 2)), "2/3"),
        (array(3, range(3, 4)), "0/1"),
    ],
)
def test_any_array_without_gaps_makes_slices(job, given, slice_):
    job.program("scontrol", "exit 0")
    job.program("dit-cache", "exit 0")
    assert job.run("build_cache.sbatch", **given)[1][-1] == f"dit-cache build --shard-slice {slice_}"


def test_an_array_with_gaps_is_refused(job):
    job.program("dit-cache", "exit 0")
    gaps = array(7, range(3, 5))  # SLURM says of 3,7: two jobs, from 3 on, in steps of 1
    assert job.run("build_cache.sbatch", **gaps) == (2, [])


@pytest.mark.parametrize(
    ("shown", "early"),
    [
        ("   StartTime=2026-11-26T01:00:00 EndTime=2036-11-26T05:00:00 Deadline=N/A", 60),
        ("StartTime=Unknown EndTime=Unknown Deadline=N/A", None),
        ("", None),
    ],
)
def test_a_job_asks_slurm_for_its_end_and_leaves_a_minute_to_go_back_into_the_queue(job, shown, early):
    job.program("scontrol", f"echo 'JobId=8 ArrayJobId=7 ArrayTaskId=3'; echo '{shown}'")
    job.program("dit-cache", f'echo "until ${{SLURM_JOB_END_TIME:-no end}}" >> {job.said}')
    given = array(3, range(16))
    del given["SLURM_JOB_END_TIME"]
    said = job.run("build_cache.sbatch", **given)[1]
    assert said[0] == "scontrol show job 7_3"
    end = None if early is None else int(datetime(2036, 11, 26, 5).timestamp()) - early
    assert said[-1] == f"until {end or 'no end'}"


@pytest.mark.parametrize("code", [0, 1])
def test_refinement_goes_back_into_the_queue_before_its_end_unless_it_is_done(job, code):
    job.program("scontrol", "exit 0")
    job.program("torchrun", f"trap 'exit {code}' TERM; kill -USR1 $PPID; while true; do sleep 0.01; done")
    ended, said = job.run("refine.sbatch", "--steps", "9", SLURM_JOB_ID="7", SLURM_GPUS_ON_NODE="2")
    assert said[0] == "torchrun --standalone --nproc-per-node 2 -m pipeline.cli refine --steps 9"
    assert said[1:] == (["scontrol requeue 7"] if code else [])
    assert ended == 0


@pytest.mark.parametrize(
    ("does", "code"), [("kill -TERM $PPID", -signal.SIGTERM), ("exit 2", 2), ("exit 0", 0)], ids=["scancel", "2", "0"]
)
def test_a_refinement_that_was_cancelled_or_failed_or_ended_stays_so(job, does, code):
    job.program("torchrun", does)
    assert job.run("refine.sbatch", SLURM_JOB_ID="7")[0] == code
