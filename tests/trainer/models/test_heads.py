import math

import pytest
import torch

from trainer.models.heads import ProxyClassifier, drc_loss


def test_drc_is_the_negative_log_softmax_of_cosines_over_tau_averaged_over_timesteps():
    proxies = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # lengths must not matter
    embeddings = torch.tensor([[[5.0, 0.0], [1.0, 1.0]]])  # cosines (1, 0) and (√½, √½)
    first = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + math.exp(0)))
    expected = (first + math.log(2)) / 2
    assert drc_loss(embeddings, torch.tensor([0]), proxies, 0.5).item() == pytest.approx(expected, rel=1e-6)


def test_drc_ignores_rows_without_a_label():
    proxies, embeddings = torch.randn(4, 8), torch.randn(5, 3, 8)
    labels = torch.tensor([2, -1, 0, -1, 3])
    labelled = labels >= 0
    whole = drc_loss(embeddings, labels, proxies, 0.1)
    assert torch.equal(whole, drc_loss(embeddings[labelled], labels[labelled], proxies, 0.1))


def test_a_batch_without_labels_costs_nothing_and_can_still_be_differentiated():
    classifier = ProxyClassifier(3, 4, 0.1)
    embeddings = torch.randn(2, 4, requires_grad=True)
    loss = classifier(embeddings, torch.tensor([-1, -1]))
    loss.backward()
    assert loss.item() == 0
    assert embeddings.grad is not None
    assert embeddings.grad.abs().sum() == 0
