"""Image encoders of timm as teachers: their tokens are timm's own, and they are cached as a DiT's features are."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cache_schema import open_cache, samples_table
from cache_schema.errors import DitDistillError
from pipeline.build.config import BuildConfig
from pipeline.build.describe import describe_cache
from pipeline.build.run import build, scan_for
from pipeline.cli import app
from pipeline.config import make_config
from pipeline.inputs.conditions import read_pixels
from pipeline.inputs.tolerance import Tolerance
from pipeline.probe.run import ProbeConfig, probe
from pipeline.teachers import load_teacher, outline_teacher
from pipeline.teachers.base import TeacherError
from pipeline.teachers.imagenet_weights import packaged_weights, renamed
from pipeline.teachers.timm_encoder import TimmEncoder
from pipeline.teachers.timm_networks import parse_spec

SIDE = 96
CONFIG = BuildConfig(
    taps=("tokens",), timesteps=(1,), num_steps=1, text="none", views=("canonical", "hflip"), encoding="float32",
    image_size=32, batch=4,
)  # fmt: skip


def saved(folder: Path, name: str, seed: int = 0) -> str:
    """A tiny timm network with random weights, saved as timm saves them: the name of it as a teacher."""
    torch.manual_seed(seed)
    file = folder / f"{name}.safetensors"
    save_file(timm.create_model(name, pretrained=False).state_dict(), file)
    return f"timm:{name}:{file}"


@pytest.fixture(scope="module")
def convnet(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("timm"), "test_efficientnet")


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("timm"), "test_vit")


def pixels(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(encoder: TimmEncoder, images: torch.Tensor) -> torch.Tensor:
    config = timm.create_model(parse_spec(encoder.source).name).pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (images.float() / 255 - mean) / std


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_convnext", "test_resnet"])
def test_tokens_are_those_that_timm_computes_without_class_token(name, tmp_path):
    spec = saved(tmp_path, name)
    encoder = TimmEncoder(spec, resolution=SIDE)
    network = timm.create_model(
        name, pretrained=False, num_classes=0, **({"img_size": SIDE} if name == "test_vit" else {})
    ).eval()
    network.load_state_dict(encoder._network.state_dict())
    with torch.no_grad():
        features = network.forward_features(normalised(encoder, pixels()))
        stages = network.forward_intermediates(normalised(encoder, pixels()), intermediates_only=True)
    expected = features[:, network.num_prefix_tokens :] if features.dim() == 3 else features.flatten(2).transpose(1, 2)
    found = encoder.encode(pixels(), encoder.taps())
    assert torch.allclose(found["tokens"], expected, atol=1e-5)
    for n, stage in enumerate(stages):
        assert torch.allclose(found[f"tokens.{n}"], stage.flatten(2).transpose(1, 2), atol=1e-5)
    for tap in encoder.taps():
        shape = encoder.tap_shape(tap)
        assert found[tap].shape == (3, shape.tokens, shape.channels)
        assert shape.grid[0] * shape.grid[1] == shape.tokens
        assert torch.equal(encoder.encode(pixels(), [tap])[tap], found[tap])


@pytest.mark.parametrize("kind", ["convnet", "vit"])
def test_the_outline_of_an_encoder_knows_the_shapes_of_the_loaded_one(kind, request):
    spec = request.getfixturevalue(kind)
    encoder, outline = TimmEncoder(spec, resolution=SIDE), outline_teacher(spec, resolution=SIDE)
    assert outline.architecture.taps() == encoder.taps()
    assert [outline.tap_shape(tap) for tap in encoder.taps()] == [encoder.tap_shape(tap) for tap in encoder.taps()]
    assert outline.latent_values() == 0
    assert outline_teacher(spec).resolution == TimmEncoder(spec).resolution


def test_a_cache_holds_the_tokens_of_the_crop_and_of_its_mirror_image(convnet, tiny_dataset, tmp_path):
    encoder = TimmEncoder(convnet, resolution=SIDE)
    build(encoder, tiny_dataset, CONFIG, tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    assert cache.manifest.curriculum.timesteps == [1]
    assert cache.manifest.curriculum.sigmas == [0.0]
    assert cache.manifest.teacher.family == "timm"
    by_id = {sample.id: sample for sample in tiny_dataset.samples}
    for row in (0, len(cache) - 1):
        sample = by_id[cache.samples["id"][row].as_py()]
        crop = read_pixels(tiny_dataset, [sample], SIDE, ["canonical"])["canonical"].object
        mirrored = ImageOps.mirror(Image.fromarray(crop[0].permute(1, 2, 0).numpy()))
        both = [crop, torch.from_numpy(np.array(mirrored)).permute(2, 0, 1)[None]]
        for view, image in enumerate(both):
            stored = cache.read([row], tap="tokens", view=view).decode()[0, 0]
            assert torch.allclose(stored, encoder.encode(image, ["tokens"])["tokens"][0], atol=1e-5)


def test_crop_and_whole_image_are_two_caches(convnet, tiny_dataset, tmp_path):
    ids, features = [], []
    for name in ("object", "image"):
        encoder = TimmEncoder(convnet, resolution=SIDE, input=name)
        manifest = build(encoder, tiny_dataset, CONFIG, tmp_path / name)
        assert manifest.teacher.input == name
        ids.append(manifest.cache_id)
        features.append(open_cache(tmp_path / name).read([0], tap="tokens").decode())
    assert ids[0] != ids[1]
    assert not torch.allclose(*features)


def test_other_weights_are_another_cache(tiny_dataset, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    specs = [saved(tmp_path / "a", "test_vit"), saved(tmp_path / "b", "test_vit"), saved(tmp_path, "test_vit", seed=1)]
    scanned = scan_for(tiny_dataset, CONFIG, Tolerance())
    table = samples_table([s.row() for s in scanned])
    ids = [describe_cache(TimmEncoder(spec, resolution=SIDE), tiny_dataset, CONFIG, table).cache_id for spec in specs]
    assert ids[0] == ids[1] != ids[2]


def test_a_probe_compares_the_stages_of_an_encoder(convnet, tiny_dataset, tmp_path):
    encoder = TimmEncoder(convnet, resolution=SIDE)
    config = ProbeConfig(timesteps=(1,), num_steps=1, images=20, per_class=5, cells=2, batch=4)
    record = probe(encoder, tiny_dataset, config, tmp_path, log=lambda _: None)
    assert [score["tap"] for score in record["scores"]] == encoder.taps()


def test_one_command_builds_and_verifies_a_cache_of_an_encoder(convnet, tmp_path):
    command = ["run", "--dataset", "demo", "--teacher", convnet, "--output", str(tmp_path), "--resolution", "64"]
    done = CliRunner().invoke(app, [*command, "--limit", "4"])
    assert done.exit_code == 0, done.output
    manifest = open_cache(tmp_path / "cache").manifest
    assert (manifest.teacher.source, manifest.views) == (convnet, ["canonical", "hflip"])
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == ["build", "verify"]


def test_the_preset_of_an_encoder_asks_for_no_noise_no_text_and_no_stage_one():
    config = make_config("cars", "timm:tf_efficientnet_lite2")
    assert config.steps == ("build", "verify")
    assert (config.build.timesteps, config.build.num_steps, config.build.text) == ((1,), 1, "none")
    assert make_config("demo").steps == ("annotate", "refine", "build", "verify")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("timm:", "write timm:NAME"),
        ("timm:test_vti", "timm has no network called test_vti; did you mean test_vit"),
        ("timm:test_vit:nowhere.safetensors", "there is no file nowhere.safetensors"),
    ],
)
def test_what_cannot_be_found_is_named_in_one_line(spec, words):
    with pytest.raises(TeacherError, match=words) as caught:
        load_teacher(spec, dtype=torch.float32, device="cpu", resolution=SIDE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "side", "words"),
    [
        ("efficientvim_m1", 64, "its output is a list, not a grid of tokens"),
        ("bat_resnext26ts", 33, "it does not take --resolution 33: AssertionError"),
    ],
)
def test_a_network_without_a_grid_of_tokens_is_refused_in_one_line(name, side, words):
    with pytest.raises(TeacherError, match=words):
        outline_teacher(f"timm:{name}", resolution=side)


def test_weights_of_another_network_are_refused_by_name(vit, convnet, tmp_path):
    file = vit.split(":")[2]
    with pytest.raises(TeacherError, match="the weights are not those of test_efficientnet") as caught:
        TimmEncoder(f"timm:test_efficientnet:{file}", resolution=SIDE)
    assert "\n" not in str(caught.value)
    state = load_file(convnet.split(":")[2])
    save_file(state | {"blocks.9.0.extra": torch.zeros(2)}, tmp_path / "more.safetensors")
    with pytest.raises(TeacherError, match=r"blocks\.9\.0\.extra"):
        TimmEncoder(f"timm:test_efficientnet:{tmp_path / 'more.safetensors'}", resolution=SIDE)
    dropped = next(name for name in state if name.startswith("blocks"))
    save_file({k: v for k, v in state.items() if k != dropped}, tmp_path / "less.safetensors")
    with pytest.raises(TeacherError, match=dropped.replace(".", r"\.")):
        TimmEncoder(f"timm:test_efficientnet:{tmp_path / 'less.safetensors'}", resolution=SIDE)


def test_a_file_without_classifier_is_enough(vit, tmp_path):
    state = {name: value for name, value in load_file(vit.split(":")[2]).items() if not name.startswith("head.")}
    save_file(state, tmp_path / "headless.safetensors")
    headless = TimmEncoder(f"timm:test_vit:{tmp_path / 'headless.safetensors'}", resolution=SIDE)
    assert headless.digests() == TimmEncoder(vit, resolution=SIDE).digests()


def test_a_damaged_file_is_named(vit, tmp_path):
    whole = Path(vit.split(":")[2]).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TeacherError, match=r"cut\.safetensors is no whole safetensors file"):
        TimmEncoder(f"timm:test_vit:{tmp_path / 'cut.safetensors'}", resolution=SIDE)


def test_what_an_encoder_does_not_know_is_refused(vit, tiny_dataset, tmp_path):
    encoder = TimmEncoder(vit, resolution=SIDE)
    with pytest.raises(TeacherError, match=r"no tap 'hidden'; it has tokens\.0"):
        encoder.tap_shape("hidden")
    with pytest.raises(TeacherError, match="--num-steps 1 --timesteps 1"):
        build(encoder, tiny_dataset, replace(CONFIG, timesteps=(10,), num_steps=28), tmp_path)
    with pytest.raises(TeacherError, match="takes no LoRA"):
        load_teacher(vit, dtype=torch.float32, device="cpu", lora=tmp_path)
    with pytest.raises(TeacherError, match="knows no --context"):
        load_teacher(vit, dtype=torch.float32, device="cpu", context="joint")
    with pytest.raises(TeacherError, match="does not take --resolution 97"):
        TimmEncoder(vit, resolution=97)
    with pytest.raises(TeacherError, match="leave input=image out"):
        load_teacher("demo", dtype=torch.float32, device="cpu", input="image")


def test_a_diffusion_transformer_that_is_asked_for_the_whole_image_alone_is_refused_before_anything_is_read(tmp_path):
    done = CliRunner().invoke(app, ["build", "--dataset", "demo", "--input", "image", "--output", str(tmp_path / "c")])
    assert "a diffusion transformer sees object and whole image; leave --input image out" in str(done.exception)
    assert not (tmp_path / "c").exists()


def test_stage_one_of_an_encoder_is_refused_in_one_line(vit, tmp_path):
    done = CliRunner().invoke(app, ["refine", "--teacher", vit, "--output", str(tmp_path / "lora"), "--limit", "4"])
    assert isinstance(done.exception, DitDistillError)
    assert "an image encoder has no Stage I" in str(done.exception)


def test_tensors_are_renamed_by_order_and_only_where_all_of_them_fit():
    theirs = {"_conv.weight": torch.ones(2, 3), "_bn.bias": torch.zeros(2)}
    ours = {"conv.weight": torch.empty(2, 3), "bn.bias": torch.empty(2)}
    assert list(renamed(theirs, ours)) == list(ours)
    assert renamed(theirs, ours)["bn.bias"] is theirs["_bn.bias"]
    with pytest.raises(ValueError, match="1 tensors instead of 2"):
        renamed({"_conv.weight": torch.ones(2, 3)}, ours)
    with pytest.raises(ValueError, match=r"_bn\.bias is \(3,\) where bn\.bias is \(2,\)"):
        renamed(theirs | {"_bn.bias": torch.zeros(3)}, ours)


@pytest.mark.skipif(packaged_weights("tf_efficientnet_lite0") is None, reason="ImageNet weights are not installed")
def test_the_weights_of_a_package_serve_a_teacher_and_as_a_file_a_student(tmp_path):
    file = tmp_path / "lite0.safetensors"
    program = [sys.executable, "-m", "pipeline.teachers.imagenet_weights", "tf_efficientnet_lite0", str(file)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    direct = TimmEncoder("timm:tf_efficientnet_lite0", resolution=64)
    from_file = TimmEncoder(f"timm:tf_efficientnet_lite0:{file}", resolution=64)
    assert direct.digests() == from_file.digests()
    assert direct.tap_shape("tokens").channels == 1280
    # Running variances of a network without training are ones.
    variances = [value for name, value in direct._network.state_dict().items() if name.endswith("running_var")]
    assert all(value.std() > 0 for value in variances)
