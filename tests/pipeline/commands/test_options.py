"""The options that choose a data set and its training classes, as typed at the command line."""

import inspect
import subprocess
import sys
from typing import Literal, get_args, get_origin

import pytest
import typer
from dataset_layouts import save_image, write_cub, write_lines
from typer.testing import CliRunner

from cache_schema import open_cache
from pipeline.cli import app
from pipeline.commands.options import configured_by
from pipeline.config import SETTINGS, make_config, read_classes
from pipeline.datasets import DataError, dataset_names
from pipeline.teachers import PRESETS


def dit_cache(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300", "TERM": "dumb"})


@pytest.mark.parametrize("command", ["build", "refine", "probe"])
def test_help_lists_every_data_set(command):
    assert f"Data set: {', '.join(dataset_names())}" in dit_cache(command, "--help").output


@pytest.mark.parametrize("command", ["build", "refine", "probe"])
def test_help_lists_every_teacher(command):
    assert f"Preset ({', '.join(PRESETS)})" in dit_cache(command, "--help").output


@pytest.mark.parametrize("command", ["build", "refine", "probe"])
@pytest.mark.parametrize("option", [("--train-ratio", 0.5), ("--train-classes", "a,b"), ("--superclass", "bird")])
def test_choosing_classes_of_a_data_set_with_a_fixed_protocol_is_wrong_usage(tmp_path, command, option):
    done = dit_cache(command, "--dataset", "cub", "--data", write_cub(tmp_path), *option)
    assert done.exit_code == 2
    assert f"data set cub has a protocol of its own and does not take {option[0]}" in done.output


@pytest.mark.parametrize("ratio", ["0", "1", "-0.5", "nan"])
def test_a_share_outside_zero_and_one_is_wrong_usage(tmp_path, ratio):
    done = dit_cache("build", "--dataset", "folder", "--data", tmp_path, "--train-ratio", ratio)
    assert done.exit_code == 2
    assert "must lie between 0 and 1" in done.output


def test_class_names_come_from_a_list_or_from_a_file_with_one_per_line(tmp_path):
    assert read_classes("wren, Chuck-will's-widow") == ("wren", "Chuck-will's-widow")
    names = write_lines(tmp_path / "names.txt", ["Ducks, Geese, and Swans", "", "  wren "], end="\r\n")
    assert read_classes(str(names)) == ("Ducks, Geese, and Swans", "wren")
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read: No such file"):
        read_classes(str(tmp_path / "gone.txt"))


def test_a_folder_is_built_with_the_chosen_training_classes(tmp_path, flux_folder):
    for name in ("ant", "bee", "fly"):
        save_image(tmp_path / "data" / name / "1.png")
    (tmp_path / "data/ant/2.png").write_bytes(b"no image")
    names = write_lines(tmp_path / "names.txt", ["fly", "ant"])
    done = dit_cache(
        "build", "--dataset", "folder", "--data", tmp_path / "data", "--train-classes", names, "--superclass", "insect",
        "--teacher", flux_folder, "--resolution", 32, "--image-size", 16, "--encoding", "float32",
        "--output", tmp_path / "cache", "--device", "cpu", "--max-bad", "25%",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    cache = open_cache(tmp_path / "cache")
    rows = {row["id"]: (row["split"], row["state"], row["caption"]) for row in cache.samples.to_pylist()}
    assert rows == {
        "ant/1.png": ("train", "ok", "a photo of an insect"),
        "fly/1.png": ("train", "ok", "a photo of an insect"),
        "bee/1.png": ("test", "ok", "a photo of an insect"),
        "ant/2.png": ("train", "quarantined", "a photo of an insect"),
    }
    assert cache.manifest.dataset.protocol == "2 classes by name train, the other 1 test"
    assert cache.manifest.dataset.superclass == "insect"


COMMANDS = ("annotate", "refine", "probe", "build", "estimate", "run")


def options_of(command):
    """The options of a command."""
    callback = next(c.callback for c in app.registered_commands if c.callback.__name__ == command)
    return ["--" + name.replace("_", "-") for name in inspect.signature(callback).parameters]


def test_every_field_is_said_once_beside_it():
    for field in SETTINGS.fields.values():
        assert field.setting.help.endswith("."), field.name


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_says_a_sentence_of_a_field_again(command):
    sentences = {field.setting.help for field in SETTINGS.fields.values()}
    module = sys.modules[f"pipeline.commands.{command}"]
    assert not [s for s in sentences if s in inspect.getsource(module)]


@pytest.mark.parametrize("command", COMMANDS)
def test_choices_among_words_are_shown_and_others_are_wrong_usage(command):
    words = {
        field.option: word
        for field in SETTINGS.fields.values()
        for kind in (field.kind, *get_args(field.kind))
        if get_origin(kind) is Literal
        for word in get_args(kind)
        if field.name.startswith(("teacher.", f"{command}."))
    }
    helped = dit_cache(command, "--help").output
    checked = 0
    for option in options_of(command):
        if option in words and option != "--batch":
            assert words[option] in helped
            refused = dit_cache(command, option, "surely-not")
            assert refused.exit_code == 2
            assert "is not one of" in refused.output
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("refine.steps", "7"),
        ("refine.lr", "1e-3"),
        ("build.timesteps", "4,22"),
        ("build.views", "canonical, hflip"),
        ("build.batch", "auto"),
        ("build.batch", "3"),
        ("build.text", "none"),
        ("build.compression", "blosc:lz4"),
        ("build.pca", "64"),
        ("probe.taps", "all"),
        ("teacher.context", "reused"),
        ("teacher.revision", "1e5"),
        ("data.root", "7"),
        ("data.train_classes", "wren, finch"),
        ("tolerance.max_bad", "2%"),
        ("tolerance.max_bad", "0.02"),
        ("annotate.captions", "none"),
    ],
)
def test_an_option_and_a_setting_that_say_the_same_mean_the_same(field, text):
    found = []
    alone = typer.Typer()
    alone.command()(configured_by(field)(found.append))
    done = CliRunner().invoke(alone, [SETTINGS.field(field).option, text])
    assert done.exit_code == 0, done.output
    assert make_config("cars", **found[0]) == make_config("cars", None, [f"{field}={text}"])


@pytest.mark.parametrize("command", [*COMMANDS, "convert", "info", "preview", "verify"])
def test_help_of_a_command_imports_nothing_heavy(command):
    script = (
        f"import sys; sys.argv = ['x', {command!r}, '--help']\nimport pipeline.cli as m\n"
        "try: m.main()\nexcept SystemExit: pass\n"
        "print([n for n in ('torch', 'numpy', 'pyarrow', 'zarr') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "Usage" in done.stdout
    assert done.stderr.strip() == "[]"
