"""Whatever ends a build, what it committed stays, and running it again ends in the very same cache."""

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from build_process import BuildProcesses, Moment, committed_files, contents

from cache_schema.care.verify import verify
from cache_schema.storage.files import is_aside

# 12 samples with features in 6 shards, and as many student images again as there are test images.
OPTIONS = ("--limit", "6", "--features", "train,unlabeled", "--samples-per-shard", "2", "--image-size", "16",
           "--resolution", "32")  # fmt: skip
SHARDS = 6


@pytest.fixture(scope="module")
def whole(builds: BuildProcesses, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("whole") / "cache"
    assert sorted(builds.run(cache, *OPTIONS).written) == list(range(SHARDS))
    assert verify(cache) == []
    return cache


def committed(cache: Path) -> set[int]:
    return {int(path.stem.removeprefix("features-")) for path in (cache / "journal").glob("features-*.json")}


def resume(builds: BuildProcesses, cache: Path, whole: Path, **limits: object) -> None:
    """Build to the end; nothing that was committed may be computed or written again."""
    there, files = committed(cache), committed_files(cache)
    ended = builds.run(cache, *OPTIONS, **limits)
    assert sorted(ended.written) == sorted(set(range(SHARDS)) - there)
    assert {path: found for path, found in committed_files(cache).items() if path in files} == files
    assert contents(cache) == contents(whole)


@pytest.mark.parametrize("chain", range(5))
def test_killed_at_20_random_moments_a_build_ends_as_if_nothing_had_happened(builds, whole, tmp_path, chain):
    """Four kills on the way of each of five builds, half of them at a change of a file and half at any time."""
    rng, cache = random.Random(chain), tmp_path / "cache"
    for kill in range(4):
        files = committed_files(cache)
        if kill % 2 == chain % 2:
            moment = Moment(str(cache), rng.randint(1, 40), signal.SIGKILL)
            ended = builds.start(cache, *OPTIONS, moment=moment).wait()
        else:
            process = builds.start(cache, *OPTIONS)
            process.process.join(rng.uniform(0.1, 0.6))
            process.process.kill()
            ended = process.wait()
        assert ended.code in (-signal.SIGKILL, 0)
        assert {path: found for path, found in committed_files(cache).items() if path in files} == files
    resume(builds, cache, whole)


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "journal/calibration"),
        (signal.SIGINT, "journal/features-00002"),
        (signal.SIGINT, "README.md"),
        (signal.SIGTERM, "images/00000.tar"),
    ],
)
def test_a_signal_ends_a_build_with_one_line_and_nothing_half_done(builds, whole, tmp_path, number, moment):
    cache = tmp_path / "cache"
    ended = builds.run(cache, *OPTIONS, moment=Moment(moment, 1, number), expect=1)
    assert [line for line in ended.said if not line.startswith(("cache ", "device ", "encoded "))] == [
        "interrupted: run the same command again; finished work is kept"
    ]
    assert not [path for path in cache.rglob("*") if is_aside(path.name)]
    resume(builds, cache, whole)


def assert_one_line(said: list[str], *parts: str) -> None:
    lines = [line for line in said if not line.startswith(("cache ", "device "))]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: cannot write ")
    assert all(part in lines[0] for part in parts)
    assert lines[0].endswith("and run the same command again")


