"""Stage I keeps its activations where they fit, says which it does and why, and does as it is told."""

import pytest
import torch

from pipeline.estimate.activations import MARGIN, recomputes
from pipeline.estimate.memory import MemorySettings, refine_phase
from pipeline.refine import RefineConfig, refine
from pipeline.teachers import load_teacher, outline_teacher
from pipeline.teachers.weightless import weightless_teacher


@pytest.fixture
def teacher(flux_folder):
    return load_teacher(str(flux_folder), resolution=96, dtype=torch.float32, device="cpu")


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(free, reserved, allocated)`: bytes of the device that the next teacher is on."""

    def make(free, reserved=0, allocated=0):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)

    return make


def needed(flux_folder, **settings):
    outlined = weightless_teacher(outline_teacher(str(flux_folder), resolution=96), torch.float32)
    phase = refine_phase(outlined, MemorySettings(torch.float32, limit=0, **settings), recompute=False)
    return round(MARGIN * phase.total)


def test_on_a_gpu_activations_are_kept_exactly_where_a_step_fits(teacher, flux_folder, gpu):
    teacher.device, said = torch.device("cuda:0"), []
    config, size = RefineConfig(batch=3, rank=4), needed(flux_folder, rank=4, refine_batch=3)
    gpu(free=size - 50, reserved=100, allocated=50)
    assert not recomputes(teacher, config, said.append)
    gpu(free=size - 51, reserved=100, allocated=50)
    assert recomputes(teacher, config, said.append)
    assert said[0].startswith("activations are kept: a step that keeps them needs ")
    assert said[1].startswith("activations are computed twice (gradient checkpointing): a step that keeps them needs ")
    assert said[1].endswith("free")


def test_a_lora_on_more_layers_needs_more(flux_folder):
    assert needed(flux_folder, lora_targets="attention+ff") > needed(flux_folder)


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_asked_for_is_done_whatever_is_free(teacher, gpu, asked):
    teacher.device, said = torch.device("cuda:0"), []
    gpu(free=0 if not asked else 10**12)
    assert recomputes(teacher, RefineConfig(gradient_checkpointing=asked), said.append) is asked
    assert said[0].endswith("as asked")


def test_on_a_cpu_activations_are_kept(teacher):
    said = []
    assert not recomputes(teacher, RefineConfig(), said.append)
    assert said == ["activations are kept: nothing was asked, and this is no GPU but cpu"]


@pytest.mark.parametrize("recompute", [True, False])
def test_a_run_does_what_was_decided_before_its_transformer_was_loaded(
    flux_folder, tiny_dataset, tmp_path, monkeypatch, recompute
):
    teacher = load_teacher(str(flux_folder), resolution=32, dtype=torch.float32, device="cpu")
    seen = []

    def decide():
        assert "transformer" not in teacher._parts
        return recompute

    config = RefineConfig(steps=1, rank=2, validation_images=2, pictures_every=0, checkpoint_every=0)
    original = type(teacher).predict
    monkeypatch.setattr(
        type(teacher), "predict",
        lambda self, *given: seen.append(self.transformer.is_gradient_checkpointing) or original(self, *given),
    )  # fmt: skip
    refine(teacher, tiny_dataset, config, tmp_path / "lora", recomputes=decide, log=str)
    assert set(seen) == {recompute}
