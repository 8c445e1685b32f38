"""What the demo teacher learns from."""

import torch

from pipeline.datasets.birds import ATTRIBUTES
from pipeline.refine.demo_world import PAINTING, Latents
from pipeline.refine.pretrain_demo import Teller

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


def test_the_teller_learns_from_an_objects_tokens_what_each_attribute_is():
    torch.manual_seed(0)
    counts = [len(values) for values in ATTRIBUTES.values()]
    birds = torch.stack([torch.randint(count, (64,)) for count in counts], dim=1)
    tokens = torch.cat([torch.nn.functional.one_hot(b, n) for b, n in zip(birds.T, counts, strict=True)], dim=1)
    tokens = tokens.float()[:, None].expand(-1, 5, -1)
    teller = Teller(sum(counts))
    optimiser = torch.optim.Adam(teller.parameters(), 1e-2)
    first = teller(tokens, birds)
    for _ in range(60):
        optimiser.zero_grad()
        loss = teller(tokens, birds)
        loss.backward()
        optimiser.step()
    assert loss < 0.1 < first
