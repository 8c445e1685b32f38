"""The noise is one per image, the same on every machine; the sign and the clean end are as in the method."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache_schema.errors import DitDistillError
from pipeline.curriculum import add_noise, check_timesteps, sample_noise


def test_the_noise_of_an_image_is_fixed_for_ever():
    """These digits are part of the contract: a cache built elsewhere must hold the same numbers."""
    noise = sample_noise("train-000-000", "canonical", 0, (36, 32))
    assert noise.dtype == torch.float32
    assert hashlib.sha256(noise.numpy().tobytes()).hexdigest()[:16] == "eb73d112547285b4"


def test_noise_differs_between_images_views_and_seeds():
    base = sample_noise("a", "canonical", 0, (64,))
    assert torch.equal(base, sample_noise("a", "canonical", 0, (64,)))
    for other in (("b", "canonical", 0), ("a", "hflip", 0), ("a", "canonical", 1)):
        assert not torch.equal(base, sample_noise(*other, (64,)))


def test_noise_is_standard_normal():
    noise = sample_noise("a", "canonical", 0, (100_000,))
    assert abs(noise.mean().item()) < 0.02
    assert noise.std().item() == pytest.approx(1, abs=0.02)


@given(st.floats(0, 1))
def test_sigma_zero_is_the_clean_image_and_sigma_one_is_noise(sigma):
    clean, noise = torch.full((1, 2, 3), 2.0), torch.full((1, 2, 3), -1.0)
    mixed = add_noise(clean, noise, torch.tensor([sigma]))
    torch.testing.assert_close(mixed, torch.full((1, 2, 3), 2.0 * (1 - sigma) - sigma))


@pytest.mark.parametrize(
    ("timesteps", "complaint"),
    [([], "empty"), ([0], "outside 1–28"), ([29], "outside 1–28"), ([16, 10], "ascending"), ([10, 10], "repeats")],
)
def test_an_impossible_curriculum_is_refused(timesteps, complaint):
    with pytest.raises(DitDistillError, match=complaint):
        check_timesteps(timesteps, 28)
