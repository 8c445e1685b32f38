import pytest
import timm
import torch

from trainer.device import decide_precision

CPU = torch.device("cpu")


@pytest.fixture
def networks():
    with torch.device("meta"):
        return {name: timm.create_model(name) for name in ("test_vit", "test_efficientnet", "test_convnext")}


def test_a_network_that_convolves_trains_in_float32_on_any_cpu(networks):
    for name in ("test_efficientnet", "test_convnext"):
        assert decide_precision("auto", CPU, networks[name]) == "float32"


def test_a_transformer_trains_in_bfloat16_on_a_cpu_that_multiplies_it_itself(networks, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert decide_precision("auto", CPU, networks["test_vit"]) == ("bfloat16" if supported else "float32")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    assert decide_precision("auto", CPU, networks["test_vit"]) == "float32"


def test_what_is_asked_for_and_an_accelerator_are_not_second_guessed(networks):
    network = networks["test_efficientnet"]
    assert decide_precision("bfloat16", CPU, network) == "bfloat16"
    assert decide_precision("auto", torch.device("cuda"), network) == "bfloat16"
