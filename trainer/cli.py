"""The `dit-train` command: which sub-commands there are. Anything heavy is imported by the one that needs it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from cache_schema import cli as commands
from trainer.commands.ablate import ablate
from trainer.commands.bench import bench
from trainer.commands.embed import embed
from trainer.commands.eval import eval_run
from trainer.commands.export import export
from trainer.commands.index import index
from trainer.commands.report import report
from trainer.commands.search import search
from trainer.commands.serve import serve

app = typer.Typer(
    name="dit-train",
    help="Train a retrieval student from a teacher cache, evaluate it, report on it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Run(TyperCommand):
    """`run`, whose options are those of the configuration: they are made when they are asked for."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        from trainer.commands.run import run

        command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        command.command("run")(run)
        return typer.main.get_command(command).make_context(info_name, args, parent, **extra)


@app.command("run", cls=Run)
def run() -> None:
    """Train a student by a method: distilled from the cache's features (gcd), or alone (baseline)."""


app.command("eval")(eval_run)
app.command("report")(report)
app.command("ablate")(ablate)
app.command("export")(export)
app.command("embed")(embed)
app.command("index")(index)
app.command("search")(search)
app.command("serve")(serve)
app.command("bench")(bench)


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `dit-train` command."""
    commands.run(app, interrupted_hint="run the same command again (`run` with --resume) to continue where it stopped")


if __name__ == "__main__":  # torchrun -m trainer.cli
    main()
