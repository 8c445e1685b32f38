"""What the demo teacher learns from."""

import json

import pytest
import torch

from pipeline.datasets.birds import ATTRIBUTES
from pipeline.refine.demo_world import PAINTING, READING, READING_BY_NOISE, Latents
from pipeline.refine.pretrain_demo import Teller, is_finished

BIRDS, SCENES, BATCH = 7, 3, 200


def numbered() -> Latents:
    """Latents whose one channel says which bird and scene they are of; close-ups are positive."""
    names = torch.arange(1.0, 1 + BIRDS * SCENES).view(BIRDS, SCENES, 1, 1)
    return Latents(names, -names)


def test_a_context_is_of_the_same_bird_but_never_the_photograph_that_is_painted():
    torch.manual_seed(0)
    drawn = numbered().draw(BATCH, with_context=True, stage=PAINTING)
    clean = drawn.noisy - drawn.sigma[:, None, None] * drawn.target  # z + σ(ε − z) is what is noisy
    painted, seen = clean.flatten().round().long() - 1, drawn.context.flatten().abs().long() - 1
    assert torch.equal(painted // SCENES, seen // SCENES)
    assert (painted != seen).all()
    assert (drawn.context > 0).any()  # a close-up
    assert (drawn.context < 0).any()  # a whole photograph


def test_a_caption_is_of_the_photograph_that_is_painted_or_empty():
    torch.manual_seed(0)
    drawn = numbered().draw(BATCH, with_context=False, stage=PAINTING)
    assert drawn.context is None
    clean = drawn.noisy - drawn.sigma[:, None, None] * drawn.target
    painted, empty = clean.flatten().round().long() - 1, BIRDS * SCENES
    told = drawn.caption_rows != empty
    assert torch.equal(drawn.caption_rows[told], painted[told])
    assert 0.6 < told.float().mean() < 0.8


COUNTS = [len(values) for values in ATTRIBUTES.values()]
COLOURS, SHAPES = slice(0, 3), slice(3, 7)


def spelled_birds() -> tuple[torch.Tensor, torch.Tensor]:
    """Attributes of birds, and tokens that say them one by one."""
    torch.manual_seed(0)
    birds = torch.stack([torch.randint(count, (64,)) for count in COUNTS], dim=1)
    tokens = torch.cat([torch.nn.functional.one_hot(b, n) for b, n in zip(birds.T, COUNTS, strict=True)], dim=1)
    return birds, tokens.float()[:, None].expand(-1, 5, -1)


@pytest.mark.parametrize("levels", [READING.levels, (0.5, 0.5)])
def test_the_teller_learns_from_an_objects_tokens_what_each_attribute_is(levels):
    birds, tokens = spelled_birds()
    sigma = torch.rand(len(birds))
    teller = Teller(sum(COUNTS), levels)
    optimiser = torch.optim.Adam(teller.parameters(), 1e-2)
    first = teller(tokens, birds, sigma)
    for _ in range(60):
        optimiser.zero_grad()
        loss = teller(tokens, birds, sigma)
        loss.backward()
        optimiser.step()
    assert loss < 0.1 < first


@pytest.mark.parametrize(("sigma", "asked", "unasked"), [(0.2, SHAPES, COLOURS), (0.8, COLOURS, SHAPES)])
def test_by_noise_shapes_are_asked_for_where_there_is_little_and_colours_where_there_is_much(sigma, asked, unasked):
    birds, tokens = spelled_birds()
    teller = Teller(sum(COUNTS), READING_BY_NOISE.levels)
    told = lambda birds, level: teller(tokens, birds, torch.full((len(birds),), level)).item()  # noqa: E731
    other = birds.clone()
    other[:, unasked] = 0
    assert told(other, sigma) == told(birds, sigma)
    other[:, asked] = 0
    assert told(other, sigma) != told(birds, sigma)
    assert told(birds, 0.45) == 0  # between the levels nothing is asked for


def test_a_first_stage_that_was_interrupted_is_not_taken_for_a_finished_one(tmp_path):
    assert not is_finished(tmp_path / "nothing")
    for steps_done in (400, 3600):
        stage = {"steps": 3600, "steps_done": steps_done}
        (tmp_path / "recipe.json").write_text(json.dumps({"stages": [stage]}))
        assert is_finished(tmp_path) == (steps_done == 3600)
