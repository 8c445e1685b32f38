"""8-bit weights, offloaded blocks and compiled blocks give the features of the plain teacher, at the taps asked for."""

import sys

import pytest
import torch
from tiny_teachers import save_tiny_klein, save_tiny_sd3
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from typer.testing import CliRunner

from cache_schema.errors import DitDistillError
from pipeline.build.config import BuildConfig
from pipeline.build.run import build
from pipeline.chain.steps import refine_teacher
from pipeline.cli import app
from pipeline.config import make_config
from pipeline.estimate.tensor_memory import module_bytes, storages
from pipeline.inputs.conditions import Conditions
from pipeline.refine import RefineConfig, refine
from pipeline.refine.loss import cdr_loss
from pipeline.teachers import TeacherError, load_teacher, outline_teacher
from pipeline.teachers.loading import Loading
from pipeline.teachers.lora import add_lora
from pipeline.teachers.offloading import offload_text_encoder, offload_transformer
from pipeline.teachers.weightless import weightless_teacher

CPU = torch.device("cpu")
VALUES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# Cosine of tokens to those of the plain weights: 8 bits of integer are finer than 3 bits of mantissa.
CLOSE = {"int8": 0.999, "fp8": 0.99}


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao", reason="torchao, of the extra pipeline, is not installed")


@pytest.fixture(scope="module")
def folders(flux_folder, tmp_path_factory):
    base = tmp_path_factory.mktemp("families")
    return {"flux": flux_folder, "flux2": save_tiny_klein(base / "klein"), "sd3": save_tiny_sd3(base / "sd3")}


@pytest.fixture
def load(folders):
    def load(family="flux", dtype=torch.float32, **options):
        side = 64 if family == "flux2" else 32
        return load_teacher(str(folders[family]), resolution=side, dtype=dtype, device="cpu", **options)

    return load


def inputs(teacher, images=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = teacher.tap_shape("velocity")
    noisy, context = torch.randn(2, images, shape.tokens, shape.channels, generator=generator)
    return noisy, context, torch.linspace(0.2, 0.8, images), teacher.encode_text(["red crown"] * images)


def features(teacher, taps, given=None):
    return teacher.features(*(given or inputs(teacher)), taps)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("family", ["flux", "flux2", "sd3"])
def test_quantised_linear_layers_are_8_bits_in_memory_and_close_in_what_they_compute(family, kind, load, torchao):
    plain, quantised = load(family), load(family, loading=Loading(kind))
    linears = [m for m in quantised.transformer.modules() if isinstance(m, torch.nn.Linear)]
    assert linears
    for linear in linears:
        assert is_traceable_wrapper_subclass(linear.weight)
        assert linear.weight.numel() <= sum(s.nbytes() for s in storages([linear.weight]).values())
        assert linear.weight.qdata.dtype == VALUES[kind]
    assert module_bytes(quantised.transformer) < 0.5 * module_bytes(plain.transformer)
    given = inputs(plain)
    expected, found = features(plain, ["hidden"], given)["hidden"], features(quantised, ["hidden"], given)["hidden"]
    assert not torch.equal(expected, found)
    assert cosine_similarity(expected, found, dim=-1).mean() > CLOSE[kind]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_budget_counts_quantised_weights_as_they_are_loaded(kind, load, folders, torchao):
    loaded = load(dtype=torch.bfloat16, loading=Loading(kind))
    counted = weightless_teacher(outline_teacher(str(folders["flux"]), resolution=32), torch.bfloat16, kind)
    assert module_bytes(counted.transformer) == module_bytes(loaded.transformer)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_gradients_reach_a_lora_through_quantised_weights(kind, load, torchao):
    def gradients(loading):
        teacher = load(loading=loading)
        parameters = add_lora(teacher.transformer, rank=4, seed=0)
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 10)
        noisy, context, sigma, text = inputs(teacher)
        cdr_loss(teacher, Conditions(noisy, context, text), torch.zeros_like(noisy), sigma).backward()
        assert not any(p.requires_grad for n, p in teacher.transformer.named_parameters() if "lora" not in n)
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    expected, found = gradients(Loading()), gradients(Loading(kind))
    assert cosine_similarity(expected, found, dim=0) > 0.98


