"""What hangs is ended from outside, named and left out, and everything else comes into the cache."""

import ctypes
import json
import multiprocessing
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hanging_teacher import HUNG, Hanging

from cache_schema import open_cache
from cache_schema.care.describe import describe_text
from cache_schema.care.verify import verify
from pipeline.build.config import BuildConfig
from pipeline.build.run import build, scan_for
from pipeline.inputs.tolerance import Tolerance
from pipeline.watchdog import HangError, WatchedWork, known_hangs, leave_out, notes_of, under_watch, watched

SECONDS = 3.0
CONFIG = BuildConfig(
    timesteps=(16, 28), image_size=16, image_format="png", batch=3, samples_per_shard=4, encoding="float32"
)
LENIENT = Tolerance(max_bad=0.2)
PIPE = "train-000-002"


class WithAPipe:
    """A data set one of whose files is a pipe into which nobody writes, and one of whose captions is too much."""

    def __init__(self, inner, pipe: Path) -> None:
        self._inner, self._pipe = inner, pipe
        self.name, self.protocol, self.superclass = inner.name, inner.protocol, inner.superclass
        self.samples = [replace(s, caption="hang") if s.id == HUNG else s for s in inner.samples]

    def read(self, sample):
        return self._pipe.read_bytes() if sample.id == PIPE else self._inner.read(sample)


def in_process(work) -> int | None:
    """The exit code of a process that does some work."""
    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    process.join()
    return process.exitcode


def test_a_file_and_a_batch_that_hang_are_left_out_and_named_and_the_rest_is_built(
    flux_folder, teacher, tiny_dataset, tmp_path, capfd
):
    os.mkfifo(tmp_path / "pipe")
    data, output = WithAPipe(tiny_dataset, tmp_path / "pipe"), tmp_path / "cache"

    def work(watch: bool = True) -> None:
        torch.set_num_threads(1)
        if watch:
            under_watch(SECONDS, output)
        scanned = scan_for(data, CONFIG, LENIENT, log=str, hung=known_hangs(output, "scan"))
        build(Hanging(flux_folder, resolution=32), data, CONFIG, output, scanned=scanned, tolerance=LENIENT, log=str)

    assert in_process(work) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("left out, as it took longer")]
    assert len(said) == 2
    assert f"reading and decoding it: procedural/{PIPE}" in said[0]
    assert f"procedural/{HUNG}" in said[1]
    assert verify(output) == []
    cache = open_cache(output)
    assert cache.manifest.sealed
    ids = cache.samples["id"].to_pylist()
    batch = json.loads(notes_of(output).read_text())["hung"][1]["ids"]
    assert HUNG in batch
    assert len(batch) <= 3
    assert [ids[row] for row in cache.manifest.failed_rows] == batch
    described = describe_text(output)
    assert re.search(f"{PIPE}:?\\s+reading and decoding it took longer than 3 s", described)
    assert "the teacher's pass over its batch took longer than 3 s" in described
    # The others have the features that they have in a cache of the data set without what hangs.
    clean = WithAPipe(tiny_dataset, tmp_path / "pipe")
    clean.samples = [s for s in tiny_dataset.samples if s.id != PIPE]
    build(teacher, clean, CONFIG, tmp_path / "clean", log=str)
    whole = open_cache(tmp_path / "clean")
    rows = {name: row for row, name in enumerate(whole.samples["id"].to_pylist())}
    for row in cache.feature_rows[:8]:
        expected = whole.read([rows[ids[row]]], tap="hidden").payload
        torch.testing.assert_close(cache.read([row], tap="hidden").payload, expected)
    # A start without a watch knows what to leave out as well.
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert in_process(lambda: work(watch=False)) == 0
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_what_is_needed_is_named_and_ends_the_build(tmp_path, capfd):
    def work() -> None:
        try:
            under_watch(0.2, tmp_path / "cache")
        except HangError as error:
            print(f"error: {error}")
            raise SystemExit(error.exit_code) from None
        with watched("needed", "encoding the caption 'a bird'", [], []):
            ctypes.PyDLL(None).sleep(10**6)

    assert in_process(work) == 1
    assert capfd.readouterr().out == (
        "error: encoding the caption 'a bird' took longer than --batch-timeout 0.2 s, and cannot be left out\n"
    )
    assert not notes_of(tmp_path / "cache").exists()


@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_build_under_watch_ends_as_one_that_is_not(tmp_path, code):
    def work() -> None:
        under_watch(60, tmp_path / "cache")
        raise SystemExit(code)

    assert in_process(work) == code


def test_notes_that_are_none_are_refused_by_name(tmp_path):
    notes_of(tmp_path / "cache").write_text("{")
    with pytest.raises(HangError, match=r"cache\.hung\.json does not say what hung; remove it"):
        known_hangs(tmp_path / "cache", "scan")


def test_slices_that_hang_at_once_all_note_what_they_were_at(tmp_path):
    works = [WatchedWork("teacher", "its pass", [f"s{number}"], ["x"]) for number in range(6)]
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda work: leave_out(tmp_path / "cache", work, 1.0), works))
    assert sorted(known_hangs(tmp_path / "cache", "teacher")) == [f"s{number}" for number in range(6)]
