"""The memory budget counts the real classes at their real size, and its activations are those a real run would have."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_teachers import save_tiny_klein, save_tiny_sd3
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from pipeline.build.config import BuildConfig
from pipeline.cli import app
from pipeline.estimate.memory import (
    MemorySettings,
    build_phase,
    latents_phase,
    memory_budget,
    refine_phases,
    text_phase,
)
from pipeline.inputs.conditions import Conditions
from pipeline.refine.loss import cdr_loss
from pipeline.teachers import PRESETS, TeacherError, load_teacher, outline_teacher
from pipeline.teachers.base import TextEmbedding
from pipeline.teachers.lora import add_lora
from pipeline.teachers.weightless import weightless_teacher

FLUX = {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656, "text_encoder": 123_060_480, "vae": 83_819_683}
KLEIN = {"transformer": 3_875_544_576, "text_encoder": 4_022_468_096, "vae": 84_046_115}
SD35_LARGE = {"transformer": 8_056_627_520, "text_encoder_3": 4_762_310_656, "text_encoder_2": 694_659_840}
BFLOAT16 = MemorySettings(torch.bfloat16, limit=24_000_000_000)


def weightless(spec, dtype=torch.bfloat16, **options):
    return weightless_teacher(outline_teacher(str(spec), **options), dtype)


def activations(phase):
    return next(size for what, size in phase.device.items() if what.startswith("activations"))


@pytest.mark.parametrize(
    ("preset", "published"), [("flux-kontext", FLUX), ("flux2-klein-base", KLEIN), ("sd35-large", SD35_LARGE)]
)
def test_the_components_have_as_many_parameters_as_those_published(preset, published):
    teacher = weightless(preset)
    modules = {**teacher.text_pipe.components, "transformer": teacher.transformer, "vae": teacher.vae}
    assert {name: sum(p.numel() for p in modules[name].parameters()) for name in published} == published


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.published])
def test_a_published_transformer_is_one_that_its_family_knows(preset):
    teacher = weightless(preset)
    transformer = teacher.transformer
    blocks = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]
    assert len(blocks) == len(teacher.architecture.taps())


def test_flux_at_its_real_size_needs_8_bits_on_a_device_of_24_gb():
    teacher = weightless("flux-kontext")
    build = build_phase(teacher, BuildConfig(batch=4))
    assert build.device["transformer"] == 2 * FLUX["transformer"]
    assert build.total > BFLOAT16.limit > build.total - FLUX["transformer"]
    assert build.host == {"features of two shards": 2 * 4 * 4 * 1024 * 3072 * 2}  # rows, timesteps, tokens, channels
    # A batch of sixteen rows keeps at least the sequence of text and image tokens of each, some times over.
    assert activations(build) > 5 * 16 * (512 + 2 * 1024) * 3072 * 2
    shallow = build_phase(teacher, BuildConfig(batch=4, taps=("double.0",)))
    assert activations(shallow) <= activations(build)
    kept, recomputed = refine_phases(teacher, BFLOAT16)
    assert kept.device["LoRA of rank 16"] == 4 * 26_148_864
    assert kept.device["moments of Adam"] == 2 * kept.device["gradients"] == 2 * 4 * 26_148_864
    assert 5 * activations(recomputed) < activations(kept)


def test_text_and_latents_have_phases_of_their_own():
    teacher = weightless("flux-dev")
    text = text_phase(teacher)
    weights = sum(size for what, size in text.device.items() if what.startswith("text_encoder"))
    positions = 77 * 8
    assert weights == 2 * (FLUX["text_encoder"] + FLUX["text_encoder_2"]) + positions
    # T5 scores every pair of 512 tokens in each of its 64 heads.
    assert activations(text) > 64 * 512 * 512 * 2
    latents = latents_phase(teacher)
    assert latents.device["vae"] == 2 * FLUX["vae"]
    assert activations(latents) > 2 * 128 * 512 * 512 * 2  # one layer of the encoder in, one out


@pytest.fixture(scope="module")
def folders(flux_folder, tmp_path_factory):
    base = tmp_path_factory.mktemp("families")
    return {
        "flux": flux_folder,
        "flux2": save_tiny_klein(base / "klein"),
        "sd3": save_tiny_sd3(base / "sd3"),
    }


def allocated_peak(run):
    """The most bytes that PyTorch's CPU allocator had given out beyond those it had when `run` began."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def real_inputs(teacher, images, steps=1):
    """Conditions, rows and their σ as `pipeline.estimate.memory` measures with, and their bytes."""
    shape = teacher.tap_shape("velocity")
    clean, context = torch.randn(2, images, shape.tokens, shape.channels, dtype=teacher.dtype)
    rows = torch.randn(images * steps, shape.tokens, shape.channels, dtype=teacher.dtype)
    config = teacher.transformer.config
    text = TextEmbedding(
        torch.randn(images, teacher.text_length, config.joint_attention_dim, dtype=teacher.dtype),
        torch.randn(images, config.get("pooled_projection_dim") or 0, dtype=teacher.dtype),
    )
    size = sum(t.nbytes for t in (clean, context, rows, text.tokens, text.pooled))
    return Conditions(clean, context, text), rows, torch.rand(images * steps), size