def test_stage_one_on_8_bits_makes_a_lora_for_either_precision(load, tiny_dataset, tmp_path, torchao):
    config = RefineConfig(steps=2, rank=2, lr=0.1, validation_images=2, checkpoint_every=1)
    record = refine(load(loading=Loading("int8")), tiny_dataset, config, tmp_path / "lora", log=str)
    assert record["quantization"] == "int8"
    plain = load()
    assert record["transformer_digest"] == plain.digests()["transformer"]  # of the file, whatever it is loaded as
    given = inputs(plain)
    for loading in (Loading(), Loading("int8")):
        without, with_lora = (
            features(load(loading=loading, lora=lora), ["hidden"], given)["hidden"]
            for lora in (None, tmp_path / "lora")
        )
        assert not torch.allclose(without, with_lora, atol=1e-3)
    with pytest.raises(DitDistillError, match="quantization was int8, now it is None"):
        refine(load(), tiny_dataset, config, tmp_path / "lora", log=str)


def test_a_cache_of_8_bit_weights_is_another_cache(load, tiny_dataset, tmp_path, torchao):
    config = BuildConfig(timesteps=(28,), image_size=32, batch=8)
    sealed = {
        name: build(load(loading=loading), tiny_dataset, config, tmp_path / name, log=str)
        for name, loading in {"plain": Loading(), "int8": Loading("int8")}.items()
    }
    assert sealed["int8"].teacher.quantization == "int8"
    assert sealed["plain"].teacher.quantization is None
    assert sealed["int8"].cache_id != sealed["plain"].cache_id
    assert sealed["int8"].teacher.digests == sealed["plain"].teacher.digests


def test_without_torchao_quantising_says_what_to_install(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(TeacherError, match="--quantize int8 needs torchao"):
        _ = load(loading=Loading("int8")).transformer


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("family", ["flux", "flux2", "sd3"])
def test_offloaded_blocks_are_read_at_every_tap_and_left_early(family, kind, load, request):
    if kind:
        request.getfixturevalue("torchao")
    plain, offloaded = load(family, loading=Loading(kind)), load(family, loading=Loading(kind))
    # Onto the device it is on: the hooks are diffusers' own, only the copies move nothing.
    offload_transformer(offloaded.transformer, offloaded._blocks(), CPU)
    given = inputs(plain)
    blocks = offloaded._blocks()
    ran = []
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    for tap in [*plain.taps()[::-1], *plain.taps()]:
        ran.clear()
        assert torch.equal(features(offloaded, [tap], given)[tap], features(plain, [tap], given)[tap])
        deepest = len(blocks) - 1 if tap == "velocity" else plain.architecture.block(tap, "")
        assert ran == list(range(deepest + 1))


@pytest.mark.parametrize("family", ["flux", "flux2", "sd3"])
def test_offloaded_text_encoders_embed_the_same(family, load):
    plain, offloaded = load(family), load(family)
    for module in offloaded.text_pipe.components.values():
        if isinstance(module, torch.nn.Module):
            offload_text_encoder(module, CPU)
    expected, found = (teacher.encode_text(["blue tail", "a"]) for teacher in (plain, offloaded))
    assert torch.equal(expected.tokens, found.tokens)
    assert torch.equal(expected.pooled, found.pooled)


@pytest.mark.parametrize("command", ["build", "probe"])
def test_offloading_on_a_cpu_is_refused_in_one_line(command, tmp_path):
    with pytest.raises(TeacherError, match=r"^--offload keeps weights in main memory[^\n]*leave it out$"):
        CliRunner().invoke(
            app, [command, "--limit", "2", "--device", "cpu", "--offload", "--output", str(tmp_path)],
            catch_exceptions=False,
        )  # fmt: skip


def test_compiled_blocks_are_read_at_any_tap_in_any_order(load):
    torch._dynamo.utils.counters.clear()
    plain, compiled = load(), load(loading=Loading(compile=True))
    given = inputs(plain)
    # Only the first of the two kinds of blocks: the compiler takes its time.
    for taps in (["double.1"], ["double.0"], ["double.1", "double.0"], ["double.1.modulated"],
                 ["double.1.modulated", "double.0"], ["double.1", "double.1.modulated"]):  # fmt: skip
        expected, found = features(plain, taps, given), features(compiled, taps, given)
        for tap in taps:
            torch.testing.assert_close(found[tap], expected[tap], atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_stage_one_is_not_compiled_around_8_bits(tmp_path):
    with pytest.raises(DitDistillError, match="leave out --compile or --quantize"):
        refine_teacher(make_config("demo", teacher__quantize="int8", teacher__compile=True), tmp_path)


def test_without_a_compiler_compiling_says_what_is_missing(load, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(TeacherError, match=r"--compile needs a C\+\+ compiler"):
        load(loading=Loading(compile=True))
