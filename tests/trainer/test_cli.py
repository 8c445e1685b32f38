"""The command as a user meets it, in its own process."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FORBIDDEN = ("pipeline", "diffusers", "peft", "transformers")
# A process in which the heavy job's packages cannot be imported; then the command line as it is.
BLOCKED = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FORBIDDEN}:
            raise AssertionError(f"the trainer imported {{name}}")

sys.meta_path.insert(0, Blocker())
from trainer.cli import main
main()
"""


def dit_train(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", BLOCKED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


@pytest.fixture(scope="module")
def runs(cache_path, tiny_settings, tiny_baseline_settings, tmp_path_factory) -> Path:
    """A baseline and a distilled run of the tiny cache, in one folder."""
    folder = tmp_path_factory.mktemp("runs")
    for mode, settings in (("baseline", tiny_baseline_settings), ("distill", tiny_settings)):
        done = dit_train("run", "--cache", cache_path, "--mode", mode, "--output", folder / mode, *settings)
        assert done.returncode == 0, done.stderr
        assert "student.embed_dim = 32" in done.stdout  # the config is printed in full
        assert "6 updates" in done.stdout
    return folder


def test_the_whole_of_stage_two_runs_where_no_model_library_can_be_imported(runs, tmp_path):
    done = dit_train("eval", runs / "distill", "--save-embeddings", tmp_path / "embeddings.npz")
    assert done.returncode == 0, done.stderr
    assert re.search(r"student \(E_R\)( +\d+\.\d){5}", done.stdout)
    assert "auxiliary (E_D, E_R masked), mean over timesteps" in done.stdout
    scores = json.loads((runs / "distill" / "eval.json").read_text())
    assert (scores["queries"], scores["classes"]) == (10, 2)
    assert set(scores["auxiliary"]["unmasked"]) == set(scores["auxiliary"]["masked"]) == {"mean", "10", "22"}
    with np.load(tmp_path / "embeddings.npz", allow_pickle=False) as arrays:
        assert arrays["student"].shape == (10, 32)
        assert arrays["masked"].shape == (10, 2, 192)  # of the GIM's own width
        assert arrays["ids"][0].startswith("test-")


def test_the_report_is_one_page_and_a_summary_of_both_modes(runs, tmp_path):
    done = dit_train("report", runs / "baseline", runs / "distill", "--output", tmp_path, "--started", 1.0)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seconds"] > 1e9  # since --started
    for mode in ("baseline", "distill"):
        for key in ("recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8", "map_at_r"):
            assert 0 <= summary[mode][key] <= 1
        assert summary[mode]["student_updates"] == 6
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "data:image/svg+xml" in page
    assert "data:image/jpeg" in page


def test_a_student_alone_is_evaluated_by_its_two_files(here, runs, cache_path, tmp_path):
    for name in ("student.safetensors", "student.json"):
        (tmp_path / name).write_bytes((runs / "distill" / name).read_bytes())
    assert "give --cache" in here("eval", tmp_path / "student.safetensors")[2]
    code, output, _ = here("eval", tmp_path / "student.safetensors", "--cache", cache_path, "--json")
    assert code == 0
    assert json.loads(output)["auxiliary"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timesteps", "10,16"], r"cache tiny-\w+ lacks timestep 16 \(has 10, 22\)"),
        (["--tap", "velocity"], r"lacks tap velocity \(has hidden\)"),
        (["--set", "views=crop.0"], r"lacks view crop.0 \(has canonical, hflip\)"),
        (["--set", "gim.depth=1"], r"no such field: gim.depth"),
        (["--mode", "both"], r"mode: .*'baseline' or 'regression' or 'relational' or 'distill'"),
        (["--set", "device=abacus"], r"device 'abacus'"),
        (["--preset", "large"], r"unknown preset 'large'; there are demo, paper"),
    ],
)
def test_a_bad_option_is_answered_in_one_line_and_leaves_the_directory_free(
    here, cache_path, tiny_settings, tmp_path, arguments, message
):
    code, _, errors = here("run", "--cache", cache_path, "--output", tmp_path / "run", *tiny_settings, *arguments)
    assert code == 1
    assert re.fullmatch(rf"error: .*{message}.*\n", errors), errors
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_neither_replaced_nor_repeated_by_accident(here, runs, cache_path, tiny_settings):
    run = runs / "distill"
    code, _, errors = here("run", "--cache", cache_path, "--mode", "distill", "--output", run, *tiny_settings)
    assert code == 1
    assert "holds a finished run" in errors
    code, output, _ = here("run", "--output", run, "--resume")
    assert code == 0
    assert "finished already: 6 updates" in output
    code, _, errors = here("run", "--output", run, "--resume", "--seed", 5, *tiny_settings)
    assert code == 1
    assert "started with another seed" in errors


