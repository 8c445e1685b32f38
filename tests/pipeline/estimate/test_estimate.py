"""An estimate says what a build takes before it runs, from configuration files alone."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import FluxTransformer2DModel
from typer.testing import CliRunner

from cache_schema.errors import DitDistillError, InvalidEncoding
from pipeline.build.config import BuildConfig
from pipeline.build.run import build
from pipeline.cli import app
from pipeline.estimate.sizes import Demand, TeacherRate, estimate, measure_rate, plan_cache
from pipeline.estimate.text import estimate_text
from pipeline.teachers import TeacherError, outline_teacher
from pipeline.teachers.architecture import read_config
from pipeline.teachers.flux import FluxTeacher

CARS_TRAIN = 8054


def flux_plan(count=CARS_TRAIN, **config):
    return plan_cache(outline_teacher("flux-kontext"), BuildConfig(**config), None, count)


def size_of(found, kind, pool=1, pca=None):
    return next(s for s in found["sizes"] if (s["kind"], s["pool"], s["pca"]) == (kind, pool, pca))


def test_the_published_configuration_of_flux_1_is_what_its_class_was_written_for():
    defaults = {name: p.default for name, p in inspect.signature(FluxTransformer2DModel.__init__).parameters.items()}
    published = read_config(outline_teacher("flux-dev").configs, "transformer/config.json", None)
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in published.items() if not k.startswith("_")}
    assert plain == {name: defaults[name] for name in plain} | {"guidance_embeds": True}  # [schnell] has none


@pytest.mark.parametrize("tap", ["hidden", "velocity", "double.1", "single.0"])
def test_an_outline_has_the_shapes_of_the_loaded_teacher(tap, flux_folder):
    outline = outline_teacher(str(flux_folder), resolution=48)
    loaded = FluxTeacher(flux_folder, resolution=48)
    assert outline.tap_shape(tap) == loaded.tap_shape(tap)


def test_an_outline_needs_no_weights(flux_folder, tmp_path):
    for name in ("model_index.json", "transformer/config.json", "vae/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(flux_folder / name, tmp_path / name)
    assert outline_teacher(str(tmp_path), resolution=48).tap_shape("hidden").channels == 32


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json there"),
        (lambda f: (f / "model_index.json").write_text("{}"), "names no transformer"),
        (
            lambda f: (f / "model_index.json").write_text(
                '{"_class_name": "OtherPipeline", "transformer": ["diffusers", "Other"]}'
            ),
            "no adapter for OtherPipeline with Other",
        ),
        (lambda f: (f / "vae/config.json").unlink(), "no vae/config.json there"),
        (lambda f: (f / "vae/config.json").write_text("[]"), "is not a JSON object"),
        (lambda f: (f / "transformer/config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "transformer/config.json").write_text("{}"), "has no usable 'in_channels'"),
    ],
)
def test_a_folder_that_is_no_teacher_is_refused_with_what_is_missing(damage, complaint, flux_folder, tmp_path):
    folder = shutil.copytree(flux_folder, tmp_path / "flux", ignore=shutil.ignore_patterns("*.safetensors"))
    damage(folder)
    with pytest.raises(TeacherError, match=complaint):
        outline_teacher(str(folder))


def test_cars_with_flux_takes_what_the_design_says(tmp_path):
    found = estimate(flux_plan(), Demand(), tmp_path, None)
    gigabytes = {
        name: round(size_of(found, *key)["features"] / 1e9)
        for name, key in {
            "raw": ("bfloat16",), "pooled": ("bfloat16", 2), "int8": ("int8", 2), "pca": ("int8", 2, 768)
        }.items()
    }  # fmt: skip
    assert gigabytes == {"raw": 203, "pooled": 51, "int8": 25, "pca": 6}
    assert round(size_of(found, "bfloat16")["bytes_per_image"] / 1e6) == 25
    velocity = estimate(flux_plan(1, taps=("velocity",), timesteps=(28,)), Demand(), tmp_path, None)
    assert size_of(velocity, "bfloat16")["bytes_per_image"] == 131_072
    assert size_of(velocity, "bfloat16", 1, 768)["total"] is None  # velocity has 64 channels


def test_at_3_mb_an_image_a_trainer_eats_a_gigabyte_per_second(tmp_path):
    found = estimate(flux_plan(pool=2, with_images=False), Demand(batch=32, steps_per_second=10), tmp_path, None)
    assert found["reading"]["needed"] == pytest.approx(1e9, rel=0.02)
    half = estimate(flux_plan(pool=2, with_images=False), Demand(timesteps=(10, 28)), tmp_path, None)
    assert 2 * half["reading"]["needed"] == found["reading"]["needed"]


def test_too_little_bandwidth_or_space_is_a_warning_that_says_what_would_do(tmp_path):
    plan = flux_plan(count=10**9)
    found = estimate(plan, Demand(bandwidth=1.5e9), tmp_path / "not" / "there", None)
    slow, full = found["warnings"]
    assert "--bandwidth gives 1.5 GB/s; --encoding int8 --pool 2 would do" in slow
    assert "free" in full
    assert not found["disk"]["fits"]
    assert estimate(flux_plan(1), Demand(bandwidth=1e12), tmp_path, None)["warnings"] == []
    hopeless = estimate(flux_plan(1), Demand(bandwidth=1.0), tmp_path, None)
    assert "fewer timesteps" in hopeless["warnings"][0]


def test_hours_follow_from_the_rate(tmp_path):
    found = estimate(flux_plan(views=("canonical", "hflip")), Demand(), tmp_path, TeacherRate(5.0, "given"))
    assert found["teacher_time"]["hours"] == pytest.approx(2 * CARS_TRAIN / 5 / 3600)
    assert f"{2 * CARS_TRAIN:,} images at 5/s (given)" in estimate_text(found)


def test_an_encoding_that_does_not_fit_the_teacher_is_refused(tmp_path):
    with pytest.raises(InvalidEncoding, match="no 4000 principal components"):
        estimate(flux_plan(pca=4000), Demand(), tmp_path, None)
    with pytest.raises(DitDistillError, match="--trainer-timesteps 12 would not be in the cache"):
        estimate(flux_plan(), Demand(timesteps=(12,)), tmp_path, None)


def test_an_estimate_of_a_data_set_is_what_its_build_then_takes(teacher, flux_folder, tiny_dataset, tmp_path):
    config = BuildConfig(
        timesteps=(16, 28),
        views=("canonical", "hflip"),
        image_size=32,
        image_format="png",
        batch=8,
        encoding="float8_e4m3",
        pool=2,
        pca=8,
        store="webdataset",
    )
    outline = outline_teacher(str(flux_folder), resolution=teacher.resolution)
    plan = plan_cache(outline, config, tiny_dataset, None)
    size = size_of(estimate(plan, Demand(), tmp_path, None), "float8_e4m3", 2, 8)
    sealed = build(teacher, tiny_dataset, config, tmp_path / "cache", log=str)
    assert plan.rows == sealed.dataset.feature_rows
    assert plan.image_rows == len(tiny_dataset.samples)
    assert size["features"] == sealed.bytes_features
    assert size["images"] == pytest.approx(sealed.bytes_images, rel=0.15)


def test_measuring_runs_the_teacher_on_as_many_images_as_asked(teacher, tiny_dataset):
    config = BuildConfig(timesteps=(28,), batch=4, feature_splits=("train",))
    rate = measure_rate(teacher, tiny_dataset, config, 6)
    assert rate.images_per_second > 0
    assert rate.basis == "measured on cpu: 6 images in batches of 4"


def run(*options):
    return CliRunner().invoke(app, ["estimate", *options])


def test_the_command_prints_a_table_and_the_same_numbers_as_json(tmp_path):
    options = ("--dataset", "cars", "--images", "8054", "--images-per-second", "5", "--output", str(tmp_path / "c"))
    text, document = run(*options).stdout, json.loads(run(*options, "--json").stdout)
    assert size_of(document, "int8")["bytes_per_image"] == 2 * 4 * 1024 * (3072 + 4)  # both views
    for fact in ("8,054 with features", "32×32 tokens × 3072", "* int8", "25.2 MB", "0.895 hours"):
        assert fact in text


def test_the_command_measures_student_images_and_the_teacher_where_the_data_is_there():
    document = json.loads(run("--limit", "2", "--measure", "2", "--json", "--teacher-batch", "2").stdout)
    assert document["rows"] == {"features": 6, "images": 6}
    assert document["image"]["basis"] == "mean of 6 images of the data set, encoded"
    assert document["teacher_time"]["images_per_second"] > 0
    assert "measured" in document["teacher_time"]["basis"]


def test_without_the_data_set_the_error_names_the_way_out(tmp_path):
    with pytest.raises(DitDistillError, match="or give --images N to estimate without the data set"):
        CliRunner().invoke(app, ["estimate", "--dataset", "cars", "--data", str(tmp_path)], catch_exceptions=False)


def test_estimating_loads_no_model_library():
    script = (
        "import sys; sys.argv = ['dit-cache', 'estimate', '--dataset', 'cars', '--images', '5']\n"
        "from pipeline.cli import main\n"
        "try: main()\n"
        "except SystemExit as leaving: assert not leaving.code\n"
        "assert not {'diffusers', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "flux-kontext at 512 px" in done.stdout
