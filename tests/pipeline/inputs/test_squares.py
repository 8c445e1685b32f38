"""A teacher may be shown the square around an object's box, and everything that is made with it says so."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from cache_schema import open_cache
from cache_schema.errors import DitDistillError
from cache_schema.format.identity import differing_fields
from cache_schema.format.manifest import Manifest
from cache_schema.format.samples import samples_table
from cache_schema.format.square import square_around
from pipeline.build.config import BuildConfig
from pipeline.build.describe import describe_cache
from pipeline.build.run import build
from pipeline.chain.agreement import remarks_on
from pipeline.cli import app
from pipeline.config import make_config
from pipeline.inputs.condition_store import ConditionStore
from pipeline.inputs.feature_source import DiffusionSource, Wanted
from pipeline.inputs.framing import Framing
from pipeline.inputs.scan import scan
from pipeline.inputs.views import object_view, square_view
from pipeline.preview import page as preview_page
from pipeline.preview.page import FeatureRow, SampleBlock, draw_block
from pipeline.probe.run import ProbeConfig, probe
from pipeline.refine import RefineConfig, refine
from pipeline.teachers.timm_encoder import TimmEncoder

sides = st.integers(8, 5000)
shares = st.floats(0, 1)
BUILT = BuildConfig(
    timesteps=(28,), views=("canonical",), image_size=32, image_format="png", batch=8, encoding="float32",
)  # fmt: skip


@given(st.tuples(sides, sides), st.tuples(shares, shares, shares, shares))
def test_the_square_around_a_box_holds_all_of_it_that_is_in_the_image(size, edges):
    (width, height), (x0, x1), (y0, y1) = size, sorted(edges[:2]), sorted(edges[2:])
    box = (x0 * width, y0 * height, x1 * width, y1 * height)
    left, top, right, bottom = square_around(box, size)
    assert math.isclose(right - left, bottom - top, abs_tol=1e-6)
    assert math.isclose(right - left, max(box[2] - box[0], box[3] - box[1]), abs_tol=1e-6)
    assert all(a <= b + 1e-6 for a, b in ((left, box[0]), (top, box[1]), (box[2], right), (box[3], bottom)))
    assert math.isclose(left + right, box[0] + box[2], abs_tol=1e-6)


def test_a_square_keeps_the_shape_of_the_object_and_is_filled_with_the_mean_colour_beyond_the_border():
    image = Image.new("RGB", (100, 60), (80, 80, 80))
    image.paste((255, 255, 255), (20, 0, 80, 20))  # the object, at the upper border
    view = np.asarray(square_view(image, (20, 0, 80, 20), 60))
    mean = np.asarray(image).mean()
    assert np.allclose(view[:18], mean, atol=1)  # 20 rows above the image
    assert (view[23:37, 2:58] > 250).all()
    assert np.allclose(view[43:], 80, atol=3)
    assert np.array_equal(view, np.asarray(square_view(image, (20, -50, 80, 20), 60)))
    assert (np.asarray(object_view(image, (20, 0, 80, 20), 60))[:50, 4:56] > 250).all()
    with pytest.raises(ValueError, match="no pixel inside"):
        square_view(image, (200, 0, 300, 20), 60)


def test_a_square_is_stored_apart_and_refused_where_the_whole_image_is_shown(load_teacher, tiny_dataset, tmp_path):
    samples = tiny_dataset.samples[:2]
    boxes = ConditionStore(tmp_path, load_teacher(), tiny_dataset)
    squares = ConditionStore(tmp_path, load_teacher(), tiny_dataset, framing=Framing(object_crop="square"))
    boxes.prepare(samples, log=str)
    assert squares.prepare(samples, log=str).images == 2
    assert not torch.equal(boxes.read(samples, "canonical").object, squares.read(samples, "canonical").object)
    assert torch.equal(boxes.read(samples, "canonical").context, squares.read(samples, "canonical").context)
    with pytest.raises(DitDistillError, match="--crop square is of the object, and --input image shows all"):
        make_config("demo", settings=["teacher.crop=square", "teacher.input=image"])


def test_squares_make_another_cache_and_boxes_the_one_that_there_was(load_teacher, tiny_dataset):
    def manifest(crop):
        teacher = load_teacher()
        teacher.crop = crop
        config = BuildConfig(timesteps=(28,))
        table = samples_table([entry.row() for entry in scan(tiny_dataset, config.feature_splits)])
        return describe_cache(teacher, tiny_dataset, config, table)

    box, square = manifest("box"), manifest("square")
    assert "crop" not in box.document()["teacher"]
    assert Manifest.model_validate(box.document()) == box
    assert Manifest.model_validate(square.document()) == square
    assert differing_fields(box.document(), square.document()) == ["teacher.crop"]


def test_a_build_says_that_stage_one_was_shown_boxes(load_teacher, tiny_dataset, tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    (tmp_path / "refine.json").write_text('{"identity": {"resolution": 32}}')
    teacher = load_teacher()
    assert remarks_on(teacher, tmp_path, 28) == []
    teacher.crop = "square"
    (said,) = remarks_on(teacher, tmp_path, 28)
    assert said.endswith("was refined with crop box, this runs with crop square")


def square_of(load_teacher, **given):
    teacher = load_teacher(**given)
    teacher.crop = "square"
    return teacher


def test_stage_one_probe_and_build_see_the_same_squares(load_teacher, tiny_dataset, tmp_path):
    config = RefineConfig(steps=1, batch=1, rank=2, validation_images=1, pictures_every=0, checkpoint_every=0)
    kept = tmp_path / "conditions"
    record = refine(square_of(load_teacher), tiny_dataset, config, tmp_path / "lora", conditions=kept, log=str)
    assert record["identity"]["crop"] == "square"
    teacher = square_of(load_teacher, lora=tmp_path / "lora")
    assert remarks_on(teacher, tmp_path / "lora", 28) == []
    scored = ProbeConfig(timesteps=(28,), images=4, per_class=2, cells=2, batch=4, taps=("hidden",))
    assert probe(teacher, tiny_dataset, scored, tmp_path / "probe", conditions=kept, log=str)["crop"] == "square"
    build(teacher, tiny_dataset, BUILT, tmp_path / "cache", conditions=kept, log=str)
    cache = open_cache(tmp_path / "cache")
    by_id = {sample.id: sample for sample in tiny_dataset.samples}
    sample = by_id[cache.samples["id"][0].as_py()]
    stored = cache.read([0], tap="hidden").decode()

    def features(framing):
        store = ConditionStore(kept, teacher, tiny_dataset, framing=framing)
        store.prepare([sample], log=str)
        source = DiffusionSource(
            teacher, store, Wanted(("hidden",), ("canonical",), (teacher.sigmas(28)[27],), framing=framing)
        )
        return source.compute([sample], source.read([sample]))["hidden"][:, 0]

    assert torch.allclose(stored, features(Framing(object_crop="square")), atol=1e-4)
    assert not torch.allclose(stored, features(Framing()), atol=1e-2)
    said = "the square around the box of the object"
    assert f"| shown | {said} |" in (tmp_path / "cache/README.md").read_text()
    assert said in CliRunner().invoke(app, ["info", str(tmp_path / "cache")]).output
    picture = tmp_path / "seen.png"
    assert (
        CliRunner()
        .invoke(app, ["preview", str(tmp_path / "cache"), "--random", "1", "--output", str(picture)])
        .exit_code
        == 0
    )
    assert Image.open(picture).width > 400


def test_an_image_encoder_is_shown_squares_too(tiny_dataset, tmp_path):
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "w.safetensors")
    encoder = TimmEncoder(f"timm:test_vit:{tmp_path / 'w.safetensors'}", resolution=32)
    encoder.crop = "square"
    config = replace(BUILT, timesteps=(1,), num_steps=1, text="none", taps=("tokens",))
    assert build(encoder, tiny_dataset, config, tmp_path / "cache", log=str).teacher.crop == "square"
    cache = open_cache(tmp_path / "cache")
    sample = next(s for s in tiny_dataset.samples if s.id == cache.samples["id"][0].as_py())
    image = Image.open(io.BytesIO(tiny_dataset.read(sample)))
    seen = torch.from_numpy(np.array(square_view(image, sample.box, 32))).permute(2, 0, 1)[None]
    stored = cache.read([0], tap="tokens").decode()[0, 0]
    assert torch.allclose(stored, encoder.encode(seen, ["tokens"])["tokens"][0], atol=1e-4)


def test_a_picture_of_a_square_that_is_beyond_the_image_is_in_the_mean_colour_there():
    rows = [FeatureRow("hidden", False, [], (0.0, -0.5, 1.0, 0.5))]
    image = Image.new("RGB", (64, 64), "#ff0000")
    image.paste("#0000ff", (0, 0, 64, 32))
    panel = draw_block(SampleBlock("sample", [], "", image, "", (0.0, 0.0, 1.0, 0.5), rows), [])
    x, y = preview_page._IMAGE + 2 * preview_page._GAP + 40, 2 * preview_page._LINE
    assert panel.getpixel((x, y + 20)) == (127, 0, 127) or panel.getpixel((x, y + 20)) == (128, 0, 128)
    assert panel.getpixel((x, y + 120)) == (0, 0, 255)


@pytest.mark.parametrize("command", ["refine", "probe", "build", "run"])
def test_every_command_that_shows_a_teacher_images_knows_the_option(command):
    result = CliRunner().invoke(app, [command, "--crop", "circle", "--dataset", "demo", "--teacher", "demo"])
    assert result.exit_code == 2
    assert "square" in result.output
