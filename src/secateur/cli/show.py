"""Text and JSON for people and programs: what every verb prints goes through here."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table


def console() -> Console:
    """Return the console of standard output; a character that it cannot encode becomes a question mark."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False, soft_wrap=False)


def put(out: Console, *shown: RenderableType) -> None:
    """Print, and where nobody looks at a terminal leave out the spaces that fill up lines.

    Args:
        out: Where to print.
        shown: What to print, one after the other.
    """
    for one in shown:
        if out.is_terminal:
            out.print(one)
            continue
        with out.capture() as captured:
            out.print(one)
        out.file.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))


def indented(shown: RenderableType, spaces: int) -> Padding:
    """Move something to the right."""
    return Padding(shown, (0, 0, 0, spaces))


def print_json(values: Any) -> None:
    """Print JSON and nothing else; a number that JSON does not have (NaN, infinity) becomes ``null``."""
    print(json.dumps(strict(values), indent=1, allow_nan=False))


def strict(value: Any) -> Any:
    """Return a copy of plain values in which every number is one that JSON has."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value


def fit(build: Callable[[frozenset[str]], Table], out: Console, expendable: Sequence[str]) -> tuple[Table, list[str]]:
    """Leave out columns of a table, the most expendable first, until it fits the console.

    Args:
        build: Returns the table without the named columns.
        out: Where it will be printed.
        expendable: Columns that may go, in the order in which they go.

    Returns:
        The table, and the columns that had to go.
    """
    gone: list[str] = []
    table = build(frozenset())
    for name in expendable:
        if Measurement.get(out, out.options.update(width=10_000), table).maximum <= out.width:
            break
        gone.append(name)
        table = build(frozenset(gone))
    return table, gone


def plain_table() -> Table:
    """Return an empty table without lines, two spaces between columns."""
    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", collapse_padding=True)


def size(count: int) -> str:
    """Return a number of bytes in the largest unit that leaves at least one: ``"1.4 MB"``."""
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= step:
            return f"{count / step:.1f} {unit}"
    return f"{count} B"
