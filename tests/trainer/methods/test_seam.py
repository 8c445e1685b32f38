"""What a method may do is shown by one that no file of the trainer has ever heard of."""

import json
import sys
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cache_schema import cli as commands
from trainer.cli import app
from trainer.config import TrainConfig
from trainer.data.batches import TrainingBatches
from trainer.data.features import FeatureNeed, Needs
from trainer.errors import TrainError
from trainer.evaluation.evaluate import evaluate_run
from trainer.methods.method import END, Method, ParameterGroup
from trainer.methods.registry import METHODS, Entry, find_method
from trainer.methods.settings import make_config
from trainer.methods.trained import load_trained
from trainer.models.weights import load_weights, save_weights
from trainer.reports.report import load_runs, write_report
from trainer.training.loop import train

CPU = torch.device("cpu")
ROW = 0  # the synthetic features say their row in channel 0


class ToyConfig(TrainConfig):
    """Regression of the pooled features of two caches."""

    method: Literal["toy"] = "toy"
    other: str = ""
    projector_lr_scale: float = 2.0


class Toy(Method):
    """‖W E_R − pooled features‖², over features of the run's own cache and of another."""

    loss_figures = {"Regression": {"own": "own cache", "other": "other cache"}}  # noqa: RUF012
    auxiliary_names = {"projected": "W E_R", "pooled": "pooled features"}  # noqa: RUF012
    files = ("toy.safetensors",)

    def __init__(self, config, student, classes, shapes):
        super().__init__(config, student, classes, shapes)
        self.config = config
        self.projector = nn.ModuleDict({name: nn.Linear(student.dim, s.channels) for name, s in shapes.items()})
        self.register_buffer("mean", torch.zeros(()))

    @classmethod
    def needs(cls, config):
        return Needs({"own": FeatureNeed("hidden", (22,)), "other": FeatureNeed("hidden", cache=config.other)})

    def fit(self, batches):
        self.mean.copy_(torch.stack([batch.features["own"].mean() for batch in batches]).mean())

    def forward(self, batch, moment=END):
        student = self.student(batch.images)
        losses = {
            name: (self.projector[name](student) - (tokens.mean((1, 2)) - self.mean)).square().mean()
            for name, tokens in batch.features.items()
        }
        return {"loss": losses["own"] + losses["other"], **losses}

    def parameter_groups(self):
        return [
            ParameterGroup(list(self.student.parameters())),
            ParameterGroup(list(self.projector.parameters()), self.config.projector_lr_scale, decay=False),
        ]

    def auxiliary(self, student, features):
        return {"projected": self.projector["own"](student), "pooled": features["own"].mean(2)}

    def save(self, run):
        save_weights(self.projector.state_dict(), run / "toy.safetensors")

    def load(self, run):
        self.projector.load_state_dict(load_weights(run / "toy.safetensors"))


@pytest.fixture
def other_cache(make_cache):
    """The same images and more: a sample stands in another row than in the run's own cache."""
    return make_cache(per_class=7, classes={"train": (0, 1, 2, 3, 4), "test": (10, 11), "unlabeled": (20,)})


@pytest.fixture
def toy_config(tiny_config, other_cache, monkeypatch):
    monkeypatch.setitem(METHODS, "toy", Entry(ToyConfig, Toy))

    def make(*settings):
        return tiny_config(f"other={other_cache.root}", *settings, method="toy")

    return make


def weights(run):
    return {file.name: file.read_bytes() for file in sorted(run.glob("*.safetensors"))}


def test_a_method_trains_and_resumes_to_the_very_same_end(toy_config, cache, tmp_path, cut):
    config = toy_config()
    train(config, cache, tmp_path / "whole")
    cut(config, cache, tmp_path / "cut", 3)
    result = train(config, cache, tmp_path / "cut", resume=True)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert sorted(weights(tmp_path / "cut")) == ["student.safetensors", "toy.safetensors"]
    assert (result["method"], set(result["final_losses"])) == ("toy", {"loss", "own", "other"})


