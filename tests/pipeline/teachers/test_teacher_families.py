"""Every family keeps the protocol: taps, early exit, LoRA, batches, Stage I and the cache build."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_teachers import direct_features, encode_conditions, save_tiny_klein, save_tiny_sd3

from cache_schema import open_cache
from cache_schema.care.verify import verify
from pipeline.build.config import BuildConfig
from pipeline.build.run import build
from pipeline.curriculum import add_noise
from pipeline.refine import RefineConfig, cdr_loss, refine
from pipeline.teachers import load_teacher, outline_teacher
from pipeline.teachers.base import TeacherError
from pipeline.teachers.lora import add_lora

FAMILIES: dict[str, Callable[[Path], Path]] = {"flux2": save_tiny_klein, "sd3": save_tiny_sd3}
RESOLUTION = 64


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any):
    return load_teacher(str(folder), resolution=RESOLUTION, dtype=dtype, device="cpu", **options)


@pytest.fixture(scope="module")
def teacher(folder):
    return load(folder)


def inputs(teacher, batch=3):
    generator = torch.Generator().manual_seed(0)
    tokens, channels = teacher.tap_shape("velocity").tokens, teacher.tap_shape("velocity").channels
    clean, context, noise = (torch.randn(batch, tokens, channels, generator=generator) for _ in range(3))
    sigma = torch.linspace(0.1, 0.8, batch)
    captions = ["red crown, long tail", "", "blue wings"][:batch]
    return add_noise(clean, noise, sigma), context, sigma, teacher.encode_text(captions)


def all_blocks(teacher):
    """Every block of the transformer in running order, found without asking the teacher."""
    return [
        module
        for name, module in teacher.transformer.named_modules()
        if re.fullmatch(r"(single_)?transformer_blocks\.\d+", name)
    ]


def object_half(teacher, tokens):
    """The object's places in the image tokens of a family."""
    rows, columns = teacher.grid
    if teacher.family == "sd3":  # the right half of a wide picture
        return tokens.reshape(len(tokens), rows, 2 * columns, -1)[:, :, columns:].flatten(1, 2)
    return tokens[:, : rows * columns]


def test_every_tap_equals_a_hook_on_the_full_forward_and_later_blocks_do_not_run(teacher):
    noisy, context, sigma, text = inputs(teacher)
    blocks, outputs = all_blocks(teacher), []
    hooks = [b.register_forward_hook(lambda m, i, o: outputs.append(o)) for b in blocks]
    with torch.no_grad():
        teacher.predict(noisy, context, sigma, text)
    for hook in hooks:
        hook.remove()
    assert len(outputs) == len(blocks)
    taps = teacher.taps()[:-1]
    assert len(taps) == len(blocks)
    for depth, tap in enumerate(taps):
        ran: list[int] = []
        hooks = [b.register_forward_pre_hook(lambda m, i, n=n, ran=ran: ran.append(n)) for n, b in enumerate(blocks)]
        found = teacher.features(noisy, context, sigma, text, [tap])
        for hook in hooks:
            hook.remove()
        whole = outputs[depth]
        images = whole[1] if isinstance(whole, tuple) else whole[:, text.tokens.shape[1] :]
        assert torch.equal(found[tap], object_half(teacher, images))
        assert ran == list(range(depth + 1))
        shape = teacher.tap_shape(tap)
        assert found[tap].shape == (3, shape.tokens, shape.channels)


def test_several_taps_are_read_in_one_pass_in_the_order_asked_for(teacher):
    noisy, context, sigma, text = inputs(teacher)
    taps = [*reversed(teacher.taps())]
    found = teacher.features(noisy, context, sigma, text, taps)
    assert list(found) == taps
    with torch.no_grad():
        assert torch.equal(found["velocity"], teacher.predict(noisy, context, sigma, text))


def test_a_batch_gives_what_its_images_give_alone(teacher):
    noisy, context, sigma, text = inputs(teacher)
    together = teacher.features(noisy, context, sigma, text, ["hidden", "velocity"])
    for i, caption in enumerate(["red crown, long tail", "", "blue wings"]):
        row = slice(i, i + 1)
        alone = teacher.features(
            noisy[row], context[row], sigma[row], teacher.encode_text([caption]), ["hidden", "velocity"]
        )
        for tap, tokens in alone.items():
            torch.testing.assert_close(together[tap][row], tokens, atol=1e-5, rtol=1e-5)


def test_half_precision_tells_the_same_story(folder, teacher, tiny_dataset):
    half = load(folder, torch.bfloat16)
    sigma = torch.tensor([0.3, 0.7])
    found = []
    for each in (teacher, half):
        c = encode_conditions(each, tiny_dataset, tiny_dataset.samples[:2], "canonical")
        found.append(each.features(c.object, c.context, sigma, c.text, ["hidden", "velocity"]))
    for tap, exact in found[0].items():
        assert found[1][tap].dtype == torch.bfloat16
        assert torch.cosine_similarity(exact, found[1][tap].float(), dim=-1).mean() > 0.99


def test_text_context_and_place_all_reach_the_object_tokens(teacher):
    noisy, context, sigma, text = inputs(teacher)
    [base] = teacher.features(noisy, context, sigma, text, ["hidden"]).values()
    other = teacher.encode_text(["green belly"] * 3)
    for changed in (
        (noisy, context, sigma, other),
        (noisy, context + 1, sigma, text),
        (noisy, None, sigma, text),
        (noisy, context.flip(1), sigma, text),
    ):
        [found] = teacher.features(*changed, ["hidden"]).values()
        assert not torch.allclose(base, found, atol=1e-3)


