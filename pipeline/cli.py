"""`dit-cache`: the heavy job. Model libraries are imported inside the commands, so that `--help` answers at once."""

import functools
from collections.abc import Callable
from typing import Any

import typer

from cache_schema import cli as commands
from pipeline.commands.annotate import annotate
from pipeline.commands.build import build
from pipeline.commands.convert import convert
from pipeline.commands.estimate import estimate
from pipeline.commands.inspect import info, verify
from pipeline.commands.options import DebugOption
from pipeline.commands.preview import preview
from pipeline.commands.probe import probe
from pipeline.commands.refine import refine
from pipeline.commands.run import run
from pipeline.commands.seal import seal
from pipeline.commands.share import find, gc, ls, pull, push, rm
from pipeline.datasets import DatasetOptionError

app = typer.Typer(
    name="dit-cache",
    help="Run a frozen diffusion transformer once per image and timestep, and share what it saw.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(debug: DebugOption = False) -> None:
    """Run a frozen diffusion transformer once per image and timestep, and share what it saw."""


def _with_usage_errors(command: Callable[..., None]) -> Callable[..., None]:
    """The command, for which an option that its data set does not take is wrong usage."""

    @functools.wraps(command)
    def checked(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except DatasetOptionError as error:
            raise typer.BadParameter(str(error)) from None

    return checked


_HERE = (run, annotate, estimate, probe, refine, build, convert, info, preview, verify, seal)
_ELSEWHERE = (push, pull, ls, find, rm, gc)
for command in (*_HERE, *_ELSEWHERE):
    app.command()(_with_usage_errors(command))


def main() -> None:
    """Entry point of `dit-cache`."""
    commands.run(app, name="dit-cache")


if __name__ == "__main__":
    main()
