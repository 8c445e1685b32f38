"""Workers that are handed runs of shards make the cache that one build makes, whatever becomes of one of them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from build_process import BuildProcesses, contents
from typer.testing import CliRunner

from cache_schema.writing.creation import continue_cache
from pipeline.build.config import BuildConfig
from pipeline.build.engines.ray_engine import Cluster as RayCluster
from pipeline.build.engines.ray_engine import Driver, RayError, Work, Worker, started
from pipeline.build.run import build, scan_for
from pipeline.cli import app
from pipeline.inputs.tolerance import Tolerance
from pipeline.teachers.flux import FluxTeacher

OPTIONS = ("--limit", "6", "--features", "train,unlabeled", "--samples-per-shard", "2", "--image-size", "16",
           "--resolution", "32")  # fmt: skip
CONFIG = BuildConfig(samples_per_shard=4, image_size=16, timesteps=(22,), with_images=False)


@pytest.fixture
def work(flux_folder, tiny_dataset, tmp_path) -> Work:
    return Work(
        open_teacher=partial(FluxTeacher, flux_folder, resolution=32),
        open_dataset=lambda: tiny_dataset,
        config=CONFIG,
        output=tmp_path / "cache",
        conditions=tmp_path / "conditions",
        tolerance=Tolerance(),
        scanned=scan_for(tiny_dataset, CONFIG, Tolerance(), log=str),
    )


def test_two_workers_that_are_given_runs_in_any_order_write_what_one_build_writes(
    work, teacher, tiny_dataset, tmp_path
):
    build(teacher, tiny_dataset, CONFIG, tmp_path / "whole", conditions=work.conditions, log=str)
    workers = [Worker(work), Worker(work)]
    assert [worker.build([]) for worker in workers] == [None, None]
    count = continue_cache(work.output).manifest.store.feature_shards
    assert count >= 5
    runs = [[4, 1], list(range(5, count)), [2], [0, 3]]
    assert [workers[i % 2].build(run) for i, run in enumerate(runs)] == [None] * 4
    # A run that another worker has committed meanwhile costs nothing and changes nothing.
    assert workers[0].build([0, 1, 2]) is None
    continue_cache(work.output).seal()
    assert contents(work.output) == contents(tmp_path / "whole")


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
