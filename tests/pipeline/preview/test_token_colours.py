"""Tokens become colours that can be compared, whatever a few channels do."""

import numpy as np
import pytest

from pipeline.preview.token_colours import fit_colours


def structured(samples=6, timesteps=3, grid=8, channels=20, seed=0):
    """Tokens (T, L, C) of a left half and a right half, under less noise at each timestep."""
    rng = np.random.default_rng(seed)
    direction, halves = rng.normal(size=channels), np.repeat([1.0, -1.0], grid * grid // 2)
    noise = np.linspace(4.0, 0.2, timesteps)[:, None, None]
    shape = (timesteps, grid * grid, channels)
    return [halves[:, None] * direction + noise * rng.normal(size=shape) for _ in range(samples)]


def contrast(colours):
    """How far the colours of the two halves are apart, per timestep: (T,)."""
    halves = colours.astype(float).reshape(len(colours), 2, -1, 3).mean(axis=2)
    return np.abs(halves[:, 0] - halves[:, 1]).max(axis=1)


def test_what_the_clearest_timestep_shows_fades_towards_the_noisy_ones():
    samples = structured()
    seen = contrast(fit_colours(samples)(samples[0]))
    assert seen[0] < seen[1] < seen[2]
    assert seen[2] > 100


def test_huge_channels_that_say_nothing_do_not_take_over_the_colours():
    samples = structured()
    noise = np.random.default_rng(1).normal(size=(6, *samples[0].shape[:2], 2)) * 1e4
    loud = [np.concatenate([s, n], axis=-1) for s, n in zip(samples, noise, strict=True)]
    assert contrast(fit_colours(loud)(loud[0]))[-1] > 0.8 * contrast(fit_colours(samples)(samples[0]))[-1]


def test_equal_tokens_have_equal_colours_and_the_mean_token_is_grey():
    samples = structured()
    colours = fit_colours(samples)
    assert np.array_equal(colours(samples[2]), fit_colours(structured())(samples[2]))
    assert np.abs(colours(colours.mean[:, None]).astype(int) - 128).max() <= 1


@pytest.mark.parametrize(("tokens", "channels"), [(1, 5), (2, 5), (40, 1), (40, 2), (3, 3)])
def test_fewer_tokens_or_channels_than_colours_leave_the_others_grey(tokens, channels):
    samples = [np.random.default_rng(3).normal(size=(2, tokens, channels))]
    coloured = fit_colours(samples)(samples[0])
    assert coloured.shape == (2, tokens, 3)
    missing = 3 - min(tokens, channels)
    if missing > 0:
        assert np.abs(coloured[..., 3 - missing :].astype(int) - 128).max() <= 1


def test_features_that_do_not_vary_are_grey():
    samples = [np.full((2, 9, 4), 7.0)]
    assert np.abs(fit_colours(samples)(samples[0]).astype(int) - 128).max() <= 1