def test_an_unsealed_cache_is_refused_unless_it_is_asked_for(here, make_cache, tiny_settings, tmp_path):
    command = [
        "run",
        "--cache",
        make_cache(seal=False).root,
        "--output",
        tmp_path / "run",
        "--updates",
        1,
        *tiny_settings,
    ]
    assert here(*command)[0] == 1
    assert not (tmp_path / "run").exists()
    code, _, said = here(*command, "--allow-partial")
    assert code == 0
    assert "is not sealed: 0 of" in said


def test_a_run_without_a_cache_says_where_it_looked_and_how_to_make_one(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, said = here("run", "--output", tmp_path / "run")
    assert code == 1
    assert f"no cache at {tmp_path / 'runs/demo/cache'}" in said
    assert "make one with dit-cache build, or name one with --cache" in said


def test_a_run_goes_beside_its_cache_unless_told_otherwise(here, tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo").mkdir(parents=True)
    (tmp_path / "runs/demo/cache").symlink_to(cache.root)
    printed = json.loads(here("run", "--mode", "baseline", "--print-config")[1])
    assert printed["method"] == "baseline"
    assert printed["cache"] == str(cache.root)


def test_print_config_shows_every_field_as_json_and_starts_nothing(here, tmp_path):
    output = here("run", "--preset", "demo", "--output", tmp_path / "run", "--print-config")[1]
    assert json.loads(output)["student"]["depth"] == 6
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_not_there_is_not_evaluated(here, cache_path, tmp_path):
    for options in ([], ["--cache", cache_path]):
        code, _, errors = here("eval", tmp_path / "nosuch", *options)
        assert (code, errors) == (1, f"error: there is no run at {tmp_path / 'nosuch'}\n")


def test_scores_that_cannot_be_saved_are_printed_and_then_that_is_said(here, runs, tmp_path):
    run = tmp_path / "theirs"
    shutil.copytree(runs / "distill", run, ignore=shutil.ignore_patterns("eval*"))
    (run / "eval.json").mkdir()  # nothing can be written there, whoever asks
    code, output, said = here("eval", run)
    assert code == 0
    assert "student (E_R)" in output
    assert re.fullmatch(rf"note: the scores are not saved in {run} \(.*\)\n", said)


def test_which_students_architecture_applies_is_said(here, tmp_path):
    _, output, said = here("run", "--preset", "small", "--student", "resnet18", "--output", tmp_path, "--print-config")
    assert "student resnet18 as timm has it; preset small is of vit_tiny_patch16_224" in said
    assert json.loads(output)["student"]["img_size"] is None


def test_help_lists_the_commands_without_loading_anything_heavy():
    code = """if True:
        import sys, trainer.cli
        print([name for name in ("torch", "numpy", "pyarrow", "zarr", "pydantic") if name in sys.modules])
    """
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    assert all(word in dit_train("--help").stdout for word in ("run", "eval", "report", "export"))


def test_options_are_those_of_the_configuration_with_its_limits(here, tmp_path):
    assert here("run", "--batch-size", 0, "--output", tmp_path / "run")[0] == 2
    printed = json.loads(here("run", "--epochs", 7, "--timesteps", "22,28", "--print-config")[1])
    assert (printed["epochs"], printed["timesteps"]) == (7, [22, 28])
    code, _, said = here("run", "--method", "baseline", "--alpha", 2, "--print-config")
    assert code == 1
    assert "no such field: loss.alpha" in said


def test_every_command_ends_with_where_its_result_is_and_what_comes_next(here, runs, cache_path, tmp_path):
    run = runs / "baseline"
    said = here("run", "--cache", cache_path, "--output", run, "--resume")[1]
    assert said.splitlines()[-1] == f"the student is in {run}; next: dit-train eval {run}"
    said = here("eval", run)[1]
    assert said.splitlines()[-1] == (
        f"the scores are in {run / 'eval.json'}; next: dit-train report {run} --output {run}"
    )
    said = here("report", run, "--output", tmp_path)[1]
    assert said.splitlines()[-1].endswith("next: open the page in a browser")
    said = here("export", run, "--output", tmp_path / "out", "--no-onnx")[1]
    assert said.splitlines()[-1] == f'next: timm.create_model("local-dir:{tmp_path / "out"}", pretrained=True)'


def test_a_run_whose_cache_is_gone_is_exported_with_a_note_of_what_the_card_lacks(here, runs, tmp_path):
    shutil.copytree(runs / "baseline", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "cache": str(tmp_path / "gone")}))
    code, _, said = here("export", tmp_path / "run", "--output", tmp_path / "out", "--no-onnx")
    assert code == 0
    assert "note: the card says nothing of data and teacher" in said
    assert "--cache names the cache" in said