# In float32, as the CPU's bfloat16 kernels work on copies of their own.
@pytest.mark.parametrize(("family", "resolution"), [("flux", 96), ("flux2", 128), ("sd3", 96)])
def test_activations_of_a_build_are_what_the_allocator_really_gives_out(family, resolution, folders):
    options = {"resolution": resolution}
    config = BuildConfig(batch=2, timesteps=(10, 28))
    measured = activations(build_phase(weightless(folders[family], torch.float32, **options), config))
    teacher = load_teacher(str(folders[family]), dtype=torch.float32, device="cpu", **options)
    conditions, noisy, sigma, size = real_inputs(teacher, 2, steps=2)

    def run():
        teacher.features(noisy, conditions.context, sigma, conditions.text, ["hidden"])

    # Clean latents go into the noise of a build before the DiT sees it.
    assert measured == pytest.approx(allocated_peak(run) + size - conditions.object.nbytes, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "resolution"), [("flux", 96), ("flux2", 128), ("sd3", 96)])
def test_activations_of_stage_one_are_what_the_allocator_really_gives_out(family, resolution, checkpointing, folders):
    options = {"resolution": resolution}
    settings = MemorySettings(torch.float32, limit=1, refine_batch=4)
    phase = refine_phases(weightless(folders[family], torch.float32, **options), settings)[checkpointing]
    teacher = load_teacher(str(folders[family]), dtype=torch.float32, device="cpu", **options)
    trained = add_lora(teacher.transformer, 16, 0)
    if checkpointing:
        teacher.transformer.enable_gradient_checkpointing()
    conditions, noise, sigma, size = real_inputs(teacher, 4)

    def run():
        cdr_loss(teacher, conditions, noise, sigma).backward()

    peak = allocated_peak(run)
    assert phase.device["gradients"] == sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert 0.97 < activations(phase) / (peak + size) < 1.08  # rather too much than too little


def test_what_does_not_fit_is_a_warning_with_what_would_do(flux_folder):
    outline = outline_teacher(str(flux_folder), resolution=96)
    config = BuildConfig(batch=8, timesteps=(10, 28))
    build = build_phase(weightless_teacher(outline, torch.bfloat16), config)
    roomy = MemorySettings(torch.float32, limit=100_000_000)
    assert memory_budget(outline, config, roomy)["warnings"] == []
    tight = MemorySettings(torch.bfloat16, limit=build.total - 1)
    budget = memory_budget(outline, config, tight)
    phase = next(p for p in budget["phases"] if p["name"] == "build")
    assert not phase["fits"]
    assert any(w.startswith("build needs") and w.endswith("--batch 4 would do") for w in budget["warnings"])
    hopeless = memory_budget(outline, config, MemorySettings(torch.float32, limit=10_000))
    assert [w.split()[0] for w in hopeless["warnings"]] == ["text", "latents", "build", "refine"]
    assert ["--offload" in w for w in hopeless["warnings"]] == [True, False, True, False]
    automatic = memory_budget(outline, replace(config, batch="auto"), tight)
    assert any("4 images × 2" in what for p in automatic["phases"] for what in p["device"])


def test_a_folder_whose_components_are_not_described_is_refused_with_what_is_missing(flux_folder, tmp_path):
    folder = shutil.copytree(flux_folder, tmp_path / "flux", ignore=shutil.ignore_patterns("*.safetensors"))
    assert weightless(folder).text_pipe.text_encoder.device.type == "meta"  # weights are not needed
    (folder / "text_encoder/config.json").unlink()
    with pytest.raises(TeacherError, match=r"no text_encoder/config.json there"):
        _ = weightless(folder).text_pipe
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "NoSuchAutoencoder"]}))
    with pytest.raises(TeacherError, match=r"no diffusers.NoSuchAutoencoder for vae/config.json"):
        _ = weightless(folder).vae


def test_the_command_adds_the_budget_only_when_asked(flux_folder):
    options = ("estimate", "--images", "10", "--teacher", str(flux_folder), "--resolution", "96", "--timesteps", "28")
    assert "memory" not in json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    done = CliRunner().invoke(app, [*options, "--memory", "24", "--json"])
    budget = json.loads(done.stdout)["memory"]
    assert not done.stderr
    assert budget["dtype"] == "bfloat16"
    assert [p["name"] for p in budget["phases"]][:3] == ["text", "latents", "build"]
    text = CliRunner().invoke(app, [*options, "--memory", "0.001", "--device", "cpu"])
    assert "phase after phase; float32" in text.stdout
    assert "does not fit" in text.stdout
    assert "warning: build needs" in text.stderr
