"""Stage I as others train it: how σ is drawn, clipping, empty captions, mirrored images, what the LoRA adapts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from cache_schema.errors import DitDistillError
from pipeline.chain.agreement import remarks_on
from pipeline.curriculum import keyed_generator
from pipeline.refine import RefineConfig, refine
from pipeline.refine.draws import chosen_of, noise_of, sigma_of
from pipeline.teachers.lora import feed_forward_layers

CONFIG = RefineConfig(steps=2, batch=2, lr=1e-2, rank=2, validation_images=2, pictures_every=0, checkpoint_every=0)
LORA = "pytorch_lora_weights.safetensors"


def drawn(distribution, count=20_000, schedule=()):
    return sigma_of(keyed_generator(0, distribution), count, distribution, schedule)


@given(st.integers(0, 9), st.integers(0, 10_000), st.integers(0, 7))
def test_uniform_noise_levels_are_those_there_always_were(seed, step, slot):
    noise, sigma = noise_of(seed, step, slot, (3, 4, 2))
    generator = keyed_generator(seed, "noise", step, slot)
    assert np.array_equal(noise.numpy(), generator.standard_normal((3, 4, 2), dtype=np.float32))
    assert np.array_equal(sigma.numpy(), generator.random(3, dtype=np.float32))


def test_logit_normal_noise_levels_are_rarely_near_the_ends():
    sigma = drawn("logit-normal")
    assert ((sigma > 0) & (sigma < 1)).all()
    assert abs(np.median(sigma) - 0.5) < 0.02
    logits = np.log(sigma / (1 - sigma))
    assert abs(logits.std() - 1) < 0.02


def test_shifted_noise_levels_are_as_frequent_as_the_sampler_visits_them(teacher):
    schedule = teacher.sigmas(28)
    sigma = drawn("shifted", schedule=schedule)
    places = np.arange(1, 29) / 28
    shares = (sigma[:, None] <= np.array(schedule[::-1])[None]).mean(axis=0)
    np.testing.assert_allclose(shares, places, atol=0.02)


@given(st.integers(0, 99), st.integers(1, 16))
def test_a_share_of_none_and_of_all_is_none_and_all(step, batch):
    assert chosen_of(0, "flip", step, 0, batch, 0.0) == [False] * batch
    assert chosen_of(0, "flip", step, 0, batch, 1.0) == [True] * batch


def test_all_options_together_train_a_lora_that_the_build_takes(load_teacher, tiny_dataset, tmp_path):
    plain = refine(load_teacher(), tiny_dataset, CONFIG, tmp_path / "plain", log=str)
    config = replace(
        CONFIG, lora_targets="attention+ff", sigma="logit-normal", grad_clip=1e-6, caption_dropout=0.5, flip=True
    )
    record = refine(load_teacher(), tiny_dataset, config, tmp_path / "all", log=str)
    assert record["lora_digest"] != plain["lora_digest"]
    layers = {name.rsplit(".lora", 1)[0] for name in load_file(tmp_path / "all" / LORA)}
    assert any(".ff.net" in layer for layer in layers)
    assert any("single_transformer_blocks.0.proj_mlp" in layer for layer in layers)
    assert not any(".ff." in name for name in load_file(tmp_path / "plain" / LORA))
    card = (tmp_path / "all/README.md").read_text()
    assert "feed-forward" in card
    assert "50% without caption" in card
    refined = load_teacher(lora=tmp_path / "all")
    assert refined.transformer is not None
    # An earlier record, which knows none of these settings, is that of a run without them.
    file = tmp_path / "plain/refine.json"
    old = json.loads(file.read_text())
    for name in ("lora_targets", "sigma", "grad_clip", "caption_dropout", "flip", "train_guidance"):
        del old["identity"][name]
    file.write_text(json.dumps(old))
    assert refine(load_teacher(), tiny_dataset, CONFIG, tmp_path / "plain", log=str)["lora_digest"]
    with pytest.raises(DitDistillError, match="caption_dropout"):
        refine(load_teacher(), tiny_dataset, replace(CONFIG, caption_dropout=0.5), tmp_path / "plain", log=str)


def test_feed_forward_layers_are_those_of_the_blocks_alone(teacher):
    names = feed_forward_layers(teacher.transformer)
    assert "transformer_blocks.1.ff_context.net.0.proj" in names
    assert "single_transformer_blocks.0.proj_out" in names
    assert "proj_out" not in names
    assert not any("attn" in name or "norm" in name for name in names)
    modules = dict(teacher.transformer.named_modules())
    assert all(isinstance(modules[name], torch.nn.Linear) for name in names)


class Loaded:
    """What is asked of a teacher here."""

    source, guidance, resolution, step_distilled, crop = "klein", 3.5, 64, False, "box"


def lora_record(folder, **identity):
    (folder / LORA).write_bytes(b"")
    (folder / "refine.json").write_text(json.dumps({"identity": identity}))
    return folder


def test_a_build_says_in_one_line_each_where_stage_one_ran_otherwise(tmp_path):
    lora = lora_record(tmp_path, guidance=1.0, resolution=64)
    assert remarks_on(Loaded(), lora, 28) == [
        f"warning: the LoRA {lora} was refined with guidance 1.0, this runs with guidance 3.5"
    ]
    assert remarks_on(Loaded(), lora_record(tmp_path, guidance=3.5, resolution=64), 28) == []
    assert remarks_on(Loaded(), None, 28) == []
    (tmp_path / "refine.json").unlink()
    assert remarks_on(Loaded(), tmp_path, 28) == []


def test_a_step_distilled_teacher_at_28_steps_is_worth_a_warning():
    distilled = Loaded()
    distilled.step_distilled = True
    (said,) = remarks_on(distilled, None, 28)
    assert said.startswith("warning: klein is distilled to a few steps")
    assert remarks_on(distilled, None, 4) == []
