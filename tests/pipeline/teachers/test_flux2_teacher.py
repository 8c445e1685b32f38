"""FLUX.2 klein computes what diffusers' own pipeline computes, with its positions, its latents and its schedule."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from tiny_teachers import QWEN_TOKENS, save_tiny_klein

from pipeline.teachers import load_teacher
from pipeline.teachers.base import TeacherError
from pipeline.teachers.flux2 import Flux2KleinTeacher, image_ids, text_ids
from pipeline.teachers.packing import pack_latents

RESOLUTION = 64  # the pipeline takes no smaller reference image; 4 × 4 tokens here
L = 16
CAPTION = "red body, long beak"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_klein(tmp_path_factory.mktemp("klein"))


@pytest.fixture(scope="module")
def teacher(folder) -> Flux2KleinTeacher:
    return Flux2KleinTeacher(folder, resolution=RESOLUTION)


@pytest.fixture(scope="module")
def reference() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 255, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8))


def record_pipeline(folder, image, **options):
    """What diffusers' transformer is given and gives back at every step, and the latents the pipeline ends with."""
    pipe = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    settings = {"num_inference_steps": 28, "max_sequence_length": QWEN_TOKENS, "guidance_scale": 1.0} | options
    pipe(
        image=image,
        prompt=CAPTION,
        height=RESOLUTION,
        width=RESOLUTION,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **settings,
    )
    return calls


def context_of(teacher, image):
    return teacher.encode_images(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])


def test_velocity_is_minus_what_the_pipeline_predicts_at_every_cached_step(folder, teacher, reference):
    calls = record_pipeline(folder, reference)
    text, context, sigmas = teacher.encode_text([CAPTION]), context_of(teacher, reference), teacher.sigmas(28)
    assert len(calls) == 28
    for p in (10, 16, 22, 28):
        given, predicted = calls[p - 1]
        torch.testing.assert_close(given["hidden_states"][:, L:], context, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(given["encoder_hidden_states"], text.tokens, atol=1e-5, rtol=1e-5)
        sigma = torch.tensor([sigmas[p - 1]])
        ours = teacher.features(given["hidden_states"][:, :L], context, sigma, text, ["velocity"])["velocity"]
        torch.testing.assert_close(ours, -predicted[:, :L], atol=1e-5, rtol=1e-5)


def test_without_a_reference_image_it_is_the_text_to_image_pipeline(folder, teacher):
    given, predicted = record_pipeline(folder, None, num_inference_steps=4)[1]
    sigma = torch.tensor([teacher.sigmas(4)[1]])
    ours = teacher.predict(given["hidden_states"], None, sigma, teacher.encode_text([CAPTION]))
    torch.testing.assert_close(ours, -predicted, atol=1e-5, rtol=1e-5)


def test_with_classifier_free_guidance_the_prediction_that_saw_the_caption_counts(folder, teacher, reference):
    calls = record_pipeline(folder, reference, guidance_scale=4.0, num_inference_steps=3)
    assert len(calls) == 6
    given, predicted = calls[2]
    sigma, text = torch.tensor([teacher.sigmas(3)[1]]), teacher.encode_text([CAPTION])
    ours = teacher.predict(given["hidden_states"][:, :L], context_of(teacher, reference), sigma, text)
    torch.testing.assert_close(ours, -predicted[:, :L], atol=1e-5, rtol=1e-5)
    assert teacher.guidance is None


@pytest.mark.parametrize("steps", [4, 28, 50])
def test_sigmas_are_those_the_pipeline_visits(folder, teacher, steps):
    visited = [given["timestep"].item() for given, _ in record_pipeline(folder, None, num_inference_steps=steps)]
    assert teacher.sigmas(steps) == pytest.approx(visited, abs=1e-6)


def test_positions_are_the_pipelines_own():
    latents = torch.zeros(1, 16, 2, 3)
    assert torch.equal(image_ids(2, 3), Flux2KleinPipeline._prepare_latent_ids(latents)[0])
    assert torch.equal(image_ids(2, 3, time=10), Flux2KleinPipeline._prepare_image_ids([latents])[0])
    assert torch.equal(text_ids(5), Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, 5, 8))[0])


def test_packing_is_what_the_pipeline_does_to_its_latents():
    latents = torch.randn(2, 4, 6, 8)
    theirs = Flux2KleinPipeline._pack_latents(Flux2KleinPipeline._patchify_latents(latents))
    assert torch.equal(pack_latents(latents), theirs)


def test_latents_are_standardised_by_the_vaes_batch_norm_and_decoded_back(teacher):
    pixels = torch.randint(0, 256, (2, 3, RESOLUTION, RESOLUTION), dtype=torch.uint8)
    latents = teacher.encode_images(pixels)
    norm = teacher.vae.bn
    with torch.no_grad():
        raw = teacher.vae.encode(pixels / 127.5 - 1).latent_dist.mode()
        expected = norm(Flux2KleinPipeline._patchify_latents(raw)).flatten(2).transpose(1, 2)
        shown = teacher.vae.decode(raw).sample
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    decoded = teacher.decode_images(latents).float()
    assert (decoded - ((shown + 1) * 127.5).clamp(0, 255)).abs().max() <= 1


def test_the_chat_template_is_part_of_the_tokenizers_digest(folder, teacher, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "tokenizer" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    changed = Flux2KleinTeacher(other, resolution=RESOLUTION).digests()
    assert {name for name, digest in teacher.digests().items() if changed[name] != digest} == {"tokenizer"}


def test_another_pipeline_of_the_same_transformer_is_refused_with_the_known_ones(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "Flux2Pipeline", "text_encoder": ["transformers", "Mistral3ForConditionalGeneration"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(TeacherError) as caught:
        load_teacher(str(tmp_path), dtype=torch.float32, device="cpu")
    line = str(caught.value)
    assert "no adapter for Flux2Pipeline with Flux2Transformer2DModel" in line
    known = "Flux2KleinKVPipeline, Flux2KleinPipeline, FluxKontextPipeline, FluxPipeline, StableDiffusion3Pipeline"
    assert f"known are {known}" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ("text_encoder", "Flux2KleinPipeline does not work without text_encoder"),
        ("vae/config.json", "no vae/config.json there"),
        ("transformer/diffusion_pytorch_model.safetensors", "not a complete Flux2KleinPipeline folder"),
    ],
)
def test_an_incomplete_folder_is_refused_in_one_line(folder, tmp_path, removed, said):
    broken = shutil.copytree(folder, tmp_path / "broken")
    if (broken / removed).is_dir():
        shutil.rmtree(broken / removed)
    else:
        (broken / removed).unlink()
    with pytest.raises(TeacherError, match=said) as caught:
        load_teacher(str(broken), dtype=torch.float32, device="cpu")
    assert "\n" not in str(caught.value)
