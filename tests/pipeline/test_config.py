"""One configuration: what presets, saved files, options and --set make of it, and what they refuse."""

import json
from pathlib import Path

import pytest
import typer
from cache_building import many_examples
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cache_schema.errors import DitDistillError
from pipeline.cli import app
from pipeline.config import SETTINGS, STEPS, ConfigError, make_config, save_config
from pipeline.datasets import dataset_names
from pipeline.presets import DATASETS, TEACHERS
from pipeline.teachers import PRESETS


def test_there_is_a_preset_of_every_data_set_and_every_named_teacher():
    assert sorted(DATASETS) == dataset_names()
    assert list(TEACHERS) == list(PRESETS)


@pytest.mark.parametrize("dataset", sorted(DATASETS))
@pytest.mark.parametrize("teacher", [None, *TEACHERS, "/some/folder"])
def test_every_pair_of_data_set_and_teacher_is_a_configuration(dataset, teacher):
    config = make_config(dataset, teacher)
    assert config.data.name == dataset
    assert config.teacher.name == teacher or ("demo" if dataset == "demo" else "flux-kontext")
    if teacher == "demo" or dataset == "demo":  # neither a detector nor a vision-language model
        assert (config.annotate.boxes, config.annotate.captions) == ("dataset", "dataset")
        assert (config.refine.steps, config.build.timesteps, config.build.image_size) == (200, (22, 28), 96)
    else:  # the paper's setting
        assert (config.annotate.boxes, config.annotate.captions) == ("detector", "vlm")
        assert (config.refine.steps, config.refine.batch, config.refine.lr, config.refine.rank) == (30_000, 1, 1e-4, 16)
        assert config.build.timesteps == (10, 16, 22, 28)


def test_the_teacher_has_the_last_word_over_the_data_set():
    assert make_config("nabirds").build.pool == 2
    assert make_config("nabirds", "demo").build.pool == 1
    assert make_config("nabirds", "demo", ["build.pool=3"]).build.pool == 3


def test_naming_another_data_set_or_teacher_in_a_setting_takes_its_presets():
    assert make_config("cars", None, ["teacher.name=demo"]) == make_config("cars", "demo")
    assert make_config(None, None, ["data.name=cub"]) == make_config("cub")


def test_a_setting_that_is_set_to_none_is_none_whatever_the_preset_says(flux_folder, tmp_path):
    assert make_config("cars").refine.grad_clip == 1
    assert make_config("cars", settings=["refine.grad_clip=none"]).refine.grad_clip is None
    command = ["refine", "--grad-clip", "none", "--teacher", str(flux_folder), "--resolution", "32", "--limit", "4",
               "--steps", "1", "--validation-images", "1", "--output", str(tmp_path / "lora")]  # fmt: skip
    assert CliRunner().invoke(app, command).exit_code == 0
    assert json.loads((tmp_path / "lora/refine.json").read_text())["config"]["grad_clip"] is None


def shown(strategy, text=str):
    """What a user types, and the value that is meant."""
    return strategy.map(lambda value: (text(value), value))


def typed(**values):
    return st.sampled_from(list(values.items()))


TYPED = {
    "refine.steps": shown(st.integers(1, 10**6)),
    "refine.lr": shown(st.floats(1e-9, 1, allow_subnormal=False)),
    "refine.gradient_checkpointing": typed(true=True, false=False, none=None),
    "build.timesteps": shown(
        st.sets(st.integers(1, 28), min_size=1).map(sorted), lambda steps: ",".join(map(str, steps))
    ),
    "build.views": shown(st.sampled_from([["canonical"], ["canonical", "hflip"]]), ", ".join),
    "build.pca": st.one_of(typed(none=None), shown(st.integers(1, 4096))),
    "build.text": typed(caption="caption", none="none"),
    "build.compression": st.sampled_from([("none", "none"), ("blosc:lz4", "blosc:lz4")]),
    "build.batch": st.one_of(typed(auto="auto"), shown(st.integers(1, 99))),
    "teacher.revision": st.sampled_from([("none", None), ("main", "main"), ("1e5", "1e5"), ("true", "true")]),
    "data.root": st.sampled_from([("none", None), ("/a/b", "/a/b"), ("7", "7")]),
    "data.train_classes": st.sampled_from([("none", None), ("wren,finch", ["wren", "finch"]), ("7", ["7"])]),
    "annotate.captions": typed(vlm="vlm", none="none"),
    "tolerance.max_bad": st.sampled_from([("0", 0.0), ("0.5", 0.5), ("1", 1.0)]),
}


