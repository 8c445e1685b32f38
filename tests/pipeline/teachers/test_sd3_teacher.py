"""SD3.5 computes what diffusers' own pipeline computes for one wide picture whose left half is kept clean."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny_teachers import save_tiny_sd3

from pipeline.refine.demo_text import TEXT_TOKENS
from pipeline.teachers import load_teacher
from pipeline.teachers.base import TeacherError
from pipeline.teachers.packing import pack_latents, unpack_latents
from pipeline.teachers.sd3 import StableDiffusion3Teacher

RESOLUTION = 64  # latents of 8 × 8, tokens of 4 × 4
CAPTION = "red body, long beak"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory) -> Path:
    return save_tiny_sd3(tmp_path_factory.mktemp("sd3-without-t5"), with_t5=False)


@pytest.fixture(scope="module")
def teacher(folder) -> StableDiffusion3Teacher:
    return StableDiffusion3Teacher(folder, resolution=RESOLUTION)


def record_pipeline(folder, context, steps=28, guidance=1.0, text_tokens=TEXT_TOKENS):
    """Run diffusers' pipeline and keep what its transformer was given and gave back at every step.

    context: (1, C, H, W) clean latents that are put back into the left half before every step, or None.
    """
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if not (folder / name).exists()}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    if context is not None:
        latents = torch.cat([context, latents], dim=3)

    def keep_context(_pipe, _step, _timestep, values):
        if context is not None:
            values["latents"] = torch.cat([context, values["latents"][..., 8:]], dim=3)
        return values

    pipe(
        prompt=CAPTION,
        height=RESOLUTION,
        width=8 * latents.shape[-1],
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=text_tokens,
        callback_on_step_end=keep_context,
        output_type="latent",
    )
    return calls


@pytest.fixture(scope="module")
def context(teacher):
    pixels = np.random.default_rng(3).integers(0, 255, (1, 3, RESOLUTION, RESOLUTION), dtype=np.uint8)
    return teacher.encode_images(torch.from_numpy(pixels))


@pytest.mark.parametrize("which", ["folder", "without_t5"])
def test_velocity_is_minus_what_the_pipeline_predicts_at_every_cached_step(which, context, request):
    folder = request.getfixturevalue(which)
    teacher = StableDiffusion3Teacher(folder, resolution=RESOLUTION)
    t5 = teacher.text_pipe.tokenizer_3
    text_tokens = min(256, t5.model_max_length) if t5 else 256
    calls = record_pipeline(folder, unpack_latents(context, 4, 4), text_tokens=text_tokens)
    text, sigmas = teacher.encode_text([CAPTION]), teacher.sigmas(28)
    assert len(calls) == 28
    for p in (10, 16, 22, 28):
        given, predicted = calls[p - 1]
        torch.testing.assert_close(given["encoder_hidden_states"], text.tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(given["pooled_projections"], text.pooled, atol=1e-5, rtol=1e-5)
        noisy, sigma = pack_latents(given["hidden_states"][..., 8:]), torch.tensor([sigmas[p - 1]])
        ours = teacher.features(noisy, context, sigma, text, ["velocity"])["velocity"]
        torch.testing.assert_close(ours, -pack_latents(predicted[..., 8:]), atol=1e-5, rtol=1e-5)


def test_without_a_context_it_is_the_text_to_image_pipeline(folder, teacher):
    given, predicted = record_pipeline(folder, None, steps=4)[1]
    sigma = torch.tensor([teacher.sigmas(4)[1]])
    ours = teacher.predict(pack_latents(given["hidden_states"]), None, sigma, teacher.encode_text([CAPTION]))
    torch.testing.assert_close(ours, -pack_latents(predicted), atol=1e-5, rtol=1e-5)


def test_with_classifier_free_guidance_the_prediction_that_saw_the_caption_counts(folder, teacher, context):
    given, predicted = record_pipeline(folder, unpack_latents(context, 4, 4), steps=3, guidance=4.0)[1]
    noisy, sigma = pack_latents(given["hidden_states"][1:, :, :, 8:]), torch.tensor([teacher.sigmas(3)[1]])
    ours = teacher.predict(noisy, context, sigma, teacher.encode_text([CAPTION]))
    torch.testing.assert_close(ours, -pack_latents(predicted[1:, :, :, 8:]), atol=1e-5, rtol=1e-5)
    assert teacher.guidance is None


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("steps", [4, 28])
def test_sigmas_are_those_the_pipeline_visits(tmp_path, steps, dynamic):
    folder = save_tiny_sd3(tmp_path, dynamic_shifting=dynamic)
    visited = [given["timestep"].item() / 1000 for given, _ in record_pipeline(folder, None, steps=steps)]
    ours = StableDiffusion3Teacher(folder, resolution=RESOLUTION).sigmas(steps)
    assert ours == pytest.approx(visited, abs=1e-6)


def test_latents_are_what_the_pipeline_decodes(teacher):
    pixels = torch.randint(0, 256, (2, 3, RESOLUTION, RESOLUTION), dtype=torch.uint8)
    latents = teacher.encode_images(pixels)
    assert latents.shape == (2, 16, 16)
    raw = unpack_latents(latents, 4, 4) / teacher.vae.config.scaling_factor + teacher.vae.config.shift_factor
    with torch.no_grad():
        torch.testing.assert_close(raw, teacher.vae.encode(pixels / 127.5 - 1).latent_dist.mode())
        shown = (teacher.vae.decode(raw).sample + 1) * 127.5
    assert (teacher.decode_images(latents).float() - shown.clamp(0, 255)).abs().max() <= 1


def test_a_folder_from_which_t5_was_removed_is_another_teacher_and_its_digests_say_so(folder, teacher, tmp_path):
    light = shutil.copytree(folder, tmp_path / "sd3")
    for component in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(light / component)
    digests = StableDiffusion3Teacher(light, resolution=RESOLUTION).digests()
    assert digests == {n: d for n, d in teacher.digests().items() if n not in ("text_encoder_3", "tokenizer_3")}


def test_a_folder_without_clip_is_refused_as_diffusers_needs_both(folder, tmp_path):
    without = shutil.copytree(folder, tmp_path / "sd3")
    for component in ("text_encoder_2", "tokenizer_2"):
        shutil.rmtree(without / component)
    with pytest.raises(TeacherError, match="does not work without text_encoder_2 and tokenizer_2"):
        load_teacher(str(without), resolution=RESOLUTION, dtype=torch.float32, device="cpu")


def test_two_views_that_do_not_fit_the_positional_table_are_refused(folder):
    StableDiffusion3Teacher(folder, resolution=96)
    with pytest.raises(
        TeacherError, match=r"resolution 112: .*14 tokens wide.*ends at 12; use at most --resolution 96"
    ):
        StableDiffusion3Teacher(folder, resolution=112)
