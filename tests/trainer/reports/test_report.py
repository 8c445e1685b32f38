import pytest
import torch

from trainer.errors import TrainError
from trainer.reports.report import FinishedRun, load_runs, summarise
from trainer.training.loop import train

CPU = torch.device("cpu")


@pytest.fixture
def run(cache, tiny_config, tmp_path):
    train(tiny_config(updates=2), cache, tmp_path / "run")
    return tmp_path / "run"


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
