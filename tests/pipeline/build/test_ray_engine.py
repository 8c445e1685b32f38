"""Workers that are handed runs of shards make the cache that one build makes, whatever becomes of one of them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import cache_servers as servers
import pytest
from build_process import BuildProcesses, contents
from hanging_teacher import HUNG, Hanging, with_a_caption_that_hangs
from typer.testing import CliRunner

from cache_schema import CacheStorageError, open_cache
from cache_schema.format.journal import read_record
from cache_schema.sharing.parts import Selection
from cache_schema.sharing.pull import plan_pull, pull
from cache_schema.storage.local import LocalFolder
from cache_schema.writing.creation import continue_cache
from pipeline.build.config import BuildConfig
from pipeline.build.engines.ray_engine import Cluster as RayCluster
from pipeline.build.engines.ray_engine import Driver, RayError, sealed_after, started
from pipeline.build.engines.ray_worker import Bell, Place, Work, Worker
from pipeline.build.part import WHOLE
from pipeline.build.run import build, scan_for
from pipeline.chain.steps import Elsewhere
from pipeline.cli import app
from pipeline.inputs.tolerance import Tolerance
from pipeline.teachers.flux import FluxTeacher

OPTIONS = ("--limit", "6", "--features", "train,unlabeled", "--samples-per-shard", "2", "--image-size", "16",
           "--resolution", "32", "--taps", "hidden")  # fmt: skip
CONFIG = BuildConfig(samples_per_shard=4, image_size=16, timesteps=(22,), with_images=False)


@pytest.fixture(scope="module")
def whole(teacher, tiny_dataset, tmp_path_factory) -> Path:
    """The cache that one build makes; beside it are its conditions."""
    output = tmp_path_factory.mktemp("whole") / "cache"
    build(teacher, tiny_dataset, CONFIG, output, log=str)
    return output


@pytest.fixture
def work(whole, flux_folder, tiny_dataset, tmp_path) -> Work:
    return Work(
        open_teacher=partial(FluxTeacher, flux_folder, resolution=32),
        open_dataset=lambda: tiny_dataset,
        config=CONFIG,
        output=tmp_path / "cache",
        conditions=whole.parent / "conditions",
        tolerance=Tolerance(),
        scanned=scan_for(tiny_dataset, CONFIG, Tolerance(), log=str),
    )


def test_two_workers_that_are_given_runs_in_any_order_write_what_one_build_writes(work, whole):
    workers = [Worker(work), Worker(work)]
    assert [worker.build([]) for worker in workers] == [None, None]
    count = continue_cache(work.output).manifest.store.feature_shards
    assert count >= 5
    runs = [[4, 1], list(range(5, count)), [2], [0, 3]]
    assert [workers[i % 2].build(run) for i, run in enumerate(runs)] == [None] * 4
    # A run that another worker has committed meanwhile costs nothing and changes nothing.
    assert workers[0].build([0, 1, 2]) is None
    continue_cache(work.output).seal()
    assert contents(work.output) == contents(whole)


def test_workers_build_into_a_bucket_what_one_build_makes_here_and_it_is_sealed_by_its_url(
    work, whole, tmp_path, monkeypatch
):
    for name, value in servers.s3_environment().items():
        monkeypatch.setenv(name, value)
    url, spool = "s3://team/by-workers/cache", tmp_path / "spool"
    driver = Elsewhere(url).folder(spool, WHOLE)
    work = replace(work, output=spool, elsewhere=Place(url, driver.token, spool))
    workers = [Worker(work, place) for place in (0, 1)]
    assert [worker.build([]) for worker in workers] == [None, None]
    count = continue_cache(driver).manifest.store.feature_shards
    assert workers[1].build([2, 0]) is None
    unsealed = CliRunner().invoke(app, ["seal", url])
    assert f"cannot seal {url}: {count - 2} feature shards are missing" in str(unsealed.exception)
    # One that takes the place of a worker that died finds what was committed.
    assert Worker(work, 1).build([2, *range(3, count)]) is None
    assert workers[0].build([0, 1]) is None
    assert continue_cache(driver).missing_shards() == []
    assert not [path for path in tmp_path.glob("spool*/features/hidden/c/**/0") if path.is_file()]
    assert CliRunner().invoke(app, ["seal", url]).output.startswith(f"sealed {url}: ")
    pull(plan_pull(url, str(tmp_path / "copy"), Selection(), None))
    assert contents(tmp_path / "copy") == contents(whole)
    assert {path.name for path in tmp_path.glob("spool*")} == {"spool", "spool-worker-0", "spool-worker-1"}


def test_samples_that_a_worker_is_told_of_are_not_shown_to_the_teacher(work):
    hung = [entry.sample.id for entry in work.scanned if entry.ok][2]
    worker = Worker(replace(work, tolerance=Tolerance(max_bad=0.5)))
    assert worker.build([]) is None
    # As when it hung while this worker had been at work for long.
    assert worker.build([0], {hung: "it took too long"}) is None
    failed = read_record(LocalFolder(work.output), "features", 0).failed
    assert [(item.row, item.reason) for item in failed] == [(2, "it took too long")]


def test_the_bell_tells_once_who_takes_longer_than_it_may():
    bell = Bell(seconds=0.0)
    said = {"kind": "teacher", "what": "its pass", "ids": ["a"], "sources": ["a.jpg"]}
    bell.note(3, {"begins": 1, "patience": 1, **said})
    bell.note(3, {"begins": 2, "patience": 1, **said, "ids": ["b"]})
    bell.note(3, {"ends": 1})
    bell.note(4, {"begins": 1, "patience": 1, **said})
    bell.note(4, {"ends": 1})
    assert {worker: [work.ids for work in late] for worker, late in bell.late().items()} == {3: [["b"]]}
    assert bell.late() == {}
    patient = Bell(seconds=1e6)
    patient.note(0, {"begins": 1, "patience": 10, **said})
    assert patient.late() == {}


def test_a_worker_says_in_one_line_what_is_wrong(work, tmp_path):
    (tmp_path / "cache").write_text("not a directory")
    said = Worker(work).build([0])
    assert said is not None
    assert "not a directory" in said
    assert "\n" not in said


def test_a_cluster_that_is_not_there_is_named():
    pytest.importorskip("ray", reason="Ray, of the extra ray, is not installed")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RayError, match=r"^--address nowhere: no Ray cluster can be reached there"):
        started(RayCluster(1, 0, "nowhere"))
    assert signal.getsignal(signal.SIGTERM) is before


def test_where_ray_is_not_installed_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    ended = CliRunner().invoke(app, ["build", "--engine", "ray", "--gpus-per-worker", "0"])
    assert str(ended.exception) == "--engine ray needs Ray: pip install 'dit-distill[ray]'"


@pytest.mark.parametrize(
    "options", [("--workers", "2"), ("--engine", "ray", "--shard-slice", "0/2"), ("--address", "auto")]
)
def test_options_that_the_engine_does_not_take_are_wrong_usage(options, tmp_path):
    assert CliRunner().invoke(app, ["build", "--output", str(tmp_path / "cache"), *options]).exit_code == 2
    assert not (tmp_path / "cache").exists()


class NoGpus:
    """Ray where there are none."""

    exceptions = None

    def cluster_resources(self):
        return {"CPU": 2.0}

    def put(self, value):
        return value

    def remote(self, **options):
        return lambda kind: kind


def test_gpus_that_no_machine_has_are_not_waited_for(work):
    with pytest.raises(RayError, match=r"this machine has 0 GPUs; use --gpus-per-worker 0, or --address"):
        Driver(NoGpus(), work, RayCluster(1, 1), str).run()
    waiting: list[str] = []
    Driver(NoGpus(), work, RayCluster(1, 1, "auto"), waiting.append).look_for_gpus()
    assert waiting == ["Ray has 0 GPUs now; workers begin as machines with more of them join"]


class AtHand(Driver):
    """A driver whose one worker is in its own process, and whose student images have nowhere to lie."""

    def _hire(self, place):
        self._worker = Worker(self._work)
        self._give(self._worker, [])

    def _give(self, worker, run):
        self._running[0] = (worker, run)

    def _finished_one(self):
        worker, run = self._running.pop(0)
        assert worker.build(run) is None
        return worker

    def _write_images(self, writer, claims, stop):
        raise CacheStorageError("no space is left for them")


def test_student_images_that_cannot_be_written_end_the_build_before_the_workers_go_on(work):
    with pytest.raises(CacheStorageError, match="no space is left for them"):
        AtHand(NoGpus(), work, RayCluster(1, 0), str).run()
    assert len(continue_cache(work.output).missing_shards()) > 1


def wait_until(happened, process, seconds=240):
    """Look again and again until something is so; fail where the process ended before."""
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def workers_of(process):
    import psutil

    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that has just ended
            found += [child] if any("ray::Worker" in part for part in child.cmdline()) else []
    return found


@pytest.mark.skipif(not os.environ.get("DIT_DISTILL_RAY"), reason="starts Ray; DIT_DISTILL_RAY=1 runs it")
@pytest.mark.timeout(900)
def test_a_killed_worker_and_a_killed_driver_cost_only_what_was_not_committed(
    builds: BuildProcesses, flux_folder, tmp_path
):
    pytest.importorskip("ray", reason="Ray, of the extra ray, is not installed")
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    builds.run(whole, *OPTIONS)
    command = [
        sys.executable, "-m", "pipeline.cli", "build", "--teacher", str(flux_folder), "--output", str(cache), *OPTIONS,
        "--engine", "ray", "--workers", "2", "--gpus-per-worker", "0", "--device", "cpu",
    ]  # fmt: skip

    def committed() -> list[Path]:
        return sorted((cache / "journal").glob("features-*.json"))

    driver = subprocess.Popen(command, cwd=Path(__file__).parents[3])
    wait_until(committed, driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    kept = {path: path.stat().st_mtime_ns for path in committed()}

    driver = subprocess.Popen(command, cwd=Path(__file__).parents[3])
    os.kill(wait_until(lambda: workers_of(driver), driver)[0].pid, signal.SIGKILL)
    assert driver.wait() == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(cache) == contents(whole)


@pytest.mark.skipif(not os.environ.get("DIT_DISTILL_RAY"), reason="starts Ray; DIT_DISTILL_RAY=1 runs it")
@pytest.mark.timeout(900)
def test_a_worker_that_hangs_is_ended_and_its_batch_left_out_of_a_cache_in_a_bucket(
    work, flux_folder, tiny_dataset, tmp_path, monkeypatch
):
    pytest.importorskip("ray", reason="Ray, of the extra ray, is not installed")
    # Workers are processes of their own, which import what they work with.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(Path(__file__).parents[up]) for up in (1, 3)))
    for name, value in servers.s3_environment().items():
        monkeypatch.setenv(name, value)
    data = with_a_caption_that_hangs(tiny_dataset)
    config, lenient = replace(CONFIG, batch=2, batch_timeout=4.0), Tolerance(max_bad=0.2)
    url, spool, said = "s3://team/hangs-with-ray/cache", tmp_path / "spool", []
    driver = Elsewhere(url).folder(spool, WHOLE)
    work = replace(
        work, open_teacher=partial(Hanging, flux_folder, resolution=32), open_dataset=lambda: data, config=config,
        output=spool, conditions=tmp_path / "conditions", tolerance=lenient,
        scanned=scan_for(data, config, lenient, log=str), elsewhere=Place(url, driver.token, spool),
    )  # fmt: skip
    sealed_after(work, RayCluster(2, 0), said.append, driver)
    assert [line for line in said if line.startswith("left out, as it took longer than --batch-timeout 4 s")]
    cache = open_cache(url)
    ids = cache.samples["id"].to_pylist()
    failed = [ids[row] for row in cache.manifest.failed_rows]
    assert HUNG in failed
    assert len(failed) <= config.batch_images
    assert not any(line.startswith("a worker died") for line in said)
