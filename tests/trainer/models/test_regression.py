"""Regression of the teacher's features by the student, place by place."""

import pytest
import torch

from trainer.config import RegressionConfig, StudentConfig
from trainer.data.features import FeatureShape
from trainer.models.regression import FeatureRegression
from trainer.models.student import build_student

TINY = StudentConfig(name="vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=32, num_heads=2)
SHAPE = FeatureShape(timesteps=(1, 2), tokens=64, channels=6, grid=(8, 8))


@pytest.fixture(scope="module")
def regression():
    torch.manual_seed(0)
    made = FeatureRegression(RegressionConfig(weight=1, components=6, power=0), build_student(TINY), SHAPE)
    made.fit([torch.randn(16, 2, 64, 6)])
    return made


@pytest.fixture
def features():
    return torch.randn(3, 2, 64, 6, generator=torch.Generator().manual_seed(1))


def coarse(maps):
    """Means of 2 × 2 places of (B, 2, 64, 6): (B, 16, 2, 6)."""
    return maps.view(-1, 2, 4, 2, 4, 2, 6).mean((3, 5)).permute(0, 2, 3, 1, 4).flatten(1, 2)


def test_a_whole_image_meets_the_whole_map(regression, features):
    target, known = regression.regions(features, None)
    assert known.all()
    torch.testing.assert_close(target, coarse(regression.components(features)), atol=1e-5, rtol=1e-5)


def test_a_crop_meets_the_features_of_that_crop(regression):
    """A map that says where it is: the crop's targets are the coordinates of the crop."""
    steps = (torch.arange(8.0) + 0.5) / 8
    where = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).view(1, 1, 64, 2)  # y, x
    maps = torch.cat([where, torch.zeros(1, 1, 64, 4)], -1).expand(1, 2, -1, -1)
    regression_of = FeatureRegression(RegressionConfig(weight=1, components=6), build_student(TINY), SHAPE)
    regression_of.components.directions.copy_(torch.eye(6).expand(2, 6, 6))
    box = torch.tensor([[0.25, 0.125, 0.75, 0.625]])
    target, known = regression_of.regions(maps, box)
    assert known.all()
    quarter = (torch.arange(4.0) + 0.5) / 8  # four places along half of the side
    y, x = torch.meshgrid(0.125 + quarter, 0.25 + quarter, indexing="ij")
    torch.testing.assert_close(target[0, :, 0, 0], y.flatten())
    torch.testing.assert_close(target[0, :, 1, 1], x.flatten())


def test_what_the_teacher_did_not_see_counts_for_nothing(regression, features):
    student = torch.randn(3, 32)
    tokens = torch.randn(3, 4, 4, 32)
    left_half_unseen = torch.tensor([[-1.0, 0.0, 1.0, 1.0]]).expand(3, 4)
    _, known = regression.regions(features, left_half_unseen)
    assert known.view(3, 4, 4)[:, :, :2].sum() == 0
    assert known.view(3, 4, 4)[:, :, 2:].all()
    nothing = torch.tensor([[2.0, 2.0, 3.0, 3.0]]).expand(3, 4)
    assert regression(student, tokens, features, nothing) == 0


def test_the_teachers_orientation_is_not_asked_for(regression, features):
    """Gradients reach the student's tokens and embedding through heads that are trained along."""
    student = torch.randn(3, 32, requires_grad=True)
    tokens = torch.randn(3, 4, 4, 32, requires_grad=True)
    regression(student, tokens, features, None).backward()
    assert student.grad.norm() > 0
    assert tokens.grad.norm() > 0
    assert regression.tokens[0].weight.grad.norm() > 0


@pytest.mark.parametrize(
    ("name", "shape"), [("vit_tiny_patch16_224", (4, 4, 32)), ("mobilenetv3_small_050", (1, 1, None))]
)
def test_tokens_are_what_the_embedding_is_pooled_from(name, shape):
    student = build_student(TINY if name == TINY.name else StudentConfig(name=name, img_size=32)).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        embedding, tokens = student.with_tokens(images)
        assert torch.equal(embedding, student(images))
    assert tuple(tokens.shape[1:]) == student.token_shape
    assert tokens.shape[1:3] == torch.Size(shape[:2])


def test_drawn_timesteps_are_regressed_by_the_outputs_that_are_theirs(regression, features):
    embedding, tokens = torch.randn(3, 32), torch.randn(3, 4, 4, 32)
    every = torch.tensor([[0, 1]] * 3)
    torch.testing.assert_close(
        regression(embedding, tokens, features, None, every), regression(embedding, tokens, features, None)
    )
    halves = [
        regression(embedding, tokens, features.take_along_dim(drawn[:, :, None, None], 1), None, drawn)
        for drawn in (torch.tensor([[0], [1], [0]]), torch.tensor([[1], [0], [1]]))
    ]
    torch.testing.assert_close(sum(halves) / 2, regression(embedding, tokens, features, None))
