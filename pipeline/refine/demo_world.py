"""What the demo teacher is trained on: stages, the birds of each, and what a step draws from them."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.datasets.bird_scenes import WIDE, Variation, render_scene
from pipeline.datasets.birds import ATTRIBUTES, describe, random_attributes
from pipeline.inputs.views import object_view, resize_square

RESOLUTION = 48
SCENES = 3  # photographs of each bird


@dataclass(frozen=True)
class Stage:
    """A part of the training: on birds of its own, whose scenes have seeds that no scene of the demo data set has."""

    world: int
    variation: Variation
    words: bool  # whether a caption's tokens are its words, or its bytes
    attributes: tuple[int, int]  # that a caption names, at least and at most
    no_caption: float  # share of the draws that go without one
    no_context: float
    noise: tuple[float, float]  # mean and deviation of the logit of σ
    telling: float  # weight of the loss of `Teller`
    steps: int
    lr: float
    levels: tuple[float, float] = (1.0, 0.0)  # the σ up to which shapes must be told, and that from which colours must


# First to paint birds however they are photographed; words and references tell most where noise hides most. Then, with
# text encoders that begin anew, to know what it paints.
PAINTING = Stage(
    world=7_000_001, variation=WIDE, words=False, attributes=(3, 3), no_caption=0.3, no_context=0.3, noise=(0.4, 1.0),
    telling=0.0, steps=3_600, lr=1e-3,
)  # fmt: skip
READING = Stage(
    world=7_000_002, variation=Variation(), words=True, attributes=(2, 4), no_caption=0.4, no_context=0.5,
    noise=(0.2, 1.5), telling=0.5, steps=2_400, lr=8e-4,
)  # fmt: skip
# A teacher of which no one timestep tells all: colours where there is noise, which words and references tell as well,
# and shapes where there is little.
READING_BY_NOISE = replace(READING, noise=(0.0, 2.5), levels=(0.3, 0.62))


@dataclass(frozen=True)
class World:
    """Birds photographed several times each, in views of 48 × 48 pixels: (birds, scenes, …)."""

    objects: Tensor  # close-ups, (B, S, 3, 48, 48) uint8
    scenes: Tensor  # the whole photographs, (B, S, 3, 48, 48) uint8
    attributes: Tensor  # which value each attribute has, (B, 7) int64
    captions: list[str]  # of every photograph: B × S, those of one bird say different things of it


def render_world(birds: int, stage: Stage, quiet: bool) -> World:
    """Render `birds` random combinations of attributes, `SCENES` photographs of each."""
    objects, scenes, birds_like, captions = [], [], [], []
    fewest, most = stage.attributes
    for i in tqdm(range(birds), desc="render", unit="bird", disable=quiet):
        rng = np.random.default_rng([stage.world, i])
        attributes = random_attributes(rng)
        birds_like.append([values.index(getattr(attributes, name)) for name, values in ATTRIBUTES.items()])
        for k in range(SCENES):
            image, box = render_scene(attributes, [stage.world, i, k + 1], variation=stage.variation)
            objects.append(np.asarray(object_view(image, box, RESOLUTION)))
            scenes.append(np.asarray(resize_square(image, RESOLUTION)))
            captions.append(describe(attributes, rng, int(rng.integers(fewest, most + 1))))
    as_tensor = lambda views: torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()  # noqa: E731
    shape = (birds, SCENES, 3, RESOLUTION, RESOLUTION)
    return World(as_tensor(objects).view(shape), as_tensor(scenes).view(shape), torch.tensor(birds_like), captions)


@dataclass(frozen=True)
class Draw:
    """What a step learns from."""

    noisy: Tensor  # (B, L, C)
    context: Tensor | None  # (B, L, C)
    bird: Tensor  # (B,)
    caption_rows: Tensor  # (B,)
    sigma: Tensor  # (B,)
    target: Tensor  # ε − z_O, diffusers' sign, (B, L, C)


@dataclass(frozen=True)
class Latents:
    """A world as the transformer sees it: tokens (birds, scenes, L, C) of close-ups and of whole photographs."""

    objects: Tensor
    scenes: Tensor

    def draw(self, batch: int, with_context: bool, stage: Stage) -> Draw:
        """Close-ups to paint, and as context *another* photograph of each bird, as a whole or a close-up of it."""
        birds, count = self.objects.shape[:2]
        bird, scene = torch.randint(birds, (batch,)), torch.randint(count, (batch,))
        clean = self.objects[bird, scene]
        noise = torch.randn_like(clean)
        mean, deviation = stage.noise
        sigma = torch.sigmoid(torch.randn(batch) * deviation + mean)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        context = None
        if with_context:
            other = (scene + torch.randint(1, count, (batch,))) % count
            closely = torch.rand(batch)[:, None, None] < 0.5
            context = torch.where(closely, self.objects[bird, other], self.scenes[bird, other])
        silent = torch.rand(batch) < stage.no_caption
        caption_rows = torch.where(silent, birds * count, bird * count + scene)  # the last caption is empty
        return Draw(noisy, context, bird, caption_rows, sigma, noise - clean)
