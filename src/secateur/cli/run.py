"""``secateur run RECIPE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer


def run(
    recipe: Path = typer.Argument(..., help="A recipe file: .toml, .yaml or .json."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Run directory. \\[default: runs/NAME]"),
    resume: bool = typer.Option(False, "--resume", help="Go on from the last checkpoint in the run directory."),
    check: bool = typer.Option(False, "--check", help="Validate the recipe and stop."),
    as_json: bool = typer.Option(False, "--json", help="Print result.json on standard output."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress."),
) -> None:
    """Carry out a recipe: train, prune, retrain, measure, export, report.

    Example: secateur run recipe.toml --out runs/first
    """
    from secateur.recipe import load

    wanted = load(recipe)
    if check:
        typer.echo(wanted.to_toml() if not as_json else json.dumps(wanted.to_dict(), indent=1))
        return
    from secateur.cli.source import importable
    from secateur.cli.watch import Watch
    from secateur.pipeline.run import run as carry_out

    for folder in (Path.cwd(), recipe.parent):
        importable(folder)
    directory = out or Path("runs") / wanted.name
    command = "secateur " + " ".join(sys.argv[1:])
    with Watch(wanted.name, quiet=quiet or as_json) as watch:
        try:
            done = carry_out(wanted, directory, base=recipe.parent, resume=resume, listener=watch, command=command)
        except KeyboardInterrupt:
            watch.console.print(
                f"interrupted; go on with: secateur run {recipe} --out {directory} --resume", markup=False
            )
            raise
    if as_json:
        typer.echo(json.dumps(done.result, indent=1))
        return
    from rich.console import Console

    from secateur.report import load_run, summary_table

    console = Console()
    console.print(summary_table([load_run(directory)]))
    console.print(f"report: {directory / 'report.html'}", soft_wrap=True, markup=False)
