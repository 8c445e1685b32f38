from dataclasses import replace

import pytest
import torch

from trainer.data.batches import TrainingBatches
from trainer.errors import TrainError
from trainer.methods.gcd.cal import cal_loss
from trainer.methods.gcd.method import Gcd
from trainer.methods.reading import TEACHER
from trainer.methods.registry import find_method
from trainer.models.heads import drc_loss
from trainer.models.student import build_student


@pytest.fixture
def build(cache, tiny_config):
    def make(*settings, mode="distill"):
        config = tiny_config(*settings, mode=mode)
        torch.manual_seed(config.seed)
        kind = find_method(config.method)
        batches = TrainingBatches(cache, config, 24, kind.needs(config))
        shapes = {name: source.shape for name, source in batches.sources.items()}
        objective = kind(config, build_student(config.student), batches.classes, shapes)
        return objective.train(), batches[0].to(torch.device("cpu"))

    return make


def test_the_baseline_is_drc_on_the_student_alone(build):
    objective, batch = build(mode="baseline")
    losses = objective(batch)
    expected = drc_loss(objective.student(batch.images), batch.labels, objective.drc.proxies, 0.05)
    assert torch.equal(losses["loss"], expected)
    assert batch.features == {}


def test_distillation_adds_alpha_times_cal_to_drc_on_the_injected_embedding(build):
    objective, batch = build("loss.alpha=3")
    losses = objective(batch)
    student = objective.student(batch.images)
    injected = objective.gim(student, batch.features[TEACHER], masked=False)
    drc = drc_loss(injected, batch.labels, objective.drc.proxies, 0.05)
    cal = cal_loss(student, injected)
    torch.testing.assert_close(losses["drc"], drc)
    torch.testing.assert_close(losses["cal"], cal)
    torch.testing.assert_close(losses["loss"], drc + 3 * cal)


def test_drc_on_both_adds_the_students_own_term(build):
    objective, batch = build("loss.drc_on=both", "loss.drc_student_weight=0.5", "loss.alpha=0")
    losses = objective(batch)
    torch.testing.assert_close(losses["loss"], losses["drc"] + 0.5 * losses["drc_student"])
    assert objective.drc_student is None  # shared proxies
    assert build("loss.drc_on=both", "loss.share_proxies=false")[0].drc_student is not None


@pytest.mark.parametrize(("target", "masked"), [("unmasked", False), ("masked", True)])
def test_cal_can_aim_at_another_mask_than_the_one_trained_with(build, target, masked):
    objective, batch = build(f"loss.cal_target={target}", "gim.mask_student=0.5")
    torch.manual_seed(0)
    losses = objective(batch)
    student = objective.student(batch.images)
    torch.testing.assert_close(
        losses["cal"], cal_loss(student, objective.gim(student, batch.features[TEACHER], masked))
    )


def test_unlabelled_rows_change_cal_but_not_drc(build):
    plain, batch = build()
    mixed, larger = build("unlabeled_per_batch=3")
    a, b = plain(batch), mixed(larger)
    torch.testing.assert_close(a["drc"], b["drc"])
    assert not torch.allclose(a["cal"], b["cal"])


@pytest.mark.parametrize("stop", ["true", "false"])
def test_cal_alone_teaches_the_student_and_the_gim_only_without_stop_gradient(build, stop):
    objective, batch = build(f"loss.stop_gradient={stop}")
    objective(batch)["cal"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.student.parameters())
    assert all(p.grad is None for p in objective.gim.parameters()) == (stop == "true")


def test_both_modes_of_one_seed_start_from_the_same_student_and_proxies(build):
    baseline, distill = build(mode="baseline")[0], build()[0]
    assert isinstance(distill, Gcd)
    for name, value in baseline.state_dict().items():
        assert torch.equal(value, distill.state_dict()[name])


def test_under_bfloat16_autocast_the_losses_stay_float32_and_finite(build):
    objective, batch = build("loss.drc_on=both", "loss.cal=normalized", "gim.mask_student=0.5")
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(batch)
    losses["loss"].backward()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize("settings", [(), ("regression.weight=1", "loss.align_target=pooled", "gim.residual=pca")])
def test_drawn_timesteps_give_in_the_mean_over_all_draws_what_all_of_them_give(build, settings):
    objective, batch = build("loss.stop_gradient=true", *settings)
    objective.fit([batch])
    drawn = torch.arange(len(batch.labels)).unsqueeze(1) % 2
    losses = []
    for timesteps in (drawn, 1 - drawn):
        features = {TEACHER: batch.features[TEACHER].take_along_dim(timesteps[:, :, None, None], 1)}
        losses.append(objective(replace(batch, features=features, timesteps=timesteps)))
    for name, value in objective(batch).items():
        torch.testing.assert_close((losses[0][name] + losses[1][name]) / 2, value)


@pytest.mark.parametrize("setting", ["loss.align=relational", "loss.align=memory", "loss.center=class"])
def test_drawn_timesteps_are_refused_where_images_are_compared_at_the_same_one(build, setting):
    with pytest.raises(TrainError, match=f"timesteps_per_step: {setting} holds images against each other"):
        build("timesteps_per_step=1", setting)
