import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trainer.config import load_config
from trainer.data.batches import select_split
from trainer.errors import TrainError
from trainer.evaluation.evaluate import average_timesteps, evaluate_run, format_scores, load_gim, open_test_split
from trainer.evaluation.metrics import retrieval_scores
from trainer.reports.gallery import make_gallery
from trainer.reports.report import FinishedRun, load_runs, summarise
from trainer.training.logs import read_metrics
from trainer.training.loop import train

CPU = torch.device("cpu")


@pytest.fixture
def run(cache, tiny_config, tmp_path):
    train(tiny_config(updates=2), cache, tmp_path / "run")
    return tmp_path / "run"


def test_the_auxiliary_scores_are_those_of_the_gim_on_the_test_rows_features(run, cache):
    scores, embeddings, test = evaluate_run(run, cache, CPU)
    tokens = cache.read(test.split.rows.tolist(), tap="hidden", timesteps=[10, 22], view=0).decode()
    gim = load_gim(run, cache, load_config(run / "config.json"), 32).eval()
    for name, masked in (("unmasked", False), ("masked", True)):
        expected = gim(embeddings["student"], tokens, masked)
        torch.testing.assert_close(embeddings[name], expected)
        assert scores["auxiliary"][name]["22"] == retrieval_scores(embeddings[name][:, 1], test.labels)


def test_timesteps_are_averaged_as_directions():
    injected = torch.tensor([[[10.0, 0.0], [0.0, 0.1]]])
    torch.testing.assert_close(F.normalize(average_timesteps(injected), dim=-1), torch.full((1, 2), 0.5**0.5))


def test_without_test_features_only_the_student_is_scored(make_cache, tiny_config, tmp_path):
    cache = make_cache(feature_splits=("train",))
    train(tiny_config(updates=1), cache, tmp_path / "run")
    scores = evaluate_run(tmp_path / "run", cache, CPU)[0]
    assert scores["auxiliary"] is None
    assert len(format_scores(scores).splitlines()) == 2


def test_a_run_of_other_features_is_not_scored_with_them(run, make_cache):
    with pytest.raises(TrainError, match="does not fit tap hidden of this cache"):
        evaluate_run(run, make_cache(tokens=9), CPU)


def test_a_split_that_is_not_there_is_named(cache):
    with pytest.raises(TrainError, match="no rows of split 'validation'"):
        open_test_split(cache, 24, split="validation")


def test_several_seeds_of_a_mode_are_summarised_by_mean_and_spread(run, cache):
    one = load_runs([run], cache, CPU)[0]

    def with_recall(value: float) -> FinishedRun:
        student = {**one.scores["student"], "recall_at_1": value}
        return FinishedRun(run, "run", one.config, one.result, {**one.scores, "student": student})

    summary = summarise([with_recall(0.4), with_recall(0.6)], "id", 1.0)
    assert summary["distill"]["recall_at_1"] == pytest.approx(0.5)
    assert summary["distill"]["standard_deviation"]["recall_at_1"] == pytest.approx(0.02**0.5)
    assert "baseline" not in summary


def test_a_report_refuses_runs_of_different_caches(run, make_cache):
    with pytest.raises(TrainError, match=r"was trained on cache \w{8}, not on tiny-"):
        load_runs([run], make_cache(per_class=6), CPU)


def test_the_gallery_shows_successes_and_failures_with_their_hits():
    # A pair that lie together, a pair with ten strangers between them.
    labels = torch.tensor([0, 0, 1, 1, *range(2, 12)])
    spread = torch.tensor([0.0, 5.0, 80.0, 270.0, *range(150, 200, 5)]).deg2rad()
    embeddings = torch.stack([spread.cos(), spread.sin()], dim=1)
    most, least = make_gallery({"one": embeddings}, np.arange(10, 24), labels, each=1)
    assert (most.title, least.title) == ("Best queries", "Worst queries")
    assert most.examples[0].row == 10
    assert [(hit.row, hit.correct) for hit in most.examples[0].found["one"][:2]] == [(11, True), (12, False)]
    assert least.examples[0].row == 12
    assert not any(hit.correct for hit in least.examples[0].found["one"])


def test_the_gallery_compares_the_last_run_with_the_first():
    labels = torch.arange(4).repeat_interleave(5)  # 20 images, so that the eight nearest leave some out
    good = F.one_hot(labels, 4).float()
    bad = good.clone()
    bad[0], bad[5] = good[5], good[0]
    groups = {group.title: group for group in make_gallery({"bad": bad, "good": good}, np.arange(20), labels, each=1)}
    gain = groups["Where good finds most that bad does not"].examples[0]
    assert gain.row in (0, 5)
    assert sum(hit.correct for hit in gain.found["good"]) > sum(hit.correct for hit in gain.found["bad"])
    assert "Where all runs miss most" in groups


def test_a_log_cut_short_by_a_crash_is_read_up_to_there(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"update": 1}\n{"update": 2}\n{"upd')
    assert [record["update"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_rows_without_features_are_kept_out_only_where_features_are_needed(make_cache):
    cache = make_cache(feature_splits=("train",))
    assert len(select_split(cache, "test", need_features=False).rows) == 10
    assert len(select_split(cache, "test", need_features=True).rows) == 0
