"""The command line. Each verb is a file; none imports torch before it runs, so that ``--help`` answers at once.

Exit codes: 0 done; 1 an unexpected error (with its traceback); 2 the request was refused (one message); 130
interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from secateur.cli import demo, explain, export, inspect, ls, prune, run, sensitivity
from secateur.errors import SecateurError

app = typer.Typer(
    name="secateur",
    help="Make trained PyTorch networks smaller and faster by pruning, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 an unexpected error, 2 refused with one message, 130 interrupted.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from secateur import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Hold the options that come before the verb."""


app.command("run")(run.run)
app.command("demo")(demo.demo)
app.command("inspect")(inspect.inspect)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("prune")(prune.prune)
app.command("verify")(prune.verify)
app.command("export")(export.export)
app.command("ls")(ls.ls)
app.command("explain")(explain.explain)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        The exit code.
    """
    try:
        app(args=None if argv is None else list(argv), prog_name="secateur")
    except SecateurError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # typer ends every command with one: 0, 2 for wrong usage, 130 for Ctrl-C
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0
