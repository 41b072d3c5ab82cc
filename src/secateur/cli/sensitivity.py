"""``secateur sensitivity RECIPE``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from secateur.bench import SensitivityResult

_BARS = "▁▂▃▄▅▆▇█"


def sensitivity(
    recipe: Path = typer.Argument(..., help="A recipe file: .toml, .yaml or .json.", metavar="RECIPE"),
    run: Path | None = typer.Option(None, "--run", help="A run of this recipe, for its trained dense network."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Folder for sensitivity.json and the plot."),
    levels: str | None = typer.Option(
        None, "--levels", metavar="LIST", help="Sparsities with commas between; 0.1 to 0.99 by default."
    ),
    layers: list[str] = typer.Option([], "--layers", metavar="PATTERN", help="Only these weights. Repeatable."),
    metric: str | None = typer.Option(None, "--metric", help="A figure of the task, or loss; the first by default."),
    tolerance: float = typer.Option(
        0.01, "--tolerance", help="What a layer may lose: 0.01 is one point of accuracy, or 1 % of an error."
    ),
    repair_bn: bool = typer.Option(False, "--repair-bn", help="Match batch norms to the dense ones after pruning."),
    as_json: bool = typer.Option(False, "--json", help="Print the curves as JSON."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress."),
) -> None:
    """Prune each layer alone, at rising sparsity, without retraining: how much can it lose?

    Score and pattern are the recipe's. Evaluated on its validation data, or else
    on a part of the training data; never on the test data.

    For example:
    secateur sensitivity recipe.toml --run runs/first --out runs/first
    secateur sensitivity recipe.toml --layers 'conv*' --levels 0.5,0.9
    """
    from secateur.bench import recipe_sensitivity
    from secateur.cli.show import console, print_json
    from secateur.cli.source import importable
    from secateur.cli.watch import Watch
    from secateur.recipe import load

    wanted = load(recipe)
    importable(Path.cwd())
    with Watch("sensitivity", quiet=quiet or as_json) as watch:
        result = recipe_sensitivity(
            wanted,
            base=recipe.parent,
            weights=None if run is None else _dense_of(run),
            levels=None if levels is None else _levels(levels),
            layers=layers,
            metric=metric,
            repair_bn=repair_bn,
            progress=watch.progress,
        )
    if as_json:
        print_json(result.to_dict(tolerance))
    else:
        show(result, console(), tolerance)
    if out is not None:
        _write(result, out, tolerance, say=not as_json)


def _dense_of(run: Path) -> Path:
    from secateur.errors import CheckpointError

    path = run / "dense.safetensors"
    if not path.is_file():
        raise CheckpointError(f"--run {run}: there is no dense.safetensors in it; secateur run writes one")
    return path


def _levels(text: str) -> list[float]:
    from secateur.errors import TargetError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise TargetError(f"--levels {text}: expected numbers with commas between, such as 0.5,0.9") from None


def show(result: SensitivityResult, out: Console, tolerance: float) -> None:
    """Print a line per layer.

    Args:
        result: The curves.
        out: Where to print.
        tolerance: What a layer may lose.
    """
    from rich.text import Text

    from secateur.cli.show import put

    put(
        out,
        Text(f"Each layer pruned alone by {result.score}, {result.pattern}; no retraining.", style="bold"),
        Text(f"{_words(result.metric)} of the dense network: {result.dense:.4f}, on {result.evaluated_on}."),
        Text(),
        _table(result, out, tolerance),
        Text(),
    )
    lines = [f"safe up to: the highest level up to which every level loses less than {_allowed(result, tolerance)}."]
    if out.encoding.lower().startswith("utf"):
        lines.append(
            f"curve: {_words(result.metric)} at sparsity {', '.join(f'{level:g}' for level in result.levels)}; "
            "a full bar is the dense network's."
        )
    if any(abs(point.achieved - point.asked) > 0.005 for curve in result.curves for point in curve.points):
        lines.append("Not every level can be met: units are whole, and one stays. --json has what was achieved.")
    if result.repaired:
        lines.append("Batch norms were matched to the dense network's after each pruning.")
    lines += [f"Not looked at: {name}: {reason}." for name, reason in result.skipped.items()]
    for line in lines:
        put(out, Text(line, style="dim"))


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _allowed(result: SensitivityResult, tolerance: float) -> str:
    if not result.higher_is_better:
        return f"{tolerance:.3g} of the dense {_words(result.metric)}"
    points = tolerance * 100
    return f"{points:.3g} point{'' if points == 1 else 's'} of {_words(result.metric)}"


def _table(result: SensitivityResult, out: Console, tolerance: float) -> Table:
    from secateur.cli.show import plain_table

    bars = out.encoding.lower().startswith("utf")
    table = plain_table()
    table.add_column("layer", overflow="fold")
    table.add_column("weights", justify="right", no_wrap=True)
    if bars:
        table.add_column("curve", no_wrap=True)
    table.add_column("safe up to", justify="right", no_wrap=True)
    table.add_column("there", justify="right", no_wrap=True)
    table.add_column(f"at {result.levels[-1]:g}", justify="right", no_wrap=True)
    values = [point.value for curve in result.curves for point in curve.points]
    for curve in result.curves:
        best = result.highest(curve, tolerance)
        cells = [curve.name.removesuffix(".weight") or curve.name, f"{curve.total:,}"]
        if bars:
            cells.append("".join(_bar(point.value, result, values) for point in curve.points))
        cells += ["none" if best is None else f"{best.asked:g}", "" if best is None else f"{best.value:.4f}"]
        table.add_row(*cells, f"{curve.points[-1].value:.4f}")
    return table


def _bar(value: float, result: SensitivityResult, values: list[float]) -> str:
    """Draw a figure between the worst of all and the dense network's as one character."""
    if value != value:  # NaN
        return "!"
    worst = (min if result.higher_is_better else max)(v for v in values if v == v)
    span = result.dense - worst
    height = 1.0 if span == 0 else (value - worst) / span
    return _BARS[min(max(round(height * (len(_BARS) - 1)), 0), len(_BARS) - 1)]


def _write(result: SensitivityResult, out: Path, tolerance: float, *, say: bool) -> None:
    """Write JSON and plot; without matplotlib, the JSON alone."""
    import json
    import sys

    from secateur.bench import plot_sensitivity
    from secateur.checkpoint import write_atomic
    from secateur.cli.show import strict
    from secateur.errors import CheckpointError, MissingExtraError

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--out {out}: cannot be made: {error.strerror}") from None
    path = out / "sensitivity.json"
    write_atomic(path, json.dumps(strict(result.to_dict(tolerance)), indent=1).encode())
    written = [path]
    try:
        written += plot_sensitivity(result, out, tolerance=tolerance)
    except MissingExtraError as error:
        print(f"no plot: {error}", file=sys.stderr)
    if say:
        typer.echo("written: " + ", ".join(str(one) for one in written))
