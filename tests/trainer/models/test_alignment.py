import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.models.alignment import ClassMeans, Memory, memory_loss, relational_loss
from trainer.models.components import Moments, PrincipalComponents

B, P, C, D = 6, 2, 5, 7


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_relational_loss_is_the_kl_of_row_softmaxed_similarities():
    student, target, t = draw(B, C), draw(B, P, D, seed=1), 0.2
    total = 0.0
    for p in range(P):
        for i in range(B):
            others = [j for j in range(B) if j != i]
            own = torch.stack([F.cosine_similarity(student[i], student[j], dim=0) for j in others]) / t
            wanted = torch.stack([F.cosine_similarity(target[i, p], target[j, p], dim=0) for j in others]) / t
            total += F.kl_div(own.log_softmax(0), wanted.softmax(0), reduction="sum")
    torch.testing.assert_close(relational_loss(student, target, t), total / (B * P))


def test_relational_loss_does_not_ask_for_an_orientation_or_a_length():
    target = draw(B, P, D)
    turned, _ = torch.linalg.qr(draw(D, D, seed=2))
    turned_student = 3 * target[:, 0] @ turned
    assert relational_loss(turned_student, target[:, :1], 0.1).item() == pytest.approx(0, abs=1e-5)
    assert relational_loss(draw(B, D, seed=3), target, 0.1) > 0.1


def test_relational_loss_of_a_single_image_is_zero_with_a_gradient():
    student = draw(1, C).requires_grad_()
    relational_loss(student, draw(1, P, D), 0.1).backward()
    assert torch.equal(student.grad, torch.zeros(1, C))


def test_of_two_images_similarities_tell_nothing_and_of_three_they_do():
    student, target = draw(3, C), draw(3, P, D, seed=1)
    assert relational_loss(student[:2], target[:2], 0.1).item() == 0
    assert relational_loss(student, target, 0.1) > 0


def test_memory_loss_compares_with_filled_places_alone():
    student, target = draw(B, D), draw(B, P, D, seed=1)
    memory = draw(9, P, D, seed=2)
    filled = torch.arange(9) < 4
    assert memory_loss(target[:, 0], target[:, :1], memory[:, :1], filled, 0.1).item() == pytest.approx(0, abs=1e-6)
    found = memory_loss(student, target, memory, filled, 0.1)
    torch.testing.assert_close(found, memory_loss(student, target, memory[:4], torch.ones(4, dtype=torch.bool), 0.1))
    student.requires_grad_()
    memory_loss(student, target, memory, filled, 0.1).backward()
    assert student.grad.isfinite().all()
    assert student.grad.any()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_a_memory_holds_the_newest_targets(size, arrivals):
    memory, came = Memory(size, 1, 1), []
    for count in arrivals:
        memory.add(torch.arange(len(came), len(came) + count).float().view(-1, 1, 1) + 1)
        came += range(len(came) + 1, len(came) + count + 1)
    held = memory.values[memory.filled].flatten().tolist()
    assert sorted(held) == came[-size:]


def test_what_is_left_without_class_means_does_not_tell_the_classes():
    labels = torch.tensor([0, 0, 1, 1, -1])
    embeddings = draw(5, P, D)
    means = ClassMeans(3, P, D)
    means.update(embeddings, labels)
    left = means.remove(embeddings, labels)
    for label in (0, 1):
        torch.testing.assert_close(left[labels == label].mean(0), torch.zeros(P, D), atol=1e-6, rtol=0)
    unit = F.normalize(embeddings, dim=-1)
    torch.testing.assert_close(left[4], unit[4] - (unit[:2].mean(0) + unit[2:4].mean(0)) / 2)
    assert not means.means[2].any()  # never seen


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 3))
def test_moments_do_not_depend_on_how_the_samples_come(cuts, seed):
    samples = 1000 + draw(sum(cuts) + 1, P, 3, C, seed=seed).double()
    moments = Moments()
    for part in samples.split([*cuts, 1]):
        moments.add(part)
    for p in range(P):
        values = samples[:, p].flatten(0, 1)
        torch.testing.assert_close(moments.mean[p], values.mean(0))
        torch.testing.assert_close(moments.covariance()[p], values.T.cov())


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_components_are_uncorrelated_of_one_scale_and_blind_to_the_scale_of_channels(power):
    samples = draw(200, P, 1, C) @ draw(C, C, seed=1)
    components = PrincipalComponents(P, C, 4, power)
    components.fit(samples.split(64))
    found = components(samples)
    assert found.shape == (200, P, 1, 4)
    for p in range(P):
        covariance = found[:, p, 0].T.cov()
        off = covariance - covariance.diag().diag()
        assert off.abs().max() < 1e-4
        assert covariance.diag().mean().item() == pytest.approx(1, abs=1e-3)
        spread = covariance.diag().max() / covariance.diag().min()
        assert (spread < 1.01) == (power == 1)
    scaled = PrincipalComponents(P, C, 4, power)
    scales = torch.tensor([1e4, 1.0, 1e-3, 1.0, 1.0])
    scaled.fit([samples * scales])
    torch.testing.assert_close(scaled(samples * scales), found, atol=1e-3, rtol=1e-3)


def test_components_beyond_what_there_is_are_zero():
    samples = draw(50, 1, 1, C)
    samples[..., 0] = 3.0  # a constant channel
    components = PrincipalComponents(1, C, C + 2)
    components.fit([samples])
    found = components(samples)
    assert found.isfinite().all()
    assert not found[..., C - 1 :].any()
    assert math.isclose(found[..., : C - 1].square().mean().item(), 1, abs_tol=0.05)
