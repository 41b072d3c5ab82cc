"""``secateur export RUN_OR_MODEL``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from secateur.cli.source import Source
    from secateur.export import Export


def export(
    model: str = typer.Argument(
        ...,
        help="A run directory, a recipe file, package.module:factory or file.py:factory.",
        metavar="RUN_OR_MODEL",
    ),
    weights: Path | None = typer.Option(None, "--weights", help="Weights to load: .safetensors, .pt or .pth."),
    pruned: Path | None = typer.Option(None, "--pruned", help="Folder of secateur prune: cut and loaded as it says."),
    formats: list[str] = typer.Option(
        [],
        "--format",
        "-f",
        metavar="NAME",
        help="safetensors, onnx, pt2 or sparse. Repeatable; a run's own by default.",
    ),
    inputs: list[str] = typer.Option(
        [], "--input", metavar="SHAPE", help="Shape of an input: 1,3,224,224 or 1,128:int64. Repeatable."
    ),
    out: Path | None = typer.Option(None, "--out", "-o", help="Folder to write to: RUN/exports, or exports."),
    base: Path | None = typer.Option(None, "--base", help="Folder of a run's recipe, if it names a file.py."),
    as_json: bool = typer.Option(False, "--json", help="Print what was written, and its checks, as JSON."),
) -> None:
    """Write a model in other programs' formats, run each file and compare it with the model.

    ONNX runs in ONNX Runtime (extra 'onnx'); sparse is compiled for this CPU's
    sparse kernels. Example inputs are a run's own data.
    Pruned weights must be zero in the model and in every file.

    For example:
    secateur export runs/first --format onnx --format pt2
    secateur export net.py:make --weights net.pt -f onnx --input 1,3,32,32
    secateur export net.py:make --pruned small -f onnx --input 1,3,32,32
    """
    from rich.text import Text

    from secateur.cli.show import console, print_json, put
    from secateur.cli.source import open_source
    from secateur.cli.watch import Watch
    from secateur.export import export_model as write

    source = open_source(model, weights=weights, base=base, pruned=pruned)
    chosen = _formats(formats, source)
    args, kwargs = _example(source, inputs, chosen)
    folder = out or (Path(model) / "exports" if Path(model).is_dir() else Path("exports"))
    done: list[Export] = []
    with Watch(source.name, quiet=as_json) as watch:
        for number, name in enumerate(chosen):
            watch.progress(number, len(chosen), f"exporting {name}")
            done += write(source.model, args, kwargs, out_dir=folder, formats=[name], masks=source.masks)
    if as_json:
        print_json([item.to_dict() for item in done])
        return
    out_console = console()
    put(out_console, _table(done))
    for note in (note for item in done for note in item.notes):
        put(out_console, Text(f"Note: {note}"))
    out_console.print(
        f"written to {folder}: {', '.join(item.path.name for item in done)}", markup=False, soft_wrap=True
    )


def _formats(formats: list[str], source: Source) -> list[str]:
    """Settle what to write, and refuse an unknown name before anything is written."""
    from secateur.errors import ExportError, UnknownNameError, nearest
    from secateur.export import FORMATS

    chosen = list(dict.fromkeys(formats)) or list(source.recipe.export if source.recipe is not None else ())
    if not chosen:
        raise ExportError(f"nothing to write: say --format {', --format '.join(FORMATS)}, or several")
    for name in chosen:
        if name not in FORMATS:
            raise UnknownNameError(f"--format {name}: unknown export format; {nearest(name, FORMATS)}")
    return chosen


def _example(source: Source, inputs: list[str], chosen: list[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs: those asked for, or the first of the recipe's test data."""
    from secateur.cli.source import parse_inputs
    from secateur.errors import ExportError
    from secateur.pipeline.data import first_inputs
    from secateur.pipeline.factories import make_data

    if inputs:
        return parse_inputs(inputs), {}
    if chosen == ["safetensors"]:
        return (), {}  # weights alone: nothing runs
    if source.recipe is None:
        raise ExportError(
            f"{', '.join(n for n in chosen if n != 'safetensors')}: recording the model needs an example; give the "
            "shape of its input, such as --input 1,3,224,224"
        )
    data = make_data(source.recipe.data.factory, source.recipe.data.args, base=source.base)
    first = first_inputs(data.test, source.recipe.measure.batch)
    if isinstance(first, dict):
        return (), first
    return (tuple(first) if isinstance(first, tuple | list) else (first,)), {}


def _table(done: list[Export]) -> Table:
    from secateur.cli.show import plain_table, size

    table = plain_table()
    table.add_column("format", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("max difference", justify="right", no_wrap=True)
    table.add_column("checked", overflow="fold")
    for item in done:
        table.add_row(item.format, size(item.size_bytes), f"{item.max_difference:.2g}", item.checked)
    return table
