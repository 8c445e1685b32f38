"""The VAE of a teacher as a teacher: its latents are those that the transformer is given, which is not loaded."""

import pytest
import torch
from typer.testing import CliRunner

from cache_schema import open_cache
from pipeline.cli import app
from pipeline.teachers import load_teacher, outline_teacher
from pipeline.teachers.base import TeacherError

SPEC = "vae:demo"


@pytest.fixture(scope="module")
def encoder():
    return load_teacher(SPEC, dtype=torch.float32, device="cpu")


def test_latents_are_those_that_the_transformer_is_given(encoder):
    whole = load_teacher("demo", dtype=torch.float32, device="cpu")
    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = encoder.encode(pixels, ["latents"])["latents"]
    assert torch.equal(found, whole.encode_images(pixels))
    shape = encoder.tap_shape("latents")
    assert found.shape[1:] == (shape.tokens, shape.channels)
    assert encoder.digests() == {"vae": whole.digests()["vae"]}


def test_nothing_but_the_vae_is_loaded(encoder):
    assert encoder._teacher._parts.keys() == {"vae"}


def test_the_outline_says_what_the_loaded_encoder_does(encoder):
    outline = outline_teacher(SPEC)
    assert outline.source == encoder.source == SPEC
    assert outline.tap_shape("latents") == encoder.tap_shape("latents")
    assert outline.latent_values() == 0  # they are not kept apart


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("vae:", {}, "teacher vae:: write vae:NAME, with a diffusion transformer, e.g. vae:flux-dev"),
        ("vae:timm:test_vit", {}, "teacher vae:timm:test_vit: write vae:NAME"),
        (SPEC, {"context": "reused"}, "teacher vae:demo: an image encoder knows no --context"),
        (SPEC, {"resolution": 50}, "resolution 50 must be a multiple of"),
    ],
)
def test_what_a_vae_cannot_do_is_refused_in_a_line(spec, options, said):
    with pytest.raises(TeacherError, match=said):
        load_teacher(spec, dtype=torch.float32, device="cpu", **options)


def test_a_tap_or_a_noisy_timestep_is_refused(encoder):
    with pytest.raises(TeacherError, match="the teacher vae:demo has no tap 'hidden'; it has latents"):
        encoder.tap_shape("hidden")
    with pytest.raises(TeacherError, match="one timestep, --num-steps 1 --timesteps 1"):
        encoder.sigmas(28)


def test_one_command_caches_the_latents(tmp_path):
    done = CliRunner().invoke(
        app,
        ["build", "--dataset", "demo", "--limit", "4", "--teacher", SPEC, "--device", "cpu", "--dtype", "float32",
         "--output", str(tmp_path / "cache")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    cache = open_cache(tmp_path / "cache")
    assert [tap.name for tap in cache.manifest.taps] == ["latents"]
    assert cache.manifest.teacher.family == "vae"
    assert cache.manifest.views == ["canonical", "hflip"]
    assert "as the VAE of a diffusion transformer" in (tmp_path / "cache" / "README.md").read_text()
