"""A run does what is not done, skips what is, and refuses to mix what two configurations made."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from build_process import committed_files, contents
from run_process import RunProcesses
from tiny_annotators import photograph

from cache_schema.format.manifest_file import load_manifest
from cache_schema.storage.local import LocalFolder
from pipeline.chain.records import Record, load_records, save_record


@pytest.fixture(scope="module")
def whole(runs: RunProcesses, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    runs.finish(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A finished run, to be changed."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def state_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file with what changes when it is written again."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        status = path.stat()
        found[str(path.relative_to(folder))] = (status.st_ino, status.st_mtime_ns, path.read_bytes())
    return found


def done(said: list[str]) -> list[str]:
    return [line.split(":")[0] for line in said if ": done already, " in line]


def plan(runs: RunProcesses, folder: Path, *options: str) -> dict:
    return json.loads("".join(runs.finish(folder, "--dry-run", "--json", *options).said))


def steps_of(found: dict) -> dict[str, dict]:
    return {step["step"]: step for step in found["steps"]}


def test_a_run_makes_everything_and_says_with_what(whole):
    manifest = load_manifest(LocalFolder(whole / "cache"))
    assert manifest.sealed
    assert manifest.teacher.lora_digest == json.loads((whole / "lora/refine.json").read_text())["lora_digest"]
    saved = json.loads((whole / "run.json").read_text())
    assert saved["refine"]["steps"] == 4
    assert list(json.loads((whole / "steps.json").read_text())) == ["annotate", "refine", "build", "verify"]


def test_a_finished_run_computes_and_writes_nothing_but_its_configuration(runs, folder):
    before = state_of(folder)
    assert done(runs.finish(folder).said) == ["annotate", "refine", "build", "verify"]
    after = state_of(folder)
    assert after.pop("run.json")[2] == before.pop("run.json")[2]
    assert after == before


def test_what_does_not_change_the_result_may_change(runs, folder):
    free = (
        "annotate.batch=1",
        "refine.validate_every=7",
        "build.batch=1",
        "tolerance.max_bad=0.5",
        "teacher.device=cpu",
    )
    said = runs.finish(folder, *(word for setting in free for word in ("--set", setting))).said
    assert done(said) == ["annotate", "refine", "build", "verify"]
    assert json.loads((folder / "run.json").read_text())["build"]["batch"] == 1


@pytest.mark.parametrize(
    ("setting", "said", "outputs"),
    [
        (
            "annotate.captions=none",
            "annotate.captions was dataset, now it is none",
            "annotations.parquet, lora and cache",
        ),
        (
            "annotate.padding=0.2",
            "annotate.padding was 0.05, now it is 0.2",
            "annotations.parquet, lora and cache",
        ),
        ("refine.lr=0.5", "refine.lr was 0.0001, now it is 0.5", "lora and cache"),
        ("refine.steps=5", "refine.steps was 4, now it is 5", "lora and cache"),
        ("teacher.guidance=1", "teacher.guidance was 3.5, now it is 1.0", "lora and cache"),
        ("build.timesteps=28", "build.timesteps was 22,28, now it is 28", "cache"),
        ("data.superclass=bug", "data.superclass was not set, now it is bug", "annotations.parquet, lora and cache"),
    ],
)
def test_another_configuration_is_one_line_and_touches_nothing(runs, folder, setting, said, outputs):
    before = state_of(folder)
    ended = runs.finish(folder, "--set", setting, expect=1)
    assert ended.said[-1].startswith("error: ")
    assert f"was made with another configuration: {said}" in ended.said[-1]
    assert f"--config {folder / 'run.json'}" in ended.said[-1]
    assert ended.said[-1].endswith(f"remove and make again {outputs} with --overwrite")
    assert state_of(folder) == before


def test_overwriting_makes_again_what_the_change_concerns_and_nothing_else(runs, folder):
    before = state_of(folder)
    said = runs.finish(folder, "--set", "build.pool=2", "--overwrite").said
    assert done(said) == ["annotate", "refine"]
    assert load_manifest(LocalFolder(folder / "cache")).encoding.pool == 2
    after = state_of(folder)
    kept = {name for name in before if name.startswith(("lora/", "conditions/", "annotations"))}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert not list(folder.glob(".*removed*"))


def test_a_saved_configuration_goes_on_whatever_the_presets_are(runs, folder):
    said = runs.finish(folder, "--config", str(folder / "run.json"), bare=True).said
    assert done(said) == ["annotate", "refine", "build", "verify"]


def test_a_probe_can_be_added_later_and_asked_again(runs, folder):
    before = contents(folder / "cache")
    assert done(runs.finish(folder, "--probe").said) == ["annotate", "refine", "build", "verify"]
    scores = json.loads((folder / "probe/probe.json").read_text())["scores"]
    assert {score["timestep"] for score in scores} == {22, 28}
    again = runs.finish(folder, "--probe", "--set", "probe.timesteps=28").said
    assert done(again) == ["annotate", "refine", "build", "verify"]
    assert {s["timestep"] for s in json.loads((folder / "probe/probe.json").read_text())["scores"]} == {28}
    assert "probe" in done(runs.finish(folder, "--probe", "--set", "probe.timesteps=28").said)
    assert contents(folder / "cache") == before


def test_results_of_the_single_commands_are_looked_at_and_kept(runs, folder):
    (folder / "steps.json").unlink()
    before, committed = state_of(folder / "lora"), committed_files(folder / "cache")
    said = runs.finish(folder).said
    assert [line.split(":")[0] for line in said if ": looking at " in line] == ["annotate", "refine", "build"]
    assert (state_of(folder / "lora"), committed_files(folder / "cache")) == (before, committed)
    assert done(runs.finish(folder).said) == ["annotate", "refine", "build", "verify"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("annotate.captions=none", "--captions was dataset, now it is none"),
        ("refine.lr=0.5", "lr was 0.0001, now it is 0.5"),
        ("build.seed=1", "they differ in curriculum.seed"),
    ],
)
def test_results_that_somebody_else_made_otherwise_are_refused_and_never_removed(runs, folder, setting, said):
    (folder / "steps.json").unlink()
    before = {name: state for name, state in state_of(folder).items() if name != "run.json"}
    for _ in range(2):
        ended = runs.finish(folder, "--set", setting, "--overwrite", expect=1)
        assert len([line for line in ended.said if line.startswith("error: ")]) == 1
        assert said in ended.said[-1]
    after = state_of(folder)
    assert {name: after[name] for name in before} == before


def test_a_result_that_is_gone_is_made_again_and_what_came_of_it_is_kept_if_it_is_the_same(runs, folder):
    before = contents(folder / "cache")
    shutil.rmtree(folder / "lora")
    assert done(runs.finish(folder).said) == ["annotate", "build", "verify"]
    assert contents(folder / "cache") == before


def test_a_data_set_that_changed_is_refused(runs, folder, tmp_path):
    pictures = tmp_path / "pictures"
    shutil.copytree(runs.pictures, pictures)
    # Elsewhere, but the same.
    assert len(done(runs.finish(folder, "--data", str(pictures)).said)) == 4
    (pictures / "ant/3.png").write_bytes(photograph(40, 30, 99))
    ended = runs.finish(folder, "--data", str(pictures), expect=1)
    assert "was made with other inputs: the data set (images, classes, boxes or captions) changed" in ended.said[-1]
    assert "--config" not in ended.said[-1]


def test_a_lora_that_is_not_the_one_that_was_written_is_not_used(runs, folder):
    file = folder / "lora/pytorch_lora_weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    shutil.rmtree(folder / "cache")
    ended = runs.finish(folder, expect=1)
    assert f"{folder / 'lora'} is not what refine wrote; remove it" in ended.said[-1]
    assert not (folder / "cache").exists()


def test_repair_builds_again_what_is_damaged(runs, folder):
    shard = folder / "cache/features/hidden/c/3/0/0/0/0"
    before = contents(folder / "cache")
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    said = runs.finish(folder, "--repair").said
    assert done(said) == ["annotate", "refine"]
    assert any("features/hidden/c/3" in line for line in said)
    assert said[-2].endswith("every file is as it was written")
    assert said[-1] == f"the cache is in {folder / 'cache'}; next: dit-train run --cache {folder / 'cache'}"
    assert contents(folder / "cache") == before


def test_a_bound_that_the_cache_does_not_keep_is_said_even_when_it_is_done(runs, folder):
    ended = runs.finish(folder, "--set", "build.min_cosine=0.9999999", expect=1)
    assert "cosine" in ended.said[-1]
    assert "0.9999999" in ended.said[-1]


def test_the_original_teacher_is_cached_without_stage_one(runs, tmp_path):
    runs.finish(tmp_path / "run", "--set", "steps=annotate,build,verify")
    assert load_manifest(LocalFolder(tmp_path / "run/cache")).teacher.lora_digest is None
    assert not (tmp_path / "run/lora").exists()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--set", "build.taps=double.9"], 1, "has no tap 'double.9'"),
        (["--set", "build.pca=999"], 1, "999"),
        (["--probe", "--set", "probe.per_class=9"], 1, "probing needs 2 classes with 9 images each"),
        (["--set", "refine.stps=3"], 1, "did you mean refine.steps?"),
        (["--config", "nowhere.json"], 1, "nowhere.json: there is no such configuration file"),
        (["--teacher", "/nowhere/at/all"], 1, "/nowhere/at/all"),
        (["--train-ratio", "7"], 2, "must lie between 0 and 1"),
        (["--json"], 2, "add --dry-run"),
        (["--images-per-second", "0"], 2, "--images-per-second"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_done(runs, tmp_path, options, code, said):
    ended = runs.finish(tmp_path / "run", *options, expect=code)
    assert said in " ".join(" ".join(ended.said).split())
    assert len([line for line in ended.said if line.startswith("error: ")]) == (code == 1)
    assert not (tmp_path / "run").exists()


def test_damaged_records_are_named(runs, folder):
    (folder / "steps.json").write_text('{"annotate": 3}')
    ended = runs.finish(folder, expect=1)
    assert f"{folder / 'steps.json'}: damaged" in ended.said[-1]


def test_a_plan_says_what_is_to_do_and_writes_nothing(runs, folder, tmp_path):
    said = runs.finish(tmp_path / "new", "--dry-run", "--probe").said
    assert not (tmp_path / "new").exists()
    states = {line.split()[0]: line for line in said if " to do " in line}
    assert list(states) == ["annotate", "refine", "probe", "build", "verify"]
    assert any(line.startswith("disk: ") for line in said)
    assert "hours of build: unknown; give --images-per-second" in said
    before = state_of(folder)
    assert runs.finish(folder, "--dry-run").said[-1] == "everything is done"
    changed = runs.finish(folder, "--dry-run", "--set", "refine.steps=5").said
    assert "refine was made otherwise: refine.steps was 4, now it is 5" in changed
    assert state_of(folder) == before


def test_hours_follow_from_the_speeds_that_are_given(runs, tmp_path):
    found = plan(runs, tmp_path / "new", "--probe", "--images-per-second", "0.5")
    steps = steps_of(found)
    assert steps["build"]["hours"] == pytest.approx(2 * 12 / 0.5 / 3600)  # both views
    # A forward pass takes a second: two timesteps of an image, half an image per second.
    assert steps["probe"]["hours"] == pytest.approx(4 * 2 / 3600)
    assert steps["refine"]["hours"] == pytest.approx(4 * 2 * 3 / 3600)
    assert found["hours"] == pytest.approx(sum(step["hours"] for step in found["steps"]))
    assert found["unknown"] == []
    given = steps_of(plan(runs, tmp_path / "new", "--refine-steps-per-second", "2"))
    assert given["refine"]["hours"] == pytest.approx(4 / 2 / 3600)
    assert given["build"]["hours"] is None
    with_models = ("--set", "annotate.boxes=detector", "--annotate-images-per-second", "3")
    assert steps_of(plan(runs, tmp_path / "new", *with_models))["annotate"]["hours"] == pytest.approx(12 / 3 / 3600)
    assert "annotate" in plan(runs, tmp_path / "new", "--set", "annotate.boxes=detector")["unknown"]


def test_a_plan_loads_no_model_library(tmp_path):
    script = (
        "import sys; sys.argv = ['dit-cache', 'run', '--dry-run', '--limit', '4']\nfrom pipeline.cli import main\n"
        "try: main()\nexcept SystemExit as e: assert not e.code\n"
        "print([n for n in ('diffusers', 'transformers', 'peft') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert not list(tmp_path.iterdir())


def test_records_are_in_the_order_of_the_steps_whichever_ended_last(tmp_path):
    for step in ("verify", "build", "annotate"):
        save_record(tmp_path, step, Record({}, {}))
    assert list(load_records(tmp_path)) == ["annotate", "build", "verify"]
