"""Whether a teacher is followed: `follow=auto` looks at what it is worth before the first update."""

import json
import re

import pytest

from cache_schema import open_cache
from trainer.errors import TrainError
from trainer.methods.settings import load_config, make_config, without_teacher
from trainer.methods.trained import load_trained
from trainer.models.student import load_student
from trainer.reports.ablation_plan import VARIANTS, make_cells
from trainer.runs import load_result, read_metrics
from trainer.training.assembly import assemble
from trainer.training.checkpoint import latest_checkpoint, read_progress
from trainer.training.loop import train

METHODS = ("gcd", "regression", "relational")
WORTHLESS = ("shuffle_features=true", "follow=auto", "optim.grad_clip=1", "augment.color=0.3")


@pytest.fixture(scope="session")
def place(tmp_path_factory, build_tiny):
    """A cache of as many images as it takes to be sure that features of other images tell less than colours."""
    path = tmp_path_factory.mktemp("large") / "cache"
    build_tiny(
        path, per_class=12, classes={"train": (0, 1, 2, 3, 4), "test": (10, 11)}, feature_splits=("train", "test")
    )
    return path


@pytest.fixture
def large(place):
    return open_cache(place)


@pytest.fixture
def config_of(place, tiny_config):
    """`config_of("gcd", "follow=auto")`: of a run on that cache."""

    def make(method, *settings):
        return tiny_config(*settings, method=method).model_copy(update={"cache": str(place)})

    return make


def weights(run):
    return (run / "student.safetensors").read_bytes()


@pytest.fixture
def trained(large, config_of, tmp_path):
    def make(method, *settings, name=None):
        run = tmp_path / (name or method)
        train(config_of(method, *settings), large, run)
        return run

    return make


@pytest.mark.parametrize("method", METHODS)
def test_a_student_that_is_ahead_of_its_teacher_is_that_of_the_baseline_bit_for_bit(trained, method, capsys):
    baseline = trained("baseline", *WORTHLESS[2:])
    run = trained(method, *WORTHLESS)
    assert weights(run) == weights(baseline)
    said = capsys.readouterr().err
    assert "it would hold the student back and is not followed" in said
    assert "--follow always" in said
    result = load_result(run)
    assert (result["method"], result["worth"]["followed"], result["feature_bytes"]) == ("baseline", False, 0)
    assert result["mode"] == ("distill" if method == "gcd" else method)
    assert load_config(run / "config.json").method == method  # what was asked for
    assert set(read_metrics(run / "metrics.jsonl")[-1]["losses"]) == {"loss", "drc_student"}


@pytest.mark.parametrize("method", METHODS)
def test_a_teacher_that_is_ahead_is_followed_as_if_nobody_had_asked(trained, method):
    always = trained(method, "follow=always", name="always")
    auto = trained(method, "follow=auto", name="auto")
    assert weights(auto) == weights(always)
    result = load_result(auto)
    assert result["method"] == method
    assert result["worth"]["followed"] is True
    assert "worth" not in load_result(always)


def test_a_worthless_teacher_is_followed_where_that_is_asked_for(trained):
    run = trained("gcd", "shuffle_features=true")
    assert load_result(run)["method"] == "gcd"
    assert (run / "gim.safetensors").is_file()


def test_a_run_without_its_teacher_is_scored_reported_and_exported_as_one_of_the_student_alone(trained, here, tmp_path):
    run, baseline = trained("gcd", *WORTHLESS), trained("baseline")
    code, out, err = here("eval", run)
    assert code == 0
    assert "E_D" not in out
    assert re.search(r"note: its teacher was not followed, .* R@1 of training images is [\d.]+ % by the teacher", err)
    assert load_trained(run, load_student(run), open_cache(load_config(run / "config.json").cache)).files == ()
    assert here("report", baseline, run, "--output", tmp_path / "report")[0] == 0
    assert "The teacher of gcd was not followed" in (tmp_path / "report/report.html").read_text()
    assert set(json.loads((tmp_path / "report/summary.json").read_text())) >= {"baseline", "distill"}
    assert here("export", run, "--output", tmp_path / "exported", "--no-onnx")[0] == 0
    assert "teacher: none, the features of the cache were not read" in (tmp_path / "exported/README.md").read_text()


