"""Weights that do not fit are said to be that, once, with what helps: not a pass that does not, nor a step."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from pipeline.build.config import BuildConfig
from pipeline.build.run import build
from pipeline.refine import RefineConfig, refine
from pipeline.teachers import load_teacher as load_any
from pipeline.teachers.passes import OutOfMemory
from pipeline.teachers.timm_encoder import TimmEncoder

TOO_MUCH = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24.00 GiB")
CONFIG = RefineConfig(steps=2, rank=2, validation_images=2, pictures_every=0, checkpoint_every=0)


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A tiny network, by its name as a teacher."""
    file = tmp_path_factory.mktemp("timm") / "weights.safetensors"
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), file)
    return f"timm:test_resnet:{file}"


def test_stage_one_loads_the_transformer_once_and_says_that_it_does_not_fit(load_teacher, tiny_dataset, tmp_path):
    teacher, tried = load_teacher(), []

    def too_large(transformer) -> None:
        tried.append(transformer)
        raise TOO_MUCH

    teacher._prepare_transformer = too_large
    with pytest.raises(OutOfMemory) as caught:
        refine(teacher, tiny_dataset, CONFIG, tmp_path / "lora", log=str)
    said = one_line(caught)
    assert said.startswith("out of memory while loading the diffusion transformer; its weights do not fit: use --quan")
    assert "--offload" not in said  # which Stage I does not take
    assert len(tried) == 1


@pytest.mark.parametrize("where", ["forward", "optimiser", "held out"])
def test_a_step_that_does_not_fit_is_said_to_be_a_step(load_teacher, tiny_dataset, tmp_path, monkeypatch, where):
    teacher = load_teacher()
    original = teacher.predict

    def predict(*given):
        if torch.is_grad_enabled() == (where == "forward"):
            raise TOO_MUCH
        return original(*given)

    if where == "optimiser":
        monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (_ for _ in ()).throw(TOO_MUCH))
    else:
        teacher.predict = predict
    with pytest.raises(OutOfMemory) as caught:
        refine(teacher, tiny_dataset, CONFIG, tmp_path / "lora", log=str)
    said = one_line(caught)
    assert ("while measuring held-out images" if where == "held out" else "in step 1") in said
    assert "use --gradient-checkpointing" in said
    assert "weights" not in said


def test_an_encoder_whose_weights_do_not_fit_says_so_with_what_it_takes(encoder, monkeypatch):
    tried = []

    def too_large(self, *given):
        tried.append(given)
        raise TOO_MUCH

    monkeypatch.setattr(torch.nn.Module, "to", too_large)
    with pytest.raises(OutOfMemory) as caught:
        load_any(encoder, resolution=96, dtype=torch.float32, device="cpu")
    said = one_line(caught)
    assert said.startswith(f"out of memory while loading teacher {encoder}; its weights do not fit: use --dtype bfloat")
    assert "--quantize" not in said  # which it refuses
    assert len(tried) == 1


def test_a_pass_of_an_encoder_that_does_not_fit_is_told_what_an_encoder_takes(
    encoder, tiny_dataset, tmp_path, monkeypatch
):
    teacher = load_any(encoder, resolution=96, dtype=torch.float32, device="cpu")
    monkeypatch.setattr(TimmEncoder, "encode", lambda self, pixels, taps: (_ for _ in ()).throw(TOO_MUCH))
    config = BuildConfig(
        taps=("tokens",), num_steps=1, timesteps=(1,), text="none", encoding="float32", image_size=32, batch="auto"
    )
    with pytest.raises(OutOfMemory) as caught:
        build(teacher, tiny_dataset, config, tmp_path / "c", log=str)
    assert one_line(caught).endswith(
        "1 image at 1 timestep; use --dtype bfloat16, a smaller --resolution or a larger device"
    )