def test_runs_side_by_side_are_held_against_the_first_image_by_image(here, runs, tmp_path):
    for name in ("baseline", "distill"):
        shutil.copytree(runs / name, tmp_path / name, ignore=shutil.ignore_patterns("eval*"))
    first, second = tmp_path / "baseline", tmp_path / "distill"
    code, said, _ = here("eval", first, second, "--per-class")
    assert code == 0
    assert re.search(
        r"R-Precision( +\d+\.\d)( +\d+\.\d to \d+\.\d){2} +[+-]\d+\.\d +-?\d+\.\d to -?\d+\.\d +\d\.\d{4}", said
    )
    assert re.search(r"class 10 +5( +\d+\.\d){6}", said)
    scores = json.loads((second / "eval.json").read_text())
    assert scores["against"]["run"] == str(first)
    by = scores["against"]["difference"]["recall_at_1"]
    before = json.loads((first / "eval.json").read_text())["student"]["recall_at_1"]
    assert by["value"] == pytest.approx(scores["student"]["recall_at_1"] - before)
    assert by["low"] <= by["value"] <= by["high"]
    assert [line["images"] for line in scores["per_class"]] == [5, 5]
    assert scores["intervals"]["recall_at_1"]["over_classes"]["value"] == scores["student"]["recall_at_1"]


def test_embeddings_of_several_runs_do_not_go_into_one_file(here, runs, tmp_path):
    code, _, errors = here("eval", runs / "baseline", runs / "distill", "--save-embeddings", tmp_path / "e.npz")
    assert (code, errors) == (1, "error: --save-embeddings is for one run; give one\n")


def test_bench_sets_the_student_beside_timms_network_the_gim_and_the_teacher(here, runs, tmp_path):
    quickly = ("--seconds", 0.01, "--warmup", 1, "--batch", 3, "--device", "cpu")
    code, output, _ = here("bench", runs / "distill", *quickly, "--json")
    assert code == 0
    found = json.loads(output)
    for timings in (found["single"], found["batch"]):
        assert list(timings) == ["timm's network alone", "student", "student + GIM"]
        for timing in timings.values():
            assert timing["calls"] >= 5
            assert 0 < timing["p50"] <= timing["p90"] <= timing["p99"]
    for count, timings in ((1, found["single"]), (3, found["batch"])):
        assert all(t["images_per_second"] == pytest.approx(1000 * count / t["p50"]) for t in timings.values())
    assert found["teacher_said"] == "teacher flux: the cache does not say how long its build took"
    here("export", runs / "distill", "--output", tmp_path / "out", "--no-onnx")
    for alone in (tmp_path / "out", runs / "baseline"):
        code, output, _ = here("bench", alone, *quickly)
        assert code == 0
        assert "student + GIM" not in output
        assert re.search(r"\nstudent( +\d+\.\d\d){3} +\d+\.\d\dx +\d+\.\d +\d+\.\d\dx\n", output)


def test_bench_takes_the_teachers_time_from_the_build_of_the_cache(runs, cache, monkeypatch):
    from trainer.reports.bench import INJECTED, PLAIN, Bench, Timing, build_time, format_bench

    made = cache.manifest.provenance.model_copy(update={"seconds": 12.0, "device": "abacus"})
    manifest = cache.manifest.model_copy(update={"provenance": made})
    monkeypatch.setattr(cache, "manifest", manifest)
    milliseconds, said = build_time(cache)
    assert milliseconds == pytest.approx(1000 * 12 / (30 * 2))  # images and views
    assert "200 ms for each image" in said
    assert "on abacus" in said
    timings = {PLAIN: Timing(9, 10.0, 11.0, 12.0, 100.0), INJECTED: Timing(9, 20.0, 21.0, 22.0, 50.0)}
    line = format_bench(Bench(timings, timings, milliseconds, said), 4).splitlines()[-2]
    assert line.split() == ["+", "teacher", "220.0", "22.0x", "4.88", "82.0x"]


def test_a_run_whose_cache_is_gone_is_timed_alone_with_a_note(here, runs, tmp_path):
    shutil.copytree(runs / "distill", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "cache": str(tmp_path / "gone")}))
    code, output, said = here("bench", tmp_path / "run", "--seconds", 0.01, "--batch", 2, "--device", "cpu")
    assert code == 0
    assert "student + GIM" not in output
    assert "note: nothing is said of GIM and teacher (no cache at" in said


def test_a_run_that_reads_the_teacher_at_test_time_is_not_passed_off_as_its_student(here, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "baseline", run)
    config = json.loads((run / "config.json").read_text())
    printed = here("run", "--cache", config["cache"], "--method", "auxiliary", "--print-config")[1]
    (run / "config.json").write_text(printed)
    for command in (
        ("embed", tmp_path, "--model", run, "--output", tmp_path / "e.parquet"),
        ("export", run, "--output", tmp_path / "out", "--no-onnx"),
        ("eval", run, "--data", tmp_path),
    ):
        code, _, errors = here(*command)
        assert code == 1
        assert errors.endswith(
            "reads the teacher's features at test time (method auxiliary): its student alone is not what was trained "
            "and scored; use a run of gcd, regression or baseline\n"
        )
        assert not (tmp_path / "out").exists()
