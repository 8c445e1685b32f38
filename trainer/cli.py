"""The `dit-train` command: which sub-commands there are. Anything heavy is imported by the one that needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from cache_schema import cli as commands
from trainer.commands.eval import eval_run
from trainer.commands.report import report
from trainer.commands.run import run

app = typer.Typer(
    name="dit-train",
    help="Train a retrieval student from a teacher cache, evaluate it, report on it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run)
app.command("eval")(eval_run)
app.command("report")(report)


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `dit-train` command."""
    commands.run(app, interrupted_hint="run the same command again with --resume to continue where it stopped")
