"""`dit-cache`: the heavy job. Model libraries are imported inside the commands, so that `--help` answers at once."""

import typer

from cache_schema.cli import run
from pipeline.commands.annotate import annotate
from pipeline.commands.build import build
from pipeline.commands.convert import convert
from pipeline.commands.estimate import estimate
from pipeline.commands.inspect import info, verify
from pipeline.commands.preview import preview
from pipeline.commands.probe import probe
from pipeline.commands.refine import refine
from pipeline.options import DebugOption

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


for command in (annotate, estimate, probe, refine, build, convert, info, preview, verify):
    app.command()(command)


def main() -> None:
    """Entry point of `dit-cache`."""
    run(app, name="dit-cache")


if __name__ == "__main__":
    main()
