"""What an encoding is calibrated on goes through the teacher once, and leaves no trace of who calibrated."""

from dataclasses import replace

import pytest
from build_process import contents

from cache_schema import open_cache
from cache_schema.writing.writer import CacheWriter
from pipeline.build import calibration
from pipeline.build.config import BuildConfig
from pipeline.build.run import build

CONFIG = BuildConfig(
    timesteps=(16, 28), views=("canonical", "hflip"), image_size=32, image_format="png", batch=3, samples_per_shard=4,
    encoding="int8",
)  # fmt: skip
ROWS, EACH = 26, len(CONFIG.timesteps) * len(CONFIG.views)


@pytest.fixture(autouse=True)
def some_rows_calibrate(monkeypatch):
    """Eight of the 26 rows, so that shards have some of these and some others."""
    monkeypatch.setattr(calibration, "_IMAGES", 8)


@pytest.fixture
def forwarded(teacher, monkeypatch):
    """How many noisy images went through the teacher, call by call."""
    counts: list[int] = []
    features = teacher.features

    def counting(noisy, *others):
        counts.append(len(noisy))
        return features(noisy, *others)

    monkeypatch.setattr(teacher, "features", counting)
    return counts


@pytest.fixture
def whole(teacher, tiny_dataset, tmp_path):
    build(teacher, tiny_dataset, CONFIG, tmp_path / "whole", log=str)
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("encoding", ["int8", "float32"])
def test_every_image_goes_through_the_teacher_once(encoding, forwarded, teacher, tiny_dataset, tmp_path):
    build(teacher, tiny_dataset, replace(CONFIG, encoding=encoding), tmp_path / "cache", log=str)
    assert sum(forwarded) == ROWS * EACH


def test_what_would_fill_the_memory_is_computed_again(forwarded, teacher, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "_KEPT_BYTES", 1000)
    build(teacher, tiny_dataset, CONFIG, tmp_path / "cache", log=str)
    assert sum(forwarded) == (ROWS + 8) * EACH
    assert len(open_cache(tmp_path / "cache")) == ROWS


def test_a_build_that_goes_on_after_calibrating_writes_the_same_bytes(
    whole, teacher, tiny_dataset, tmp_path, monkeypatch
):
    write, written = CacheWriter.write_shard, []

    def write_three(self, number, *others):
        if len(written) == 3:
            raise RuntimeError("the power went")
        written.append(number)
        return write(self, number, *others)

    monkeypatch.setattr(CacheWriter, "write_shard", write_three)
    with pytest.raises(RuntimeError, match="the power went"):
        build(teacher, tiny_dataset, CONFIG, tmp_path / "cut", log=str)
    monkeypatch.setattr(CacheWriter, "write_shard", write)
    build(teacher, tiny_dataset, CONFIG, tmp_path / "cut", log=str)
    assert contents(tmp_path / "cut") == whole


def test_a_repaired_shard_is_the_one_that_was_there(whole, teacher, tiny_dataset, tmp_path):
    cache = tmp_path / "whole"
    shard = sorted((cache / "features/hidden/c").rglob("*"))[-1]
    shard.write_bytes(shard.read_bytes()[:-9])
    build(teacher, tiny_dataset, CONFIG, cache, repair=True, log=str)
    assert contents(cache) == whole
