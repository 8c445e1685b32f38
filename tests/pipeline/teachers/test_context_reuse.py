"""A reused context is computed once per image, read by every timestep, and is what diffusers' own pipeline computes."""

import gc
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from build_process import contents
from cache_building import some_examples
from diffusers import Flux2KleinKVPipeline
from diffusers.models.transformers.transformer_flux2 import Flux2KVLayerCache
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_teachers import QWEN_TOKENS, direct_features, encode_conditions, save_tiny_klein, save_tiny_sd3
from typer.testing import CliRunner

from cache_schema import open_cache
from cache_schema.errors import CacheMismatch, DitDistillError
from cache_schema.format.manifest_file import load_manifest
from cache_schema.storage.local import LocalFolder
from cache_schema.writing.writer import CacheWriter
from pipeline.build.config import BuildConfig
from pipeline.build.run import build
from pipeline.cli import app
from pipeline.curriculum import add_noise
from pipeline.refine import RefineConfig, cdr_loss, refine
from pipeline.teachers import load_teacher
from pipeline.teachers.base import TeacherError
from pipeline.teachers.lora import RECORD_NAME, add_lora
from pipeline.teachers.passes import Passes

RESOLUTION = 64  # the pipeline takes no smaller reference image; 4 × 4 tokens here
L = 16
CAPTION = "red body, long beak"
REFINE = RefineConfig(steps=2, batch=2, rank=2, validation_images=2)
BUILD = BuildConfig(timesteps=(10, 28), image_size=16, encoding="float32", batch=3, samples_per_shard=6)


@pytest.fixture(scope="module")
def kv_folder(tmp_path_factory) -> Path:
    return save_tiny_klein(tmp_path_factory.mktemp("klein-kv"), pipeline=Flux2KleinKVPipeline)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_klein(tmp_path_factory.mktemp("klein"))


def load(folder, **options):
    return load_teacher(str(folder), **{"resolution": RESOLUTION, "dtype": torch.float32, "device": "cpu"} | options)


@pytest.fixture(scope="module")
def teacher(kv_folder):
    return load(kv_folder)


@pytest.fixture(scope="module")
def joint(folder):
    return load(folder)


def inputs(teacher, images=3, steps=2):
    """Noisy rows with the timesteps of an image in a run, σ of every row, and the images' contexts and texts."""
    generator = torch.Generator().manual_seed(0)
    clean, context, noise = (torch.randn(images, L, 16, generator=generator) for _ in range(3))
    sigma = torch.linspace(0.1, 0.8, images * steps)
    noisy = add_noise(clean.repeat_interleave(steps, 0), noise.repeat_interleave(steps, 0), sigma)
    captions = ["red crown, long tail", "", "blue wings"][:images]
    return noisy, context, sigma, teacher.encode_text(captions)


def blocks_of(teacher):
    """Every block of the transformer in running order, found without asking the teacher."""
    return [
        module
        for name, module in teacher.transformer.named_modules()
        if re.fullmatch(r"(single_)?transformer_blocks\.\d+", name)
    ]


