import pytest
import torch

from trainer.methods.gcd.cal import cal_loss, cal_ramp


def test_raw_cal_is_the_squared_euclidean_distance_averaged_over_images_and_timesteps():
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    injected = torch.tensor([[[1.0, 0.0], [4.0, 2.0]], [[1.0, 1.0], [0.0, 0.0]]])
    assert cal_loss(student, injected).item() == pytest.approx((4 + 9 + 2 + 0) / 4)


def test_normalized_cal_is_two_minus_two_cosines_whatever_the_lengths():
    student = torch.tensor([[3.0, 0.0]])
    injected = torch.tensor([[[0.0, 7.0], [-1.0, 0.0], [5.0, 0.0]]])
    assert cal_loss(student, injected, "normalized").item() == pytest.approx((2 + 4 + 0) / 3)


@pytest.mark.parametrize("kind", ["raw", "normalized"])
@pytest.mark.parametrize("stop", [True, False])
def test_cal_moves_the_injected_embedding_only_without_stop_gradient(kind, stop):
    student, injected = torch.randn(2, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    cal_loss(student, injected, kind, stop_gradient=stop).backward()
    assert student.grad is not None
    assert (injected.grad is None) == stop


def test_alpha_grows_linearly_from_nothing_and_then_stays():
    assert [cal_ramp(update, 100, 0.2) for update in (0, 5, 10, 20, 99)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert cal_ramp(0, 100, 0.0) == 1.0
