"""Rows ② and ③ of the paper: the teacher's features are read at test time too, and whatever uses the run says so."""

import json

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from cache_schema import open_cache
from trainer.cli import app
from trainer.errors import TrainError
from trainer.evaluation.evaluate import average_timesteps, evaluate_run, scored_embedding
from trainer.evaluation.tables import format_scores, headline
from trainer.export.export import export_run
from trainer.methods.settings import make_config
from trainer.methods.trained import load_trained
from trainer.retrieval.model import open_model
from trainer.training.loop import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache_path, tiny_settings):
    folder = tmp_path_factory.mktemp("auxiliary") / "run"
    settings = [text for text in tiny_settings if text != "--set"]
    cache = open_cache(cache_path)
    train(make_config("paper", [*settings, "epochs=6"], cache=str(cache_path), mode="auxiliary"), cache, folder)
    return folder


def test_a_run_is_scored_by_what_its_gim_makes_of_the_test_images_features(run, cache):
    scores, embeddings, test = evaluate_run(run, cache, CPU, load_trained)
    assert headline(scores) is scores["auxiliary"]["unmasked"]["mean"]
    assert "scored by E_D, the teacher's features read at test time" in format_scores(scores)
    method = load_trained(run, load_trained_student(run), cache).eval()
    rows = test.split.rows.tolist()
    features = cache.read(rows, tap="hidden", timesteps=[10, 22], view="canonical").decode()
    with torch.no_grad():
        expected = average_timesteps(method.gim(embeddings["student"], features))
    torch.testing.assert_close(scored_embedding(scores, embeddings), expected)
    assert not torch.allclose(expected, F.normalize(embeddings["student"], dim=-1), atol=0.1)


def load_trained_student(run):
    from trainer.models.student import load_student

    return load_student(run)


def test_drc_on_the_injected_embedding_alone_trains_student_and_gim(run, cache, tiny_config):
    from trainer.data.batches import TrainingBatches

    method = load_trained(run, load_trained_student(run), cache).train()
    batch = TrainingBatches(cache, method.config, 24, method.needed)[0].to(CPU)
    losses = method(batch)
    losses["loss"].backward()
    assert losses["loss"] is losses["drc"]
    assert all(any(p.grad is not None and p.grad.any() for p in m.parameters()) for m in (method.student, method.gim))


def test_eval_scores_and_intervals_are_those_of_the_teacher_read_along(run, cache_path):
    found = CliRunner().invoke(app, ["eval", str(run), "--cache", str(cache_path), "--json"], catch_exceptions=False)
    scores = json.loads(found.output)
    assert scores["scored"] == "unmasked"
    recall = scores["intervals"]["recall_at_1"]["over_queries"]["value"]
    assert recall == pytest.approx(scores["auxiliary"]["unmasked"]["mean"]["recall_at_1"])


def test_a_report_says_which_run_reads_the_teacher(run, students, cache_path, tmp_path):
    arguments = ["report", run, students["first"], "--output", tmp_path, "--cache", cache_path]
    found = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert "run, with the teacher at test time" in found.output
    assert "its student alone" in found.output
    assert "run, with the teacher at test time" in (tmp_path / "report.html").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["auxiliary"]["recall_at_1"] == summary["auxiliary"]["auxiliary"]["unmasked"]["recall_at_1"]


def test_what_has_no_teacher_refuses_such_a_run(run, cache, tmp_path):
    for use in (lambda: export_run(run, tmp_path / "out", cache, onnx=False), lambda: open_model(run, "cpu")):
        with pytest.raises(TrainError, match="scored with the teacher's features of each image"):
            use()


def test_without_features_of_test_images_there_is_no_score(run, make_cache):
    bare = make_cache(feature_splits=("train", "unlabeled"))
    with pytest.raises(TrainError, match="build it with --features train,test"):
        evaluate_run(run, bare, CPU, load_trained)


def test_the_same_seed_starts_from_the_student_proxies_and_gim_of_distillation(cache, tiny_config):
    from trainer.training.assembly import assemble

    ours, other = (assemble(tiny_config("gim.queries=3", "gim.bridge_layers=1", mode=mode), cache).method
                   for mode in ("auxiliary", "distill"))  # fmt: skip
    others = dict(other.named_parameters())
    assert all(torch.equal(value, others[name]) for name, value in ours.named_parameters())
    assert F.cosine_similarity(ours.drc.proxies, other.drc.proxies).min() > 0.999
