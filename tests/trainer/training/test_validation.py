"""Recall is followed on classes that a run holds out of its training split, never on test classes."""

import json

import pytest
import torch
from typer.testing import CliRunner

from trainer.cli import app
from trainer.errors import TrainError
from trainer.evaluation.embed import feature_sources
from trainer.evaluation.evaluate import evaluate_run
from trainer.runs import load_result, read_metrics
from trainer.training.assembly import assemble
from trainer.training.loop import train
from trainer.training.rival import open_rival
from trainer.training.summary import summary

HELD = "validation_classes=0.4"


def test_held_out_images_are_never_trained_on(tiny_config, wide_cache):
    parts = assemble(tiny_config(HELD), wide_cache)
    held = set(parts.batches.validation.rows.tolist())
    assert held
    for update in range(2 * parts.batches.per_epoch):
        assert not held & set(parts.batches.labelled.batch(update).tolist())
    assert (
        parts.batches.classes + parts.batches.validation.classes == assemble(tiny_config(), wide_cache).batches.classes
    )


def test_held_out_images_are_scored_with_what_the_run_has_open_and_in_the_memory_that_it_leaves(
    tiny_config, wide_cache, make_cache
):
    same = make_cache(classes={"train": (0, 1, 2, 3, 4), "test": (10, 11), "unlabeled": (20,)})
    parts = assemble(tiny_config(HELD, f"features={same.root}", "image_memory_gb=0.00003"), wide_cache)
    found = feature_sources(parts.result, parts.validation)
    assert {name: id(source) for name, source in found.items()} == {
        name: id(parts.batches.sources[name]) for name in found
    }
    trained, held = parts.batches.images, parts.validation.images
    assert trained.kept > 0
    assert held.kept > 0
    assert trained.kept_bytes + held.kept_bytes <= 30_000


def test_a_run_says_how_it_does_on_the_classes_it_held_out(tiny_config, wide_cache, tmp_path):
    config = tiny_config(HELD, "eval_every=1")
    train(config, wide_cache, tmp_path / "run")
    result = load_result(tmp_path / "run")
    assert result["validation_classes"] == 2
    beside = result["validation"]["auxiliary"]["masked"]["mean"]["recall_at_1"]
    assert f"; {100 * beside:.1f} % by E_D, E_R masked" in summary(result, "tiny")
    last = [record["eval"] for record in read_metrics(tmp_path / "run/metrics.jsonl") if "eval" in record]
    assert last
    done = CliRunner().invoke(
        app, ["eval", str(tmp_path / "run"), "--cache", str(wide_cache.root), "--split", "validation"]
    )
    assert done.exit_code == 0, done.output
    assert "2 classes held out of the training split" in done.output
    scores = json.loads((tmp_path / "run/eval-validation.json").read_text())
    assert (scores["split"], scores["student"]) == ("validation", result["validation"]["student"])
    assert not (tmp_path / "run/eval.json").exists()


def test_a_run_is_not_scored_on_classes_that_another_cache_would_hold_out(cache, build_tiny, tiny_config, tmp_path):
    run = tmp_path / "run"
    grow = {"path": tmp_path / "cache", "classes": {"train": range(5), "test": (10, 11)}, "seal": False}
    train(tiny_config(HELD, "updates=1", mode="baseline"), build_tiny(**grow, shards=2), run)
    with pytest.raises(TrainError, match=r"held classes out of cache \w{8}, and of tiny-"):
        evaluate_run(run, cache, torch.device("cpu"), split="validation")
    with pytest.raises(TrainError, match=r"trained on 2 classes and held out 2, and tiny-\w+ has features of 5 now"):
        evaluate_run(run, build_tiny(**grow), torch.device("cpu"), split="validation")


def test_a_run_is_held_beside_anothers_curve_and_told_once_that_it_is_behind(tiny_config, wide_cache, tmp_path, capsys):
    with pytest.raises(TrainError, match=r"against: .* add --validation-classes 0.2 --eval-every 1"):
        train(tiny_config(HELD, f"against={tmp_path}"), wide_cache, tmp_path / "run")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"validation_classes": 0.4}')
    with pytest.raises(TrainError, match="was not measured on the way"):
        train(tiny_config(HELD, "eval_every=1", f"against={tmp_path / 'base'}"), wide_cache, tmp_path / "run")
    per_epoch = assemble(tiny_config(HELD), wide_cache).batches.per_epoch
    curve = [{"update": n * per_epoch, "eval": {"student": {"recall_at_1": 1.5}}} for n in (1, 2)]
    (tmp_path / "base/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in curve))
    train(tiny_config(HELD, "eval_every=1", "epochs=2", f"against={tmp_path / 'base'}"), wide_cache, tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("updates R@1 on validation classes is") == 2
    assert said.count("warning: after") == 1
    assert f"that of {tmp_path / 'base'} was 150.0" in said
    finished = open_rival(tiny_config(HELD, "eval_every=1", f"against={tmp_path / 'run'}"))
    assert sorted(finished.recalls) == [per_epoch, 2 * per_epoch]
    (tmp_path / "base/config.json").write_text('{"validation_classes": 0.2}')
    with pytest.raises(TrainError, match=r"held out 0.2 of the training classes, not 0.4"):
        assemble(tiny_config(HELD, "eval_every=1", f"against={tmp_path / 'base'}"), wide_cache)


def test_a_run_that_is_never_measured_beside_the_other_is_refused_before_it_begins(tiny_config, wide_cache, tmp_path):
    per_epoch = assemble(tiny_config(HELD), wide_cache).batches.per_epoch
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"validation_classes": 0.4}')
    curve = {"update": 7 * per_epoch + 1, "eval": {"student": {"recall_at_1": 0.5}}}
    (tmp_path / "base/metrics.jsonl").write_text(json.dumps(curve) + "\n")
    asked = (HELD, "eval_every=1", "epochs=2", f"against={tmp_path / 'base'}")
    said = (
        rf"measured after {7 * per_epoch + 1} updates, .* after {per_epoch}, {2 * per_epoch}: give both the same batch"
    )
    with pytest.raises(TrainError, match=said):
        assemble(tiny_config(*asked), wide_cache)
    assemble(tiny_config(*asked, f"updates={7 * per_epoch + 1}"), wide_cache)  # its last measurement is after as many
    result = {"train_classes": 4, "validation_classes": 2, "mode": "baseline", "seed": 0, "cache_id": "", "seconds": 1,
              "student_updates": 1, "images_seen": 1}  # fmt: skip
    (tmp_path / "base/best").mkdir()
    (tmp_path / "base/best/result.json").write_text(json.dumps(result))
    with pytest.raises(TrainError, match=r"trained on 4 classes and held out 2, this run has 3 and 2: give one of the"):
        assemble(tiny_config(*asked, f"updates={7 * per_epoch + 1}"), wide_cache)


def test_following_recall_without_such_classes_is_refused(tiny_config, wide_cache, tmp_path):
    with pytest.raises(TrainError, match="add --validation-classes"):
        train(tiny_config("eval_every=1"), wide_cache, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_such_classes_cannot_be_scored_on_them(tiny_config, wide_cache, tmp_path):
    train(tiny_config(), wide_cache, tmp_path / "run")
    command = ["eval", str(tmp_path / "run"), "--cache", str(wide_cache.root), "--split", "validation"]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, TrainError)
    assert "held no classes out" in str(done.exception)