def test_a_file_that_may_grow_no_larger_is_one_line_and_the_build_resumes(builds, whole, tmp_path):
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    ended = builds.run(tmp_path / "cache", *OPTIONS, expect=1, largest_file=largest - 1)
    assert_one_line(ended.said, os.strerror(errno.EFBIG), "raise the file size limit")
    assert not [path for path in (tmp_path / "cache").rglob("*") if is_aside(path.name)]
    resume(builds, tmp_path / "cache", whole)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of its own, and a function that changes its size."""
    place = tmp_path / "disk"
    place.mkdir()

    def resize(kilobytes: int, remount: bool = True) -> None:
        options = f"{'remount,' if remount else ''}size={kilobytes}k"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True, capture_output=True)

    try:
        resize(100, remount=False)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"only root may mount a small disk: {error}")
    yield place, resize
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_line_and_the_build_resumes(builds, whole, small_disk):
    place, resize = small_disk
    for kilobytes in (100, 140):
        resize(kilobytes)
        ended = builds.run(place / "cache", *OPTIONS, expect=1)
        assert_one_line(ended.said, os.strerror(errno.ENOSPC), "free some space")
        assert not [path for path in place.rglob("*") if is_aside(path.name)]
    resize(4000)
    resume(builds, place / "cache", whole)


def test_a_lost_permission_is_one_line_and_the_build_resumes(builds, whole, tmp_path):
    cache = tmp_path / "cache"
    builds.run(cache, *OPTIONS, moment=Moment("journal/features-00002", 1, signal.SIGKILL), expect=-signal.SIGKILL)
    folders = [cache, *(path for path in cache.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    ended = builds.run(cache, *OPTIONS, expect=1, obey_modes=True)
    assert_one_line(ended.said, os.strerror(errno.EACCES), "get write permission there")
    for folder in folders:
        folder.chmod(0o755)
    resume(builds, cache, whole)


def wait_for(condition) -> None:
    """Wait for what another process is about to do; the timeout of the test is the limit."""
    while not condition():
        time.sleep(0.01)


def test_two_builders_at_once_end_well_and_compute_nothing_twice(builds, whole, tmp_path):
    cache = tmp_path / "cache"
    both = [process.wait() for process in [builds.start(cache, *OPTIONS) for _ in range(2)]]
    assert [ended.code for ended in both] == [0, 0], [ended.said for ended in both]
    assert sorted(both[0].written + both[1].written) == list(range(SHARDS))
    assert contents(cache) == contents(whole)


@pytest.mark.parametrize("then", [signal.SIGCONT, signal.SIGKILL])
def test_a_builder_leaves_alone_what_a_living_one_has_and_takes_over_from_a_dead_one(builds, tmp_path, then):
    """The first builder is stopped while it writes shard 1; the second does the rest and waits for what comes."""
    whole, cache, options = tmp_path / "whole", tmp_path / "cache", (*OPTIONS, "--no-images")
    builds.run(whole, *options)
    first = builds.start(cache, *options, moment=Moment("features/hidden/c/1/", 1, signal.SIGSTOP))
    wait_for(lambda: first.stopped)
    second = builds.start(cache, *options)
    # A builder writes one shard, computes the next and reads the images of a third: 4 and 5 are nobody's.
    wait_for(lambda: committed(cache) >= {4, 5})
    assert 1 not in committed(cache)
    os.kill(first.pid, then)
    ended, other = first.wait(), second.wait()
    assert other.code == 0, other.said
    assert any(line.startswith("waiting for the other builder of this cache") for line in other.said)
    if then == signal.SIGCONT:
        assert ended.code == 0
        assert sorted(ended.written + other.written) == list(range(SHARDS))
    else:
        assert ended.code == -signal.SIGKILL
        assert {1, 2, 4, 5} <= set(other.written)
    assert contents(cache) == contents(whole)
    assert verify(cache) == []


def test_repair_builds_again_exactly_what_is_damaged(builds, whole, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(whole, cache)
    for name in ("features/hidden/c/3/0/0/0/0", "images/00000.tar"):
        data = bytearray((cache / name).read_bytes())
        data[700] ^= 1
        (cache / name).write_bytes(data)
    before = {path: found for path, found in committed_files(cache).items() if "/c/3/" not in str(path)}
    ended = builds.run(cache, *OPTIONS, "--resume", "--repair")
    assert ended.written == (3,)
    assert any("features/hidden/c/3/" in line for line in ended.said)
    after = committed_files(cache)
    assert all(after[path] == found for path, found in before.items() if path.suffix != ".tar")
    assert contents(cache) == contents(whole)


def test_repair_with_other_settings_touches_nothing(builds, whole, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(whole, cache)
    (cache / "features/hidden/c/3/0/0/0/0").unlink()
    before = contents(cache)
    ended = builds.run(cache, *OPTIONS, "--repair", "--seed", "1", expect=1)
    assert "curriculum.seed" in ended.said[-1]
    assert contents(cache) == before
