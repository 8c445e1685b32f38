"""The options that choose a data set and its training classes, as typed at the command line."""

import pytest
from dataset_layouts import save_image, write_cub, write_lines
from typer.testing import CliRunner

from cache_schema import open_cache
from pipeline.cli import app
from pipeline.config import read_classes
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
