"""Options that are made from fields: what help shows, what is wrong usage, and what reaches the command."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from cache_schema.options import Exposed, with_options
from cache_schema.settings import Setting, Settings, Values


def thousands(text):
    return int(text.removesuffix("k")) * 1000


@dataclass(frozen=True)
class Loop:
    epochs: Annotated[int, Setting("Passes over the images.", least=1)] = 30
    rate: Annotated[float, Setting("Learning rate.", above=0)] = 0.1
    updates: Annotated[int | None, Setting("Updates.", reads=thousands, metavar="N[k]")] = None
    store: Annotated[Literal["zarr", "webdataset"], Setting("Files.")] = "zarr"
    splits: Annotated[tuple[str, ...], Setting("Splits.", option="--features")] = ("train", "test")
    shuffle: Annotated[bool, Setting("Shuffle.")] = True
    exact: Annotated[bool, Setting("Exact.")] = False
    root: Annotated[Path | None, Setting("Folder.")] = None


class Loss(BaseModel, frozen=True):
    tau: float = Field(default=0.05, ge=0, le=1, description="Temperature.")


@dataclass(frozen=True)
class Train:
    timesteps: tuple[int, ...] | None = None
    device: str = "auto"
    other_device: str = "auto"
    loop: Loop = field(default_factory=Loop)
    loss: Loss = field(default_factory=Loss)


SETTINGS = Settings(Train, command="train", example="loop.epochs=3")
app = typer.Typer()
found: list[tuple[Values, Path | None]] = []


@app.command()
@with_options(
    SETTINGS,
    [
        *(name for name in SETTINGS.fields if name.startswith("loop") and name != "loop.shuffle"),
        Exposed("loop.shuffle", " /--no-shuffle", help="In order."),
        "loss.tau", "timesteps", Exposed("device", also=("other_device",)),
    ],
)  # fmt: skip
def train(given: Values, output: Annotated[Path | None, typer.Option(help="Where to.")] = None) -> None:
    """Train."""
    found.append((given, output))


def invoke(*arguments):
    found.clear()
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def test_only_what_is_typed_reaches_the_command():
    assert invoke("--output", "o").exit_code == 0
    assert found == [({}, Path("o"))]


def test_help_says_what_is_said_beside_the_field():
    shown = " ".join(invoke("--help").output.split())
    for words in (
        "--epochs <int range> [x>=1] Passes over the images. [default: (30)]",
        "--store <zarr|webdataset> Files. [default: (zarr)]",
        "--features A,B,… Splits. [default: (train,test)]",
        "--updates N[k] Updates.",
        "--tau <float range> [0<=x<=1] Temperature. [default: (0.05)]",
        "--no-shuffle",
        "--timesteps N,N,…",
        "Where to.",
    ):
        assert words in shown.replace("│ │", "").replace("  ", " ")
    assert "--exact/--no-exact" not in shown
    assert "--no-exact" not in shown


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--epochs", "0"], "--epochs': Input should be greater than or equal to 1"),
        (["--epochs", "many"], "--epochs"),
        (["--rate", "0"], "--rate: must be positive, not 0"),
        (["--rate", "fast"], "--rate: Input should be a valid number (got 'fast')"),
        (["--store", "disk"], "'disk' is not one of 'zarr', 'webdataset'"),
        (["--tau", "2"], "--tau': Input should be less than or equal to 1"),
        (["--timesteps", "4,q"], "--timesteps: Input should be a valid integer (got 'q')"),
        (["--updates", "xk"], "--updates"),
    ],
)
def test_what_a_field_does_not_accept_is_wrong_usage(typed, said):
    done = invoke(*typed)
    assert done.exit_code == 2
    assert said in " ".join(done.output.replace("│", " ").split())
    assert found == []


@pytest.mark.parametrize(
    ("typed", "setting"),
    [
        (["--epochs", "3"], "loop.epochs=3"),
        (["--rate", "1e-3"], "loop.rate=1e-3"),
        (["--updates", "3k"], "loop.updates=3k"),
        (["--store", "webdataset"], "loop.store=webdataset"),
        (["--features", "train, x"], "loop.splits=train, x"),
        (["--no-shuffle"], "loop.shuffle=false"),
        (["--exact"], "loop.exact=true"),
        (["--root", "/a"], "loop.root=/a"),
        (["--tau", "0.5"], "loss.tau=0.5"),
        (["--timesteps", "4,22"], "timesteps=4,22"),
        (["--timesteps", "none"], "timesteps=none"),
    ],
)
def test_an_option_and_a_setting_that_say_the_same_mean_the_same(typed, setting):
    assert invoke(*typed).exit_code == 0
    given, _ = found[0]
    assert SETTINGS.make({}, given) == SETTINGS.make({}, {}, [setting])
    # Also where a preset says something else.
    preset = {"timesteps": [1, 2], "loop": {"updates": 5, "shuffle": True}}
    assert SETTINGS.make(preset, given) == SETTINGS.make(preset, {}, [setting])


def test_an_option_may_set_several_fields():
    assert invoke("--device", "cuda").exit_code == 0
    assert found == [({"device": "cuda", "other_device": "cuda"}, None)]