@many_examples
@given(chosen=st.fixed_dictionaries({}, optional=TYPED))
def test_any_settings_survive_a_file_and_say_what_was_typed(tmp_path_factory, chosen):
    config = make_config("cars", "demo", [f"{name}={text}" for name, (text, _) in chosen.items()])
    path = tmp_path_factory.mktemp("config") / "run.json"
    save_config(config, path)
    assert SETTINGS.load(path) == config
    assert make_config(saved=path) == config
    values = SETTINGS.flat(config)
    assert set(values) == set(SETTINGS.fields)
    for name, (_, meant) in chosen.items():
        assert values[name] == meant
        assert type(values[name]) is type(meant)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("refine.step=3", "no such field: refine.step; did you mean refine.steps?"),
        ("timesteps=3", "no such field: timesteps; did you mean"),
        ("refine=3", "refine is a group of settings; name one of them, for example refine.steps"),
        ("refine.steps.x=3", "no such field: refine.steps.x; did you mean refine.steps?"),
        ("refine.steps", "--set refine.steps: write it as field=value"),
        ("refine.steps=x", "refine.steps: Input should be a valid integer (got 'x')"),
        ("refine.steps=2.5", "refine.steps: Input should be a valid integer"),
        ("refine.steps=true", "refine.steps: Input should be a valid integer (got True)"),
        ("refine.steps=none", "refine.steps: Input should be a valid integer (got 'none')"),
        ("refine.steps=0", "--steps must be at least 1, not 0"),
        ("refine.lr=NaN", "--lr must be positive, not nan"),
        ("build.timesteps=4,q", "build.timesteps: Input should be a valid integer (got 'q')"),
        ("build.timesteps=40", "timestep 40 is outside 1–28"),
        ("build.encoding=int3", "build.encoding: Input should be 'float32', 'float16'"),
        ("tolerance.max_bad=5", "--max-bad must lie from 0 to 1, not 5"),
        ("steps=build,annotate", "steps: name one or more of annotate, refine, probe, build, verify, each once"),
        ("steps=bake", "steps: Input should be 'annotate'"),
        ("data.limit=0", "--limit must be at least 1, not 0"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(setting, said):
    with pytest.raises(DitDistillError) as caught:
        make_config("demo", None, [setting])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a configuration that dit-cache run saved"),
        ("[]", "not a configuration that dit-cache run saved"),
        ("[" * 100_000, "not a configuration that dit-cache run saved"),
        ("{}", "data: Field required"),
        (
            '{"data": {"name": "demo"}, "teacher": {"name": "demo"}, "bild": {"pool": 2}}',
            "no such field: bild.pool; did",
        ),
        ('{"data": {"name": "demo"}, "teacher": {"name": "demo"}, "build": 3}', "build is a group of settings"),
        ('{"data": {"name": "demo"}, "teacher": {"name": "demo"}, "refine": {"steps": "3"}}', "refine.steps: Input"),
    ],
)
def test_a_wrong_file_is_one_clear_line_that_names_it(tmp_path, text, said):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        make_config(saved=path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no such configuration file"):
        make_config(saved=tmp_path / "gone.json")


def test_a_saved_configuration_can_be_changed_by_options_and_settings(tmp_path):
    path = tmp_path / "run.json"
    save_config(make_config("cars", "demo", ["refine.steps=7"], data__root=Path("/a")), path)
    config = make_config(None, "flux-dev", ["refine.rank=4"], saved=path, data__limit=5)
    assert (config.data.name, config.data.root, config.data.limit) == ("cars", Path("/a"), 5)
    assert (config.teacher.name, config.refine.steps, config.refine.rank) == ("flux-dev", 7, 4)


def test_a_path_in_a_saved_configuration_may_begin_with_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved = '{"data": {"name": "folder", "root": "~/birds"}, "teacher": {"name": "demo"}, "conditions": "~/kept"}'
    (tmp_path / "run.json").write_text(saved)
    config = SETTINGS.load(tmp_path / "run.json")
    assert (config.data.root, config.conditions) == (tmp_path / "birds", tmp_path / "kept")


def test_print_config_prints_what_config_reads(tmp_path):
    said = CliRunner().invoke(app, ["run", "--dataset", "cub", "--set", "build.pool=2", "--probe", "--print-config"])
    (tmp_path / "run.json").write_text(said.output)
    config = SETTINGS.load(tmp_path / "run.json")
    assert config.build.pool == 2
    assert config.steps == STEPS
    assert json.loads(said.output)["teacher"]["name"] == "flux-kontext"


# Options that are called otherwise than their field.
RENAMED = {"images": {"build": "with_images"}, "max_bad": {"build": "max_bad"}}
SHOWN = {"with_images": {True: "images"}, "max_bad": {0.01: "1%"}, "taps": {(): "all"}}


@pytest.mark.parametrize("name", ["annotate", "refine", "probe", "build", "estimate", "run"])
def test_the_defaults_that_help_shows_are_those_of_the_configuration(name):
    config = make_config("cars")
    command = typer.main.get_command(app).commands[name]
    parts = {"estimate": ("build",), "run": ("data", "teacher")}.get(name, (name,))
    checked = 0
    for parameter in command.params:
        if parameter.param_type_name != "option" or not isinstance(parameter.show_default, str):
            continue
        field = RENAMED.get(parameter.name, {}).get(name, parameter.name)
        holders = [getattr(config, part) for part in (*parts, "tolerance", "teacher")]
        value = next((getattr(h, field) for h in holders if hasattr(h, field)), None)
        if name == "run" and field == "dataset":
            value = make_config().data.name
        words = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert parameter.show_default == SHOWN.get(field, {}).get(value, words), parameter.name
        checked += 1
    assert checked >= 3