def test_a_method_is_evaluated_and_reported_with_what_it_offers(toy_config, wide_cache, tmp_path):
    cache, run = wide_cache, tmp_path / "run"
    train(toy_config("eval_every=1", "validation_classes=0.4"), cache, run)
    scores, embeddings, test = evaluate_run(run, cache, CPU, load_trained)
    assert scores["auxiliary_names"] == Toy.auxiliary_names
    assert set(scores["auxiliary"]["projected"]) == {"mean"}  # (N, C): nothing to average
    assert set(scores["auxiliary"]["pooled"]) == {"mean", "22"}
    projector = load_file(run / "toy.safetensors")
    expected = embeddings["student"] @ projector["own.weight"].T + projector["own.bias"]
    torch.testing.assert_close(embeddings["projected"], expected)
    tokens = cache.read(test.split.rows.tolist(), tap="hidden", timesteps=[22], view=0).decode()
    torch.testing.assert_close(embeddings["pooled"], tokens.mean(2))
    write_report(load_runs([run], cache, CPU), cache, tmp_path, CPU)
    assert "teacher as auxiliary at test time (pooled features)" in (tmp_path / "report.html").read_text()
    assert set(json.loads((tmp_path / "summary.json").read_text())["toy"]["auxiliary"]) == {"projected", "pooled"}


def test_a_methods_settings_are_its_own(toy_config, tiny_config):
    assert toy_config("projector_lr_scale=3").projector_lr_scale == 3
    with pytest.raises(TrainError, match=r"no such field: gim"):
        toy_config("gim.queries=3")
    with pytest.raises(TrainError, match="no such field: projector_lr_scale"):
        tiny_config("projector_lr_scale=3")
    with pytest.raises(
        TrainError, match=r"no method 'tory'; there are baseline, regression, relational, gcd, auxiliary, toy"
    ):
        make_config("paper", method="tory")


def test_the_command_line_runs_a_method_by_its_name(toy_config, cache_path, other_cache, tiny_baseline_settings,
                                                     tmp_path, monkeypatch, capsys):  # fmt: skip
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which the runner replaces

    def here(*arguments):
        with pytest.raises(SystemExit) as caught:
            commands.run(app, [str(argument) for argument in arguments])
        assert not caught.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    common = ["--cache", cache_path, "--output", tmp_path / "run", "--set", f"other={other_cache.root}"]
    here("run", "--method", "toy", *common, *tiny_baseline_settings)
    assert "auxiliary (W E_R) " in here("eval", tmp_path / "run")


def test_samples_of_another_cache_are_found_by_what_they_are_not_by_where_they_stand(toy_config, cache, other_cache):
    config = toy_config()
    batches = TrainingBatches(cache, config, 24, Toy.needs(config))
    own_ids, other_ids = (c.samples["id"].to_pylist() for c in (cache, other_cache))
    moved = 0
    for update in range(batches.per_epoch):
        features = batches[update].to(CPU).features
        own, other = (features[name][:, 0, 0, ROW].long().tolist() for name in ("own", "other"))
        assert [own_ids[row] for row in own] == [other_ids[row] for row in other]
        assert torch.equal(features["own"][:, 0, 0, 1], features["other"][:, 0, 0, 1])  # and in the same view
        moved += own != other
    assert moved


def test_a_sample_that_another_cache_lacks_is_named(toy_config, make_cache, cache):
    smaller = make_cache(per_class=4, name="smaller")
    config = toy_config(f"other={smaller.root}")
    with pytest.raises(TrainError, match=r"lacks features of 3 of the 15 samples of tiny-\w+ .* 'train-0-4'"):
        TrainingBatches(cache, config, 24, find_method("toy").needs(config))


def test_a_sample_that_is_another_image_in_another_cache_is_refused(toy_config, make_cache, cache):
    config = toy_config(f"other={make_cache(name='changed', content='another ').root}")
    with pytest.raises(TrainError, match=r"sample 'train-0-0' is another image in cache tiny-\w+ than in cache tiny-"):
        TrainingBatches(cache, config, 24, Toy.needs(config))
