"""The teacher computes what diffusers' own pipeline computes, reads taps where it says, and pays for no later block."""

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from hypothesis import given
from hypothesis import strategies as st

from pipeline.curriculum import add_noise
from pipeline.refine.demo_text import TEXT_TOKENS
from pipeline.teachers.base import TeacherError
from pipeline.teachers.flux import FluxTeacher, image_ids
from pipeline.teachers.packing import pack_latents, unpack_latents

L = 16  # object tokens of a 32-pixel view: 4 × 4


def record_pipeline(folder, image, caption, steps=28, **options):
    """Run diffusers' own pipeline and keep what its transformer was given and gave back at every step."""
    pipe = FluxKontextPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    pipe(
        image=image,
        prompt=caption,
        height=32,
        width=32,
        max_area=32 * 32,
        num_inference_steps=steps,
        max_sequence_length=TEXT_TOKENS,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        _auto_resize=False,
        **options,
    )
    hook.remove()
    return calls


@pytest.mark.parametrize("which", ["flux_folder", "guided_flux_folder"])
def test_velocity_is_minus_what_the_diffusers_pipeline_predicts_at_every_cached_step(which, photograph, request):
    folder = request.getfixturevalue(which)
    calls = record_pipeline(folder, photograph, "red body, long beak", guidance_scale=2.0)
    teacher = FluxTeacher(folder, resolution=32, guidance=2.0)
    text = teacher.encode_text(["red body, long beak"])
    context = teacher.encode_images(torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None])
    sigmas = teacher.sigmas(28)
    for p in (10, 16, 22, 28):
        given_, predicted = calls[p - 1]
        objects = given_["hidden_states"][:, :L]
        torch.testing.assert_close(given_["hidden_states"][:, L:], context, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(given_["timestep"], torch.tensor([sigmas[p - 1]]), atol=1e-6, rtol=1e-6)
        ours = teacher.features(objects, context, torch.tensor([sigmas[p - 1]]), text, ["velocity"])["velocity"]
        torch.testing.assert_close(ours, -predicted[:, :L], atol=1e-5, rtol=1e-5)


def test_sigma_p_is_entry_p_minus_one_of_the_schedulers_own_list(teacher, flux_folder, photograph):
    visited = [call["timestep"].item() for call, _ in record_pipeline(flux_folder, photograph, "a bird")]
    assert teacher.sigmas(28) == pytest.approx(visited, abs=1e-6)
    assert teacher.sigmas(28)[0] == pytest.approx(1.0)
    assert all(a > b for a, b in zip(teacher.sigmas(28), teacher.sigmas(28)[1:], strict=False))


def inputs(teacher, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean, context, noise = (torch.randn(batch, L, 16, generator=generator) for _ in range(3))
    sigma = torch.linspace(0.1, 0.8, batch)
    return add_noise(clean, noise, sigma), context, sigma, teacher.encode_text(["red crown"] * batch)


def full_forward_outputs(teacher, noisy, context, sigma, text):
    """Image tokens behind every block of one complete forward pass, read by plain hooks."""
    blocks = [*teacher.transformer.transformer_blocks, *teacher.transformer.single_transformer_blocks]
    seen = []
    hooks = [b.register_forward_hook(lambda m, i, o: seen.append(o[1][:, :L])) for b in blocks]
    with torch.no_grad():
        teacher.predict(noisy, context, sigma, text)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("tap", "depth"), [("double.0", 0), ("double.1", 1), ("single.0", 2), ("single.1", 3), ("hidden", 3)]
)
def test_a_tap_equals_a_hook_on_the_full_forward_and_later_blocks_do_not_run(teacher, tap, depth):
    noisy, context, sigma, text = inputs(teacher)
    expected = full_forward_outputs(teacher, noisy, context, sigma, text)
    blocks = [*teacher.transformer.transformer_blocks, *teacher.transformer.single_transformer_blocks]
    ran = []
    hooks = [b.register_forward_pre_hook(lambda m, i, n=n: ran.append(n)) for n, b in enumerate(blocks)]
    found = teacher.features(noisy, context, sigma, text, [tap])
    for hook in hooks:
        hook.remove()
    assert torch.equal(found[tap], expected[depth])
    assert ran == list(range(depth + 1))


def test_several_taps_are_read_in_one_pass_and_come_back_in_the_order_asked_for(teacher):
    noisy, context, sigma, text = inputs(teacher)
    found = teacher.features(noisy, context, sigma, text, ["velocity", "double.0", "hidden", "single.1"])
    assert list(found) == ["velocity", "double.0", "hidden", "single.1"]
    assert torch.equal(found["hidden"], found["single.1"])
    assert found["velocity"].shape == (3, L, 16)
    assert found["hidden"].shape == (3, L, 32)


def test_text_and_context_both_reach_the_object_tokens(teacher):
    noisy, context, sigma, text = inputs(teacher)
    base = teacher.features(noisy, context, sigma, text, ["hidden"])["hidden"]
    other_text = teacher.encode_text(["blue tail"] * 3)
    assert not torch.allclose(base, teacher.features(noisy, context, sigma, other_text, ["hidden"])["hidden"])
    assert not torch.allclose(base, teacher.features(noisy, context + 1, sigma, text, ["hidden"])["hidden"])


def test_context_tokens_are_told_apart_by_the_first_position_axis():
    assert image_ids(2, 3)[:, 0].tolist() == [0.0] * 6
    assert image_ids(2, 3, stream=1)[:, 0].tolist() == [1.0] * 6
    assert image_ids(2, 3)[:, 1:].tolist() == [[r, c] for r in range(2) for c in range(3)]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_packing_is_undone_by_unpacking_and_is_what_diffusers_does(batch, channels, rows, columns):
    latents = torch.randn(batch, channels, 2 * rows, 2 * columns)
    packed = pack_latents(latents)
    theirs = FluxKontextPipeline._pack_latents(latents, batch, channels, 2 * rows, 2 * columns)
    assert torch.equal(packed, theirs)
    assert torch.equal(unpack_latents(packed, rows, columns), latents)


def test_an_unknown_tap_is_refused_with_the_taps_there_are(teacher):
    with pytest.raises(TeacherError, match=r"no tap 'single.2'.*double.0–double.1 and single.0–single.1"):
        teacher.tap_shape("single.2")


def test_a_resolution_that_does_not_fit_the_vae_is_refused(flux_folder):
    with pytest.raises(TeacherError, match="resolution 30 must be a multiple of 8"):
        FluxTeacher(flux_folder, resolution=30)
