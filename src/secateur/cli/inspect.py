"""``secateur inspect MODEL``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from secateur.cli.source import Source
    from secateur.inspection import InspectedWeight, Inspection


def inspect(
    model: str = typer.Argument(
        ..., help="package.module:factory, file.py:factory, a recipe file or a run directory.", metavar="MODEL"
    ),
    weights: Path | None = typer.Option(None, "--weights", help="Weights to load: .safetensors, .pt or .pth."),
    pruned: Path | None = typer.Option(None, "--pruned", help="Folder of secateur prune: cut and loaded as it says."),
    inputs: list[str] = typer.Option(
        [], "--input", metavar="SHAPE", help="Shape of an input, to count MACs: 1,3,224,224 or 1,128:int64. Repeatable."
    ),
    include: list[str] = typer.Option([], "--include", metavar="PATTERN", help="Prune only these. Repeatable."),
    exclude: list[str] = typer.Option([], "--exclude", metavar="PATTERN", help="Leave these alone. Repeatable."),
    types: list[str] = typer.Option([], "--types", metavar="CLASS", help="Only modules of this class. Repeatable."),
    masks: Path | None = typer.Option(None, "--masks", help="Masks to count by, instead of zeros."),
    base: Path | None = typer.Option(None, "--base", help="Folder of a run's recipe, if it names a file.py."),
    groups: bool = typer.Option(False, "--groups", help="Show coupled groups instead: what must be pruned together."),
    explain: str | None = typer.Option(None, "--explain", metavar="LAYER", help="With --groups: one layer's, and why."),
    every: bool = typer.Option(False, "--all", "-a", help="One row for every bias and norm too."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Show what a model is made of: which weights can be pruned, which not and why, zeros, MACs.

    For example:
    secateur inspect torchvision.models:resnet50 --input 1,3,224,224
    secateur inspect net.py:make --weights net.safetensors --exclude 'head*'
    secateur inspect runs/first
    secateur inspect net.py:make --input 1,3,32,32 --groups
    """
    from secateur.checkpoint import load_masks
    from secateur.cli.show import console, print_json
    from secateur.cli.source import open_source, parse_inputs
    from secateur.inspection import inspect_model

    source = open_source(model, weights=weights, base=base, pruned=pruned)
    if groups or explain:
        show_groups(source, inputs, explain, as_json=as_json)
        return
    prune = source.recipe.prune if source.recipe is not None else None
    seen = inspect_model(
        source.model,
        inputs=parse_inputs(inputs) if inputs else None,
        masks=load_masks(masks) if masks is not None else source.masks,
        include=include or (prune.include if prune else ()),
        exclude=exclude or (prune.exclude if prune else ()),
        types=types or (prune.types if prune else ()),
    )
    if as_json:
        print_json({"source": source.name, **seen.to_dict()})
        return
    show(seen, source.name, console(), every=every)


def show_groups(source: Source, inputs: list[str], layer: str | None, *, as_json: bool) -> None:
    """Print what must be pruned together, and what cannot be pruned and why.

    Args:
        source: The model.
        inputs: Shapes of its inputs; a recipe's own data by default.
        layer: One layer only.
        as_json: Print JSON instead.
    """
    from rich.text import Text

    from secateur.cli.prune import example_of
    from secateur.cli.show import console, plain_table, print_json, put
    from secateur.structure import find_groups

    found = find_groups(source.model, example_of(source, inputs))
    if as_json:
        print_json({"source": source.name, **found.to_dict()})
        return
    out = console()
    if layer is not None:
        put(out, Text(found.explain(layer)))
        return
    table = plain_table()
    table.add_column("group", overflow="fold")
    table.add_column("units", justify="right", no_wrap=True)
    table.add_column("goes together", overflow="fold")
    for group in found.groups:
        table.add_row(group.name, str(group.units), ", ".join(group.members))
    put(out, Text(f"{source.name}: {len(found.groups)} coupled groups", style="bold"), table, Text())
    for kind, more in (("experts", found.experts), ("residual blocks", found.layers)):
        for group in more:
            put(out, Text(f"{group.name}: {group.units} {kind} that can go"))
    for name, why in found.fixed.items():
        put(out, Text(f"{name}: {why}", style="dim"))


def show(seen: Inspection, name: str, out: Console, *, every: bool = False) -> None:
    """Print the table and what belongs to it.

    Args:
        seen: What was found.
        name: What to call the model.
        out: Where to print.
        every: One row for each bias and norm, instead of one for all.
    """
    from rich.text import Text

    from secateur.cli.show import fit, put

    table, gone = fit(lambda without: _table(seen, without, every), out, ("share", "type", "kept"))
    put(out, Text(f"{name}: {seen.model}", style="bold"), table, Text())
    for line in _remarks(seen, every):
        put(out, Text(line))
    if gone:
        note = f"Left out to fit {out.width} columns: {', '.join(gone)}; --json has everything."
        put(out, Text(note, style="dim"))


