"""What the pages of the benchmarks on real models share."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

Cell = dict[str, Any]


def seeds_of(cells: dict[str, Cell], target: float) -> Iterator[tuple[str, list[Cell]]]:
    """Yield criteria with the cells of their seeds."""
    found: dict[str, list[Cell]] = {}
    for name, cell in cells.items():
        if name.startswith(f"prune/{target}/"):
            found.setdefault(cell["criterion"], []).append(cell)
    yield from found.items()


def spread_of(rows: list[Cell], repair: str, key: str, form: str) -> str:
    """Return the mean of a figure over seeds, with its range where there are several; nothing if it is missing."""
    values = [r[repair][key] for r in rows if repair in r]
    if not values:
        return ""
    text = format(mean(values), form)
    return text if len(values) == 1 else f"{text} ({format(min(values), form)} to {format(max(values), form)})"


def not_measured(result: dict[str, Any]) -> str:
    """Return the section that names the cells that are missing."""
    missing = result["missing"]
    if not missing:
        return ""
    return (
        "## Not measured yet\n\nThe same command makes these cells and keeps the others: "
        + ", ".join(f"`{name}`" for name in missing)
        + ".\n"
    )