class Calls:
    """What every block was given while the body of the `with` ran: (its depth, rows, tokens of text and images)."""

    def __init__(self, teacher):
        self.blocks, self.seen = blocks_of(teacher), []

    def __enter__(self):
        def watch(depth):
            def hook(_module, _args, given):
                text = given["encoder_hidden_states"]
                tokens = given["hidden_states"].shape[1] + (0 if text is None else text.shape[1])
                self.seen.append((depth, len(given["hidden_states"]), tokens))

            return hook

        self.hooks = [b.register_forward_pre_hook(watch(n), with_kwargs=True) for n, b in enumerate(self.blocks)]
        return self.seen

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def test_velocity_is_minus_what_diffusers_pipeline_predicts_with_and_without_its_cache(kv_folder, teacher):
    image = Image.fromarray(np.random.default_rng(3).integers(0, 255, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8))
    pipe = Flux2KleinKVPipeline.from_pretrained(kv_folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    pipe(
        image=image, prompt=CAPTION, height=RESOLUTION, width=RESOLUTION, num_inference_steps=28, output_type="latent",
        max_sequence_length=QWEN_TOKENS, generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    assert [given["kv_cache_mode"] for given, _ in calls] == ["extract", *["cached"] * 27]

    text = teacher.encode_text([CAPTION])
    context = teacher.encode_images(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
    torch.testing.assert_close(calls[0][0]["hidden_states"][:, :L], context, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(calls[0][0]["encoder_hidden_states"], text.tokens, atol=1e-5, rtol=1e-5)
    steps = (1, 10, 16, 22, 28)  # the pipeline computes the context in the first and reads it in the others
    noisy = torch.cat([calls[p - 1][0]["hidden_states"][:, -L:] for p in steps])
    sigma = torch.tensor([teacher.sigmas(28)[p - 1] for p in steps])
    torch.testing.assert_close(sigma, torch.cat([calls[p - 1][0]["timestep"] for p in steps]))
    ours = teacher.features(noisy, context, sigma, text, ["velocity"])["velocity"]
    torch.testing.assert_close(ours, -torch.cat([calls[p - 1][1] for p in steps]), atol=1e-5, rtol=1e-5)


def test_every_tap_is_what_each_row_gives_alone_in_one_pass_with_its_context(teacher):
    noisy, context, sigma, text = inputs(teacher)
    found = teacher.features(noisy, context, sigma, text, teacher.taps())
    for row in range(len(noisy)):
        image, outputs = slice(row // 2, row // 2 + 1), []
        hooks = [b.register_forward_hook(lambda m, i, o, s=outputs: s.append(o)) for b in blocks_of(teacher)]
        with torch.no_grad(), Calls(teacher) as calls:
            alone = teacher.predict(noisy[row : row + 1], context[image], sigma[row : row + 1], text.rows(image))
        for hook in hooks:
            hook.remove()
        # Text, context and object in one sequence: diffusers' own pass, in which nothing is reused.
        assert {tokens for _, _, tokens in calls} == {text.tokens.shape[1] + 2 * L}
        expected = [(o[1] if isinstance(o, tuple) else o)[:, -L:] for o in outputs]
        for tap, tokens in zip(teacher.taps(), [*expected, alone], strict=True):
            torch.testing.assert_close(found[tap][row : row + 1], tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("taps", "depth"), [(["double.0"], 0), (["single.0", "double.1"], 2), (["velocity"], 3)])
def test_the_context_runs_once_per_image_and_no_block_behind_the_deepest_tap_runs(teacher, taps, depth):
    noisy, context, sigma, text = inputs(teacher, images=3, steps=2)
    with Calls(teacher) as calls:
        teacher.features(noisy, context, sigma, text, taps)
    context_pass = [(n, 3, 1 + L) for n in range(depth + 1)]  # a token stands in for the text
    noisy_pass = [(n, 6, text.tokens.shape[1] + L) for n in range(depth + 1)]
    assert calls == [*context_pass, *noisy_pass]


@some_examples
@given(reused=st.booleans(), steps=st.integers(1, 4), batch=st.integers(1, 4), most=st.integers(1, 13))
def test_a_batch_may_go_through_the_transformer_in_passes_of_any_size(teacher, joint, reused, steps, batch, most):
    teacher = teacher if reused else joint
    noisy, context, sigma, text = inputs(teacher, images=3, steps=steps)
    together = teacher.features(noisy, context, sigma, text, ["hidden", "velocity"])

    def forward(images: slice, timesteps: slice) -> dict[str, torch.Tensor]:
        rows = [i * steps + t for i in range(3)[images] for t in range(steps)[timesteps]]
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. ")
        given = noisy[rows], context[images], sigma[rows], text.rows(images)
        return teacher.features(*given, ["hidden", "velocity"])

    with Calls(teacher) as calls:
        found = Passes(batch, steps, adaptive=True, log=str).run(3, forward)
    for tap, tokens in found.items():
        torch.testing.assert_close(tokens.flatten(0, 1), together[tap], atol=1e-5, rtol=1e-5)
    first = [call for call in calls if call[0] == 0]
    contexts = [n for _, n, tokens in first if tokens == 1 + L]
    noisy_rows = [n for _, n, tokens in first if tokens != 1 + L]
    assert sum(noisy_rows) == 3 * steps
    assert max(noisy_rows) <= min(most, batch * steps)
    # Once per image, wherever the timesteps of an image fit into one pass.
    assert not reused or most < steps or sum(contexts) == 3


def test_keys_and_values_are_gone_when_the_features_are_there(teacher):
    noisy, context, sigma, text = inputs(teacher)
    gc.collect()
    gc.disable()  # nothing may wait for the collector: on a GPU these are gigabytes
    try:
        found = teacher.features(noisy, context, sigma, text, ["double.1"])
        left = [o for o in gc.get_objects() if isinstance(o, Flux2KVLayerCache)]
    finally:
        gc.enable()
    assert found["double.1"].shape == (6, L, 32)
    assert left == []


def test_text_context_and_its_places_all_reach_the_object_tokens(teacher, joint):
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
    # The same weights with a joint context are another teacher.
    [found] = joint.features(noisy, context, sigma, text, ["hidden"]).values()
    assert not torch.allclose(base, found, atol=1e-3)


def test_the_lora_learns_through_the_context_and_checkpointing_changes_no_gradient(folder, tiny_dataset):
    grads = []
    for checkpointing in (False, True):
        teacher = load(folder, context="reused")
        parameters = add_lora(teacher.transformer, 2, seed=0)
        for place, parameter in enumerate(parameters):  # B = 0 would hide half of the gradients
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place)) / 20
        if checkpointing:
            teacher.transformer.enable_gradient_checkpointing()
        c = encode_conditions(teacher, tiny_dataset, tiny_dataset.samples[:2], "canonical")
        c = replace(c, context=c.context.requires_grad_())
        noise = torch.randn(c.object.shape, generator=torch.Generator().manual_seed(0))
        cdr_loss(teacher, c, noise, torch.tensor([0.3, 0.7])).backward()
        grads.append([c.context.grad, *(p.grad for p in parameters)])
    plain, again = grads
    assert bool(plain[0].any())
    assert sum(grad is not None and bool(grad.any()) for grad in plain) > 0.8 * len(plain)
    for one, two in zip(plain, again, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(two, one)


def test_stage_one_and_the_build_compute_the_same_with_a_reused_context(folder, tiny_dataset, tmp_path):
    record = refine(load(folder, context="reused"), tiny_dataset, replace(REFINE, lr=1e-2), tmp_path, log=str)
    assert record["context"] == "reused"
    assert "| context | reused |" in (tmp_path / "README.md").read_text()
    refined = load(folder, context="reused", lora=tmp_path)
    c = encode_conditions(refined, tiny_dataset, tiny_dataset.samples[:2], "canonical")
    sigma = torch.tensor([0.3, 0.7])
    theirs = load(folder, context="reused")
    theirs.transformer_pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        trained = theirs.predict(c.object, c.context, sigma, c.text)
    [built] = refined.features(c.object, c.context, sigma, c.text, ["velocity"]).values()
    torch.testing.assert_close(built, trained, atol=1e-5, rtol=1e-5)


def test_a_cache_of_reused_contexts_has_an_id_of_its_own_and_resumes(
    folder, joint, tiny_dataset, tmp_path, monkeypatch
):
    reused = load(folder, context="reused")
    whole = build(reused, tiny_dataset, BUILD, tmp_path / "reused", log=str)
    other = build(joint, tiny_dataset, BUILD, tmp_path / "joint", log=str)
    assert (whole.teacher.context, other.teacher.context) == ("reused", "joint")
    assert whole.teacher.digests == other.teacher.digests
    assert whole.cache_id != other.cache_id
    with pytest.raises(CacheMismatch, match=r"teacher\.context"):
        build(joint, tiny_dataset, BUILD, tmp_path / "reused", log=str)

    cache = open_cache(tmp_path / "reused")
    sample = next(s for s in tiny_dataset.samples if s.id == cache.samples["id"][0].as_py())
    sigmas = reused.sigmas(28)
    [expected] = direct_features(reused, tiny_dataset, [sample], BUILD, [sigmas[9], sigmas[27]]).values()
    torch.testing.assert_close(cache.read([0], tap="hidden").decode(), expected[:, 0], atol=1e-5, rtol=1e-5)

    write = CacheWriter.write_shard

    def fail_at_the_third(self, shard, *arguments):
        if shard == 2:
            raise OSError("the disk is gone")
        write(self, shard, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", fail_at_the_third)
        with pytest.raises(OSError, match="the disk is gone"):
            build(reused, tiny_dataset, BUILD, tmp_path / "cut", log=str)
    assert not load_manifest(LocalFolder(tmp_path / "cut")).sealed
    build(reused, tiny_dataset, BUILD, tmp_path / "cut", log=str)
    assert contents(tmp_path / "cut") == contents(tmp_path / "reused")


@pytest.mark.parametrize(("made", "wanted"), [("joint", "reused"), ("reused", "joint")])
def test_a_lora_refined_with_one_kind_of_context_is_refused_with_the_other(
    folder, tiny_dataset, tmp_path, made, wanted
):
    refine(load(folder, context=made), tiny_dataset, REFINE, tmp_path, log=str)
    assert load(folder, context=made, lora=tmp_path).context == made
    with pytest.raises(TeacherError) as caught:
        load(folder, context=wanted, lora=tmp_path)
    line = f"LoRA {tmp_path} was refined with --context {made}, not {wanted}: use --context {made}, or refine again"
    assert str(caught.value) == line
    with pytest.raises(DitDistillError, match=f"context was {made}, now it is {wanted}"):
        refine(load(folder, context=wanted), tiny_dataset, REFINE, tmp_path, log=str)


def test_a_record_from_before_there_was_a_choice_means_a_joint_context(folder, tiny_dataset, tmp_path):
    refine(load(folder), tiny_dataset, REFINE, tmp_path, log=str)
    record = json.loads((tmp_path / RECORD_NAME).read_text())
    del record["context"], record["identity"]["context"]
    (tmp_path / RECORD_NAME).write_text(json.dumps(record))
    assert load(folder, lora=tmp_path).context == "joint"
    with pytest.raises(TeacherError, match="was refined with --context joint, not reused"):
        load(folder, context="reused", lora=tmp_path)
    assert refine(load(folder), tiny_dataset, REFINE, tmp_path, log=str) == record


def test_a_family_that_cannot_reuse_its_context_says_so_before_it_loads_anything(flux_folder, kv_folder, tmp_path):
    sd3 = save_tiny_sd3(tmp_path / "sd3")
    cases = {
        flux_folder: ("reused", "its context and noisy tokens attend to each other", "joint"),
        sd3: ("reused", "its context and noisy tokens attend to each other", "joint"),
        kv_folder: ("joint", "a Flux2KleinKVPipeline was trained with a context that never sees the noise", "reused"),
    }
    for folder, (asked, reason, instead) in cases.items():
        only_index = tmp_path / f"{folder.name}-index"
        only_index.mkdir()
        (only_index / "model_index.json").write_bytes((folder / "model_index.json").read_bytes())
        with pytest.raises(TeacherError) as caught:
            load(only_index, context=asked)
        line = str(caught.value)
        assert line.startswith(f"teacher {only_index}: {reason}")
        assert line.endswith(f"; use --context {instead}")
        assert "\n" not in line


def dit_cache(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300", "TERM": "dumb"})


def test_context_is_an_option_of_refine_probe_and_build(folder, tmp_path):
    """The LoRA of a reused context is only accepted by commands that asked for one."""
    common = ("--teacher", folder, "--resolution", RESOLUTION, "--device", "cpu", "--limit", 42)
    small = {
        "refine": ("--steps", 1, "--batch", 1, "--rank", 2, "--validation-images", 2, "--output", tmp_path / "lora"),
        "probe": ("--images", 4, "--per-class", 2, "--timesteps", "28", "--taps", "hidden", "--cells", 1,
                  "--lora", tmp_path / "lora", "--output", tmp_path / "probe"),
        "build": ("--image-size", 16, "--lora", tmp_path / "lora", "--output", tmp_path / "cache"),
    }  # fmt: skip
    for command, options in small.items():
        done = dit_cache(command, *common, *options, "--context", "reused")
        assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "lora" / RECORD_NAME).read_text())["context"] == "reused"
    assert json.loads((tmp_path / "probe/probe.json").read_text())["context"] == "reused"
    assert load_manifest(LocalFolder(tmp_path / "cache")).teacher.context == "reused"
    refused = dit_cache("build", *common, *small["build"])
    assert refused.exit_code == 1
    assert "was refined with --context reused, not joint" in str(refused.exception or refused.output)
    assert dit_cache("build", *common, "--context", "neither").exit_code == 2
