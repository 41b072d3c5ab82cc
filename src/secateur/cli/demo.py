"""``secateur demo``: the whole library on real data in a minute."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import typer

_MARKER = ".secateur-demo"
_RECIPES = ("digits_unstructured", "digits_2_4", "digits_filters")


def demo(
    out: Path = typer.Option(Path("secateur-demo"), "--out", "-o", help="Where to write; an earlier demo is replaced."),
    as_json: bool = typer.Option(False, "--json", help="Print the three results on standard output."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress."),
) -> None:
    """Train a small network on handwritten digits and prune it in three ways.

    90 % of the weights in five rounds with retraining; 2 of every 4 weights; half of the filters. Needs the extra
    'demo' (scikit-learn, matplotlib), under two minutes and no network.
    """
    from secateur.cli.watch import Watch
    from secateur.pipeline.run import run as carry_out
    from secateur.recipe import load

    _make_room(out)
    command = "secateur " + " ".join(sys.argv[1:])
    here = Path(__file__).parent.parent / "recipes"
    results = []
    for name in _RECIPES:
        recipe = load(here / f"{name}.toml")
        with Watch(recipe.name, quiet=quiet or as_json) as watch:
            results.append(carry_out(recipe, out / name, base=out, listener=watch, command=command).result)
    from secateur.report import load_run, summary_table, write_report

    runs = [load_run(out / name) for name in _RECIPES]
    write_report(runs, out / "report.html", title="secateur demo: handwritten digits")
    if as_json:
        typer.echo(json.dumps(results, indent=1))
        return
    from rich.console import Console

    console = Console()
    console.print(summary_table(runs))
    console.print(f"report: {(out / 'report.html').resolve()}", soft_wrap=True, markup=False)


def _make_room(out: Path) -> None:
    """Replace an earlier demo, and nothing else."""
    from secateur.errors import CheckpointError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / _MARKER).exists():
            raise CheckpointError(f"{out} exists and is not an earlier demo; choose another place with --out")
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / _MARKER).touch()
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror}") from None
