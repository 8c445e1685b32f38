"""The last line of a command is where its result is and a command that goes on from there."""

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.chain.next_step import next_line
from pipeline.cli import app
from pipeline.config import STEPS, make_config


def following(line):
    return shlex.split(line[line.index("dit-") :])


@pytest.mark.parametrize("done", STEPS)
def test_every_step_says_where_its_result_is_and_what_comes_next(done):
    config = make_config("folder", "demo", data__root=Path("my birds"), data__train_classes=("wren", "sea gull"))
    line = next_line(done, config, Path("out put"), Path("lora"))
    assert "\n" not in line
    assert " is in out put; next" in line or " are in out put; next" in line
    program, command, *options = following(line)
    assert (program, command) == (
        ("dit-train", "run")
        if done in ("build", "verify")
        else ("dit-cache", "refine" if done == "annotate" else "build")
    )
    given = dict(zip(options[::2], options[1::2], strict=True))
    if program == "dit-train":
        assert given == {"--cache": "out put"}
    else:
        chosen = {"--dataset": "folder", "--data": "my birds", "--train-classes": "wren,sea gull", "--teacher": "demo"}
        result = {
            "annotate": {"--annotations": "out put"},
            "refine": {"--lora": "out put"},
            "probe": {"--lora": "lora"},
        }
        assert given == chosen | result[done]


@pytest.mark.parametrize("done", ["annotate", "refine", "probe"])
def test_the_next_command_has_only_options_that_there_are(done):
    config = make_config(
        "folder", "demo", data__limit=3, data__train_ratio=0.5, data__superclass="bird",
        data__annotations=Path("a.csv"), teacher__revision="main", teacher__resolution=96, teacher__context="joint",
        teacher__crop="square", teacher__guidance=1.0, teacher__input="object",
    )  # fmt: skip
    _, command, *options = following(next_line(done, config, Path("o"), Path("l")))
    result = CliRunner().invoke(app, [command, *options, "--no-such-option"])
    assert result.exit_code == 2
    assert "--no-such-option" in result.output


def test_the_next_command_runs_the_teacher_with_the_guidance_and_on_the_pixels_of_this_one():
    guided = make_config("demo", "demo", teacher__guidance=1.0)
    assert "--guidance 1.0" in next_line("refine", guided, Path("lora"))
    assert "--guidance" not in next_line("refine", make_config("demo", "demo"), Path("lora"))
    whole = make_config("demo", "timm:test_vit", teacher__input="image")
    assert "--input image" in next_line("probe", whole, Path("probe"))