def test_an_unknown_tap_is_refused_with_the_taps_there_are(teacher):
    last = teacher.taps()[-3]
    with pytest.raises(TeacherError, match=rf"no tap 'double.99'; it has velocity, hidden.* and .*–{last[:-1]}\d"):
        teacher.tap_shape("double.99")


def test_the_lora_receives_gradients_only_through_the_object_tokens(folder, tiny_dataset):
    teacher = load(folder)
    parameters = add_lora(teacher.transformer, 4, seed=0)
    for parameter in parameters:  # B = 0 would hide half of the gradients
        parameter.data.normal_(0, 0.05)
    conditions = encode_conditions(teacher, tiny_dataset, tiny_dataset.samples[:2], "canonical")
    grads = []

    def watch(module, args, output):
        output.register_hook(grads.append)

    teacher.transformer.proj_out.register_forward_hook(watch)
    cdr_loss(teacher, conditions, torch.randn_like(conditions.object), torch.tensor([0.3, 0.7])).backward()
    image_grads = grads[0][:, -2 * teacher.tap_shape("hidden").tokens :]
    reached = object_half(teacher, image_grads)
    assert reached.abs().sum() > 0
    assert image_grads.count_nonzero() == reached.count_nonzero()
    # What feeds only text or context outputs of the last block is not reached; every other projection is.
    assert sum(p.grad is not None and bool(p.grad.any()) for p in parameters) > 0.8 * len(parameters)
    assert all(p.grad is None for n, p in teacher.transformer.named_parameters() if "lora" not in n)


def test_the_lora_adapts_every_attention_projection_and_nothing_else(folder):
    teacher = load(folder)
    linears = {n for n, m in teacher.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    add_lora(teacher.transformer, 2, seed=0)
    adapted = {n.split(".lora_A")[0] for n, p in teacher.transformer.named_parameters() if ".lora_A" in n}
    assert adapted == {n for n in linears if re.search(r"\.attn2?\.", n)}


def test_the_saved_lora_means_the_same_to_diffusers_and_to_the_build(folder, tiny_dataset, tmp_path):
    teacher = load(folder)
    for parameter in add_lora(teacher.transformer, 4, seed=0):
        parameter.data.normal_(0, 0.05)
    teacher.save_lora(tmp_path)
    c = encode_conditions(teacher, tiny_dataset, tiny_dataset.samples[:2], "canonical")
    sigma = torch.tensor([0.3, 0.7])
    with torch.no_grad():
        expected = teacher.predict(c.object, c.context, sigma, c.text)
        plain = load(folder).predict(c.object, c.context, sigma, c.text)
        built = load(folder, lora=tmp_path).predict(c.object, c.context, sigma, c.text)
        theirs = load(folder)
        theirs.transformer_pipe.load_lora_weights(tmp_path)
        loaded = theirs.predict(c.object, c.context, sigma, c.text)
    assert not torch.allclose(plain, expected, atol=1e-3)
    torch.testing.assert_close(loaded, expected)
    torch.testing.assert_close(built, expected, atol=1e-5, rtol=1e-4)


def test_stage_one_and_the_build_run_end_to_end(folder, teacher, tiny_dataset, tmp_path):
    config = RefineConfig(
        steps=12, batch=4, lr=1e-2, rank=4, validation_images=4, pictures_every=12, picture_images=1,
        gradient_checkpointing=True,
    )  # fmt: skip
    record = refine(load(folder), tiny_dataset, config, tmp_path / "lora", log=str)
    losses = [entry["validation_loss"] for entry in record["validation"]]
    assert losses[-1] < losses[0]
    refined = load(folder, lora=tmp_path / "lora")
    middle = teacher.taps()[1]
    settings = BuildConfig(
        taps=("hidden", middle, "velocity"), timesteps=(10, 28), image_size=32, encoding="float32", batch=3
    )
    manifest = build(refined, tiny_dataset, settings, tmp_path / "cache", log=str)
    assert verify(tmp_path / "cache") == []
    assert manifest.teacher.family == refined.family
    assert set(manifest.teacher.digests) == set(refined.digests())
    cache = open_cache(tmp_path / "cache")
    sample = next(s for s in tiny_dataset.samples if s.id == cache.samples["id"][0].as_py())
    sigmas = refined.sigmas(28)
    expected = direct_features(refined, tiny_dataset, [sample], settings, [sigmas[9], sigmas[27]])
    for tap in settings.taps:
        stored = cache.read([0], tap=tap).decode()
        torch.testing.assert_close(stored, expected[tap][:, 0], atol=1e-5, rtol=1e-5)


def test_an_outline_without_weights_has_the_shapes_of_the_loaded_teacher(folder, teacher, tmp_path):
    for name in ("model_index.json", "transformer/config.json", "vae/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / name, tmp_path / name)
    outline = outline_teacher(str(tmp_path), resolution=RESOLUTION)
    assert outline.architecture == teacher.architecture
    assert [outline.tap_shape(tap) for tap in teacher.taps()] == [teacher.tap_shape(tap) for tap in teacher.taps()]


@pytest.mark.parametrize(
    ("preset", "tokens", "hidden", "velocity", "last"),
    [
        ("flux2-klein", 1024, 3072, 128, "single.19"),
        ("flux2-klein-base", 1024, 3072, 128, "single.19"),
        ("sd35-medium", 1024, 1536, 64, "block.23"),
        ("sd35-large", 1024, 2432, 64, "block.37"),
    ],
)
def test_a_preset_can_be_estimated_without_a_download(preset, tokens, hidden, velocity, last):
    outline = outline_teacher(preset)
    assert outline.tap_shape("velocity").channels == velocity
    assert outline.tap_shape(last) == replace(outline.tap_shape("hidden"), name=last)
    assert (outline.tap_shape("hidden").tokens, outline.tap_shape("hidden").channels) == (tokens, hidden)
