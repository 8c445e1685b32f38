"""What the committed teacher knows, and what it needs to be told where noise hides most."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.curriculum import add_noise
from pipeline.datasets.bird_scenes import render_scene
from pipeline.datasets.birds import describe, random_attributes
from pipeline.inputs.views import object_view, resize_square
from pipeline.teachers import load_teacher
from pipeline.teachers.base import Teacher, TextEmbedding

BIRDS, RESOLUTION = 48, 48


@dataclass(frozen=True)
class Photographs:
    """Two of each bird: close-ups (B, 2, L, C) and wholes (B, 2, L, C) as latents, and what is said of each bird."""

    teacher: Teacher
    objects: Tensor
    wholes: Tensor
    captions: list[str]

    def text(self, shift: int = 0) -> TextEmbedding:
        """Each bird's own caption, or that of the bird so many further."""
        return self.teacher.encode_text([*self.captions[shift:], *self.captions[:shift]])

    @torch.no_grad()
    def loss(self, sigma: float, *, told: int = 0, context: Tensor | None = None) -> float:
        """Of painting the first close-ups in the same noise."""
        clean = self.objects[:, 0]
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
        level = torch.full((BIRDS,), sigma)
        velocity = self.teacher.predict(add_noise(clean, noise, level), context, level, self.text(told))
        return F.mse_loss(velocity, clean - noise).item()


@pytest.fixture(scope="module")
def birds() -> Photographs:
    teacher = load_teacher("demo", dtype=torch.float32, device="cpu")
    objects, wholes, captions = [], [], []
    for i in range(BIRDS):
        rng = np.random.default_rng([991, i])  # a world of its own
        bird = random_attributes(rng)
        for k in range(2):
            image, box = render_scene(bird, [991, i, k])
            objects.append(np.asarray(object_view(image, box, RESOLUTION)))
            wholes.append(np.asarray(resize_square(image, RESOLUTION)))
        captions.append(describe(bird, rng))

    def latents(views: list[np.ndarray]) -> Tensor:
        pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
        return teacher.encode_images(pixels).unflatten(0, (BIRDS, 2))

    return Photographs(teacher, latents(objects), latents(wholes), captions)


def test_a_birds_tokens_are_nearest_to_those_of_another_photograph_of_it_whatever_is_said(birds):
    """With no caption, so that nothing but the picture can tell."""
    sigma = torch.full((BIRDS,), birds.teacher.sigmas(28)[-1])
    silence = birds.teacher.encode_text([""] * BIRDS)
    pooled = []
    for k in range(2):
        clean = birds.objects[:, k]
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(k))
        noisy = add_noise(clean, noise, sigma)
        tokens = birds.teacher.features(noisy, birds.wholes[:, k], sigma, silence, ["hidden"])["hidden"]
        pooled.append(tokens.mean(dim=1))
    first, second = (F.normalize(part - torch.cat(pooled).mean(dim=0), dim=1) for part in pooled)
    found = (first @ second.T).argmax(dim=1) == torch.arange(BIRDS)
    assert found.float().mean() > 0.5  # a guess is right once in 48


def test_at_a_noisy_timestep_the_wrong_words_and_the_wrong_bird_as_context_cost(birds):
    another = birds.wholes[:, 1]
    assert birds.loss(0.9, told=1) > 1.01 * birds.loss(0.9)
    assert birds.loss(0.9, context=another.roll(1, 0)) > 1.03 * birds.loss(0.9, context=another)


def test_at_a_clear_timestep_the_picture_itself_says_nearly_all(birds):
    noisy = birds.loss(0.9, told=1) / birds.loss(0.9) - 1
    clear = birds.loss(0.06, told=1) / birds.loss(0.06) - 1
    assert clear < noisy / 2