def test_an_interrupted_run_goes_on_without_its_teacher_and_does_not_look_again(
    trained, large, config_of, cut, tmp_path, monkeypatch, here
):
    whole = trained("gcd", *WORTHLESS)
    config = config_of("gcd", *WORTHLESS)
    stopped = tmp_path / "stopped"
    cut(config, large, stopped, 7)
    checkpoint = latest_checkpoint(stopped)
    assert read_progress(checkpoint).worth.as_json() == load_result(whole)["worth"]
    code, out, _ = here("eval", stopped, "--checkpoint", "last")
    assert code == 0
    assert "E_D" not in out
    monkeypatch.setattr("trainer.training.assembly.measure_worth", None)  # it would be called
    train(config, large, stopped, resume=True)
    assert weights(stopped) == weights(whole)
    assert load_result(stopped)["worth"] == load_result(whole)["worth"]


def test_a_damaged_checkpoint_is_refused_before_a_teacher_is_looked_at(large, config_of, cut, tmp_path):
    config = config_of("gcd", *WORTHLESS)
    cut(config, large, tmp_path / "run", 3)
    (latest_checkpoint(tmp_path / "run") / "progress.json").write_text("{")
    with pytest.raises(TrainError, match=r"cannot resume from .* start anew with --overwrite"):
        train(config, large, tmp_path / "run", resume=True)


def test_a_teacher_that_cannot_be_looked_at_is_followed_and_that_is_said(tiny_config, make_cache, capsys):
    cache = make_cache(views=("hflip",), per_class=12)
    parts = assemble(tiny_config(*WORTHLESS, "augment.flip=true", method="gcd"), cache)
    assert (parts.config.method, parts.worth) == ("gcd", None)
    assert "note: follow=auto: features in the canonical view are lacking" in capsys.readouterr().out


def test_classes_held_out_are_scored_by_the_student_alone_and_the_best_is_kept(large, config_of, tmp_path):
    held = ("validation_classes=0.4", "eval_every=1", "loss.alpha_gate=validation", "loss.drc_on=both")
    config = config_of("gcd", *WORTHLESS, *held)
    run = tmp_path / "run"
    parts = assemble(config, large)
    assert parts.method.waits_for_scores is None
    train(config, large, run)
    assert load_result(run)["validation"]["auxiliary"] is None
    assert load_config(run / "best/config.json") == without_teacher(config)


def test_only_recommended_looks_before_it_follows():
    for method in METHODS:
        assert make_config("recommended", method=method).follow == "auto"
        assert {make_config(preset, method=method).follow for preset in ("paper", "small", "demo")} == {"always"}


def test_controls_of_an_ablation_follow_what_they_are_about():
    names = ("gcd", "regression", "relational", "shuffled", "crop-pixels", "pixels-by-gim", "caption-words")
    cells = make_cells("cache", [VARIANTS[name] for name in names], 1, "recommended", (), {"pixels": "p", "words": "w"})
    assert [cell.config.follow for cell in cells] == ["auto"] * 3 + ["always"] * 4


def test_an_ablation_says_which_runs_did_not_follow_their_teacher(place, tiny_settings, here, tmp_path):
    settings = [text for text in tiny_settings if text != "--set"]
    options = [text for setting in (*settings, "follow=auto", "shuffle_features=true") for text in ("--set", setting)]
    code, out, _ = here(
        "ablate", "--cache", place, "--output", tmp_path / "ablation", "--preset", "small", "--seeds", 1,
        "--variants", "baseline,gcd,shuffled", *options,
    )  # fmt: skip
    assert code == 0
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    said = {line.split(" | ")[0].removeprefix("| "): line for line in rows}
    assert "the teacher not followed in 1 of 1, as not worth it" in said["gcd"]
    assert "+0.0 [0.0, 0.0]" in said["gcd"]
    assert "not followed" not in said["shuffled"]
