import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

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


@pytest.mark.parametrize("enabled", [False, True], ids=["plain", "autocast"])
def test_drc_is_computed_in_float32_even_where_the_rest_runs_in_bfloat16(enabled):
    generator = torch.Generator().manual_seed(0)
    embeddings, proxies = (torch.randn(*shape, generator=generator) for shape in ((64, 2, 192), (98, 192)))
    labels = torch.arange(64) % 98
    cosines = F.normalize(embeddings.double(), dim=-1) @ F.normalize(proxies.double(), dim=-1).T
    exact = F.cross_entropy((cosines / 0.05).flatten(0, 1), labels.repeat_interleave(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        loss = drc_loss(embeddings, labels, proxies, 0.05)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < 1e-5


def test_drc_waits_for_no_value_that_a_device_computes():
    with FakeTensorMode():  # knows shapes alone: what depends on a value is an error
        embeddings, proxies = torch.empty(4, 2, 8, device="cuda"), torch.empty(3, 8, device="cuda")
        loss = drc_loss(embeddings, torch.empty(4, dtype=torch.int64, device="cuda"), proxies, 0.1)
    assert loss.device.type == "cuda"