def _table(seen: Inspection, without: frozenset[str], every: bool) -> Table:
    from secateur.cli.show import plain_table

    columns = ["layer", "type", "shape", "params", "share", "prune"]
    if _any_removed(seen):
        columns += ["kept", "sparsity"]
    if seen.macs is not None:
        columns += ["MACs"]
    columns = [name for name in columns if name not in without]
    table = plain_table()
    for name in columns:
        left = name in ("layer", "type", "shape", "prune")
        table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=name != "layer")
    vectors = [row for row in seen.rows if _is_vector(row)]
    for row in seen.rows:
        if every or not _is_vector(row):
            cells = _cells(row.name.removesuffix(".weight") or row.name, [row], seen)
            cells |= {
                "type": row.type,
                "shape": "x".join(map(str, row.shape)),
                "prune": "yes" if row.prunable else "no",
            }
            table.add_row(*(cells.get(name, "") for name in columns), style=None if row.prunable else "dim")
    if vectors and not every:
        cells = _cells(f"{len(vectors)} biases and norms", vectors, seen) | {"prune": "no"}
        table.add_row(*(cells.get(name, "") for name in columns), style="dim")
    if seen.macs is not None and seen.macs.unattributed:
        cells = {"layer": "products without a weight", "MACs": f"{seen.macs.unattributed:,}"}
        table.add_row(*(cells.get(name, "") for name in columns), style="dim")
    table.add_section()
    total = _cells("total", seen.rows, seen)
    if seen.macs is not None:
        total["MACs"] = f"{seen.macs.dense:,}"
    table.add_row(*(total.get(name, "") for name in columns), style="bold")
    return table


def _cells(name: str, rows: Iterable[InspectedWeight], seen: Inspection) -> dict[str, str]:
    rows = list(rows)
    params, kept = sum(row.params for row in rows), sum(row.kept for row in rows)
    cells = {
        "layer": name,
        "params": f"{params:,}",
        "share": f"{params / seen.params:.1%}" if seen.params else "",
        "kept": f"{kept:,}",
    }
    if any(row.prunable for row in rows) or kept < params:
        cells["sparsity"] = f"{1 - kept / params:.2%}" if params else ""
    if seen.macs is not None:
        cells["MACs"] = f"{sum(row.macs or 0 for row in rows):,}"
    return cells


def _is_vector(row: InspectedWeight) -> bool:
    return not row.prunable and len(row.shape) < 2


def _any_removed(seen: Inspection) -> bool:
    return seen.masked or seen.kept < seen.params


def _remarks(seen: Inspection, every: bool) -> list[str]:
    lines = []
    share = seen.prunable / seen.params if seen.params else 0.0
    lines.append(f"Prunable: {seen.prunable:,} of {seen.params:,} parameters ({share:.1%}).")
    if _any_removed(seen):
        how = "stay by the masks" if seen.masked else "are not exactly zero"
        lines.append(
            f"Of these {seen.prunable_kept:,} {how}: sparsity {seen.sparsity:.2%} of what is prunable, "
            f"{1 - seen.kept / seen.params:.2%} of the whole model."
        )
    for reason, names in _reasons(seen, every).items():
        lines.append(f"Not pruned: {_some(names)}: {reason}.")
    for alias, name in seen.ties.items():
        lines.append(f"Tied: {alias} is {name}, counted once.")
    for name, number in seen.unmasked.items():
        lines.append(f"Warning: {number:,} weights of {name} are pruned by the mask and not zero.")
    return lines + _not_counted(seen)


def _reasons(seen: Inspection, every: bool) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for row in seen.rows:
        if not row.prunable and (every or not _is_vector(row)):
            reasons.setdefault(row.reason, []).append(row.name)
    return reasons


def _not_counted(seen: Inspection) -> list[str]:
    lines = []
    if seen.macs is None:
        lines.append("MACs: not counted; give the shape of an input with --input.")
    else:
        if _any_removed(seen):
            lines.append(
                f"MACs without the pruned weights: {seen.macs.density_weighted:,.0f} (theoretical; a masked model "
                f"still executes all {seen.macs.dense:,})."
            )
        lines.append(f"MACs are multiply-accumulates of one forward pass on {seen.macs.input}.")
        if seen.macs.uncounted:
            names = [f"{name.removeprefix('aten.')} ({n})" for name, n in seen.macs.uncounted.items()]
            lines.append(f"Operators without MACs that ran: {', '.join(names)}.")
    if seen.buffers:
        lines.append(f"Not in the table: buffers with {seen.buffers:,} elements.")
    return lines


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
