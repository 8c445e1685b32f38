"""Whatever ends a run, in whichever step, the same command goes on and ends in the very same cache."""

import json
import signal
from pathlib import Path

import pytest
from build_process import Moment, contents
from run_process import RunProcesses

from cache_schema.storage.files import is_aside

STEPS = ["annotate", "refine", "probe", "build", "verify"]


@pytest.fixture(scope="module")
def whole(runs: RunProcesses, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    runs.finish(folder, "--probe")
    return folder


def results(folder: Path) -> dict[str, object]:
    """What a run has made, without what differs between two runs anyway: times, and where it was done."""
    refined = json.loads((folder / "lora/refine.json").read_text())
    return {
        "annotations": (folder / "annotations.parquet").read_bytes(),
        "lora": (refined["lora_digest"], refined["validation"]),
        "probe": json.loads((folder / "probe/probe.json").read_text())["scores"],
        "cache": contents(folder / "cache"),
        "done": list(json.loads((folder / "steps.json").read_text())),
    }


def done(said: list[str]) -> list[str]:
    return [line.split(":")[0] for line in said if ": done already, " in line]


KILLS = [  # when a step is about to change such a path: annotating, encoding, refining, probing, building
    Moment("annotations.parquet.work/boxes-00000004", 1, signal.SIGKILL),
    Moment("conditions/latents", 5, signal.SIGKILL),
    Moment("lora/.checkpoint-00000003", 1, signal.SIGKILL),
    Moment("probe/probe.png", 1, signal.SIGKILL),
    Moment("journal/features-00003", 1, signal.SIGKILL),
]


@pytest.mark.parametrize("hit_command", [False, True], ids=["the step is killed", "the command is killed"])
def test_killed_in_every_step_a_run_ends_as_if_nothing_had_happened(runs, whole, tmp_path, hit_command):
    folder = tmp_path / "run"
    before = 0
    for moment in KILLS:
        ended = runs.start_run(folder, "--probe", moment=moment, hit_command=hit_command).wait()
        assert len(done(ended.said)) >= before  # a step that was done is not done again
        before = len(done(ended.said))
        if hit_command:
            assert ended.code == -signal.SIGKILL
        else:
            assert ended.code == 1
            assert [line for line in ended.said if line.startswith("error: ")] == ended.said[-1:]
            assert "was ended by SIGKILL" in ended.said[-1]
            assert ended.said[-1].endswith("run the same command again: it resumes")
    ended = runs.finish(folder, "--probe")
    assert done(ended.said) == STEPS[:3]
    assert results(folder) == results(whole)


@pytest.mark.parametrize("count", [2, 7])
def test_killed_between_two_steps_a_run_goes_on(runs, whole, tmp_path, count):
    moment = Moment("steps.json", count, signal.SIGKILL)
    ended = runs.start_run(tmp_path / "run", "--probe", moment=moment, in_step=False).wait()
    assert ended.code == -signal.SIGKILL
    runs.finish(tmp_path / "run", "--probe")
    assert results(tmp_path / "run") == results(whole)


@pytest.mark.parametrize(
    ("number", "path"),
    [(signal.SIGINT, "annotations.parquet.work/boxes-00000004"), (signal.SIGTERM, "journal/features-00002")],
)
def test_an_interrupted_command_ends_its_step_and_says_one_line(runs, whole, tmp_path, number, path):
    folder = tmp_path / "run"
    ended = runs.finish(folder, "--probe", expect=1, moment=Moment(path, 1, number), hit_command=True)
    assert [line for line in ended.said if line.startswith(("interrupted", "error"))] == [
        "interrupted: run the same command again; finished work is kept"
    ]
    assert not [path for path in folder.rglob("*") if is_aside(path.name)]
    runs.finish(folder, "--probe")
    assert results(folder) == results(whole)


def test_two_runs_at_once_wait_for_each_other_and_share_the_build(runs, whole, tmp_path):
    folder = tmp_path / "run"
    both = [process.wait() for process in [runs.start_run(folder, "--probe") for _ in range(2)]]
    assert [ended.code for ended in both] == [0, 0], [ended.said for ended in both]
    assert any(f"waiting for the other run in {folder}" in ended.said for ended in both)
    assert results(folder) == results(whole)
