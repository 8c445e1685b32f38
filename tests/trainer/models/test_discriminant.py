"""The closed-form head finds what tells classes apart under what varies within them, and never depends on luck."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.models.discriminant import ClassMoments, Discriminant, discriminant_directions


def classes_under_noise(images=600, channels=12, classes=20, noisy=3, seed=0, means=None):
    """Classes differ a little in every channel; the first few channels vary far more, whatever the class."""
    draw = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, channels, generator=torch.Generator().manual_seed(99)) if means is None else means
    labels = torch.arange(images) % classes
    noise = torch.randn(images, channels, generator=draw) * torch.tensor([30.0] * noisy + [0.3] * (channels - noisy))
    return (means[labels] + noise).unsqueeze(1), labels


def recall(embeddings, labels):
    unit = torch.nn.functional.normalize(embeddings.squeeze(1), dim=-1)
    return (labels[(unit @ unit.T).fill_diagonal_(-2).argmax(1)] == labels).float().mean().item()


def test_neighbours_are_of_one_class_where_the_features_own_are_not_for_classes_never_seen_too():
    features, labels = classes_under_noise()
    head, means = Discriminant(1, 12, 12), torch.randn(15, 12, generator=torch.Generator().manual_seed(7))
    head.fit([(features, labels)])
    unseen, theirs = classes_under_noise(seed=1, means=means, classes=15)
    assert recall(unseen, theirs) < 0.3
    assert recall(head(unseen), theirs) > 0.9
    assert head(features).square().mean().item() == pytest.approx(1, rel=1e-2)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 99))
def test_the_deviations_within_classes_are_the_same_however_the_samples_come(sizes, seed):
    draw = np.random.default_rng(seed)
    count = sum(sizes)
    values = torch.from_numpy(draw.normal(5, 2, (count, 2, 3)))
    labels = torch.from_numpy(draw.integers(-1, 4, count))
    moments = ClassMoments()
    for part, named in zip(values.split(sizes), labels.split(sizes), strict=True):
        moments.add_labelled(part, named)
    known, seen = labels >= 0, labels[labels >= 0].unique()
    if not len(seen):
        assert moments.mean is None
        return
    apart = torch.cat([values[labels == c] - values[labels == c].mean(0) for c in seen])
    expected = torch.einsum("npc,npd->pcd", apart, apart) / max(1, int(known.sum()) - len(seen))
    torch.testing.assert_close(moments.within(), expected, atol=1e-9, rtol=1e-6)


def test_more_components_than_directions_are_zeros_and_nothing_is_not_a_number():
    features, labels = classes_under_noise(images=8, classes=4)
    moments = ClassMoments()
    moments.add_labelled(features, labels)
    found = discriminant_directions(moments, 20)
    assert found.isfinite().all()
    assert (found[:, :, 7:] == 0).all()
    head = Discriminant(2, 3, 4)
    head.fit([(torch.ones(5, 2, 3), torch.arange(5))])
    assert (head(torch.ones(1, 2, 3)) == 0).all()


def test_one_massive_channel_does_not_decide_how_much_the_others_are_shrunk():
    features, labels = classes_under_noise()
    massive = torch.cat([features, 1e4 * torch.randn(len(features), 1, 1)], -1)
    head = Discriminant(1, 13, 13)
    head.fit([(massive, labels)])
    assert recall(head(massive), labels) > 0.9
