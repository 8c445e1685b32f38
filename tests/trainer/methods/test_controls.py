"""What distillation is held against: similarities alone, unlabelled images without a teacher, shuffled features."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cache_schema import open_cache
from trainer.data.batches import TrainingBatches
from trainer.data.features import FeatureNeed, Needs, open_sources
from trainer.errors import TrainError
from trainer.methods.baseline.unlabelled import consistency_loss, pseudo_label_loss, strongly_changed
from trainer.methods.registry import find_method
from trainer.methods.settings import make_config
from trainer.models.alignment import relational_loss
from trainer.models.heads import drc_loss
from trainer.models.student import build_student
from trainer.training.loop import train

CPU = torch.device("cpu")


@pytest.fixture
def build(cache, tiny_config):
    def make(*settings, method):
        config = tiny_config(*settings, method=method)
        torch.manual_seed(config.seed)
        kind = find_method(method)
        batches = TrainingBatches(cache, config, 24, kind.needs(config))
        shapes = {name: source.shape for name, source in batches.sources.items()}
        made = kind(config, build_student(config.student), batches.classes, shapes)
        made.fit(batches.fitting(2))
        return made.train(), batches[0].to(CPU)

    return make


def test_relational_distillation_adds_the_similarities_of_pooled_features_to_drc(build):
    method, batch = build("unlabeled_per_batch=2", "loss.weight=3", "loss.drc_weight=0.5", method="relational")
    losses, student = method(batch), method.student(batch.images)
    drc = drc_loss(student, batch.labels, method.drc.proxies, 0.05)
    relational = relational_loss(student, method.pooled(batch.features["teacher"]), 0.1)
    torch.testing.assert_close(losses["loss"], 0.5 * drc + 3 * relational)
    assert relational > 0
    assert len(student) == 8  # the unlabelled rows are compared too


def test_confident_pseudo_labels_alone_count():
    proxies = torch.eye(3, 4)
    weak = torch.tensor([[5.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.9, 0.0]])
    strong = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = pseudo_label_loss(weak, strong, proxies, tau=0.1, threshold=0.9)
    expected = F.cross_entropy(F.normalize(strong[:1], dim=-1) @ proxies.T / 0.1, torch.tensor([0])) / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert strong.grad[0].any()
    assert not strong.grad[1].any()


def test_consistency_moves_the_changed_image_alone():
    weak, strong = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    assert consistency_loss(weak, 2 * weak).item() == pytest.approx(0, abs=1e-6)
    weak = weak.detach().requires_grad_()
    consistency_loss(weak, strong).backward()
    assert weak.grad is None


def test_images_are_changed_as_the_update_draws():
    images = torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8)
    torch.manual_seed(1)
    first = strongly_changed(images)
    torch.manual_seed(1)
    assert torch.equal(strongly_changed(images), first)
    assert first.shape == images.shape
    assert all(not torch.equal(a, b) for a, b in zip(first, images, strict=True))


@pytest.mark.parametrize("by", ["pseudo", "consistency"])
def test_a_baseline_learns_from_unlabelled_images_without_features(build, by):
    plain, small = build(method="baseline")
    settings = ("unlabelled.per_batch=3", f"unlabelled.by={by}", "unlabelled.threshold=0", "unlabelled.weight=2")
    method, batch = build(*settings, method="baseline")
    assert batch.features == {}
    losses = method(batch)
    torch.testing.assert_close(losses["drc_student"], plain(small)["loss"])
    torch.testing.assert_close(losses["loss"], losses["drc_student"] + 2 * losses["unlabelled"])
    losses["unlabelled"].backward()
    assert any(p.grad is not None and p.grad.any() for p in method.student.parameters())


@pytest.mark.parametrize("method", ["gcd", "regression", "relational"])
def test_shuffled_features_are_another_images_of_the_same_split(cache, tiny_config, method):
    config = tiny_config("shuffle_features=true", "unlabeled_per_batch=2", method=method)
    batches = TrainingBatches(cache, config, 24, find_method(method).needs(config))
    splits = cache.samples["split"].to_pylist()
    pairs = []
    for update in range(batches.per_epoch):
        given = batches[update].to(CPU).features["teacher"][:, 0, 0, 0].long().tolist()
        pairs += zip(batches.rows(update).tolist(), given, strict=True)
    assert all(splits[row] == splits[features] for row, features in pairs)
    assert all(row != features for row, features in pairs)
    labelled = [features for row, features in pairs if splits[row] == "train"]
    assert len(set(labelled)) == len(labelled)  # a permutation


@pytest.mark.parametrize("method", ["gcd", "regression", "relational", "auxiliary"])
def test_every_method_that_reads_features_can_read_those_of_another_cache(cache, make_cache, tiny_config, method):
    other = make_cache("other", tokens=6)
    config = tiny_config(f"features={other.root}", method=method)
    batches = TrainingBatches(cache, config, 24, find_method(method).needs(config))
    rows = cache.samples["id"].take(batches.rows(0)).to_pylist()
    there = [other.samples["id"].to_pylist().index(each) for each in rows]
    read = batches[0].to(CPU).features["teacher"].float()
    expected = other.read(there).decode()
    assert read.shape == expected.shape
    torch.testing.assert_close(read[..., 0], expected[..., 0])  # channel 1 is the view's


def test_another_cache_is_read_as_the_runs_own_is(cache, make_cache):
    other = make_cache("other")
    own = open_cache(cache.root, verify=False, local_cache="1GB")
    read = open_sources(own, Needs({"teacher": FeatureNeed(None, cache=str(other.root))}))["teacher"].cache
    assert (read.root, read.verify, read.local_cache) == (other.root, False, "1GB")


def test_features_of_another_image_cannot_be_had_where_there_is_none(make_cache, tiny_config):
    cache = make_cache(per_class=1)
    config = tiny_config("shuffle_features=true")
    with pytest.raises(TrainError, match="one image of split unlabeled has features in cache tiny-"):
        TrainingBatches(cache, config, 24, find_method("gcd").needs(config))


def test_plain_regression_of_nothing_is_refused():
    with pytest.raises(TrainError, match=r"tokens and pooled are both 0, so nothing is regressed"):
        make_config("recommended", ["regression.tokens=0"], method="regression")


def test_a_relational_run_leaves_a_student_of_the_baselines_form(cache, tiny_config, tmp_path):
    for method in ("relational", "baseline"):
        train(tiny_config("updates=2", method=method), cache, tmp_path / method)
    names = [set(load_file(tmp_path / m / "student.safetensors")) for m in ("relational", "baseline")]
    assert names[0] == names[1]
