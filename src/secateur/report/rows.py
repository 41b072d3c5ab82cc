"""The rows of the comparison, dense beside pruned: made once, shown on the page and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.report.figures import COUNTED, FIGURES, MEASURED, Cell, Figure, missing
from secateur.report.load import RunRecord
from secateur.report.words import (
    NARROW,
    brief,
    count,
    dig,
    exact,
    fraction,
    is_share,
    number,
    percent,
    plain,
    sign,
    significant,
)

NOT_FASTER = "The removed weights are zeros held by a mask: nothing has been made faster yet."

_OPTIONAL = ("csr", "bitmask")
"""Rows left out, rather than shown as not measured, where no run has them."""

_SECOND_DIGIT = 5000
"""Examples from which a share of them is worth a second digit."""


@dataclass(frozen=True)
class Row:
    """One figure of every network.

    Attributes:
        key: Stable name.
        label: Name for readers.
        tag: ``"counted"``, ``"measured"``, ``"modelled"``, or two of them where the runs differ.
        detail: What the figure is, and under which conditions where those are the same for all.
        dense: Figure of the dense network; ``None`` where it has none, or where every run has its own.
        pruned: Figure of each run's pruned network.
    """

    key: str
    label: str
    tag: str
    detail: str
    dense: Cell | None
    pruned: tuple[Cell, ...]


def same_dense(runs: Sequence[RunRecord]) -> bool:
    """Whether all runs started from one dense network: equal quality, size and work."""

    def mark(run: RunRecord) -> tuple[Any, ...]:
        profile = dig(run.result, "profile", "dense")
        return dig(run.result, "quality", "dense"), dig(profile, "params", "total"), dig(profile, "macs", "dense")

    return len(runs) == 1 or (mark(runs[0])[0] is not None and all(mark(run) == mark(runs[0]) for run in runs))


def summary_rows(runs: Sequence[RunRecord]) -> tuple[Row, ...]:
    """Compare dense and pruned in every figure that there is.

    Args:
        runs: One or several runs.

    Returns:
        Rows in a fixed order: quality, target, sizes, work, storage, time, memory, energy.
    """
    figures = [_figure_row(figure, runs) for figure in FIGURES]
    shown = [r for r in figures if r.key not in _OPTIONAL or any(cell.value is not None for cell in r.pruned)]
    return (*_quality_rows(runs), *_target_rows(runs), *shown)


def _filled(head: Row, pairs: Sequence[tuple[Cell, Cell]], changes: Sequence[str]) -> Row:
    """Set pairs of dense and pruned cells side by side; what holds for all of them is said once, in the row."""
    cells = [cell for pair in pairs for cell in pair if cell.value is not None]
    details = {cell.detail for cell in cells}
    common = details.pop() if len(details) == 1 else ""
    kinds = sorted({cell.kind for cell in cells if cell.kind})

    def lifted(cell: Cell) -> Cell:
        return replace(cell, detail="") if common and cell.value is not None else cell

    dense, pruned = ([lifted(pair[side]) for pair in pairs] for side in (0, 1))
    shared = all(cell == dense[0] for cell in dense)
    return replace(
        head,
        tag=" / ".join(kinds) or head.tag,
        detail="; ".join(filter(None, (head.detail, common))),
        dense=dense[0] if shared else None,
        pruned=tuple(
            replace(ours, change=change, dense="" if shared else theirs.text)
            for ours, theirs, change in zip(pruned, dense, changes, strict=True)
        ),
    )


# Quality


def quality_names(run: RunRecord) -> list[str]:
    """Return the names of a run's quality figures: the headline first, the loss last."""
    quality = dig(run.result, "quality")
    listed = [*(dig(run.result, "higher_is_better") or {}), *(dig(quality, "pruned") or {})]
    names = [*(name for name in dict.fromkeys(listed) if name not in ("n", "loss")), "loss"]
    return [n for n in names if any(number(dig(quality, which, n)) is not None for which in ("dense", "pruned"))]


def quality_text(name: str, value: float, n: Any = None) -> str:
    """Return a quality figure as text; a share of many examples gets a second digit."""
    if not is_share(name):
        return significant(value, 4)
    return percent(value, 2 if isinstance(n, int) and n >= _SECOND_DIGIT else 1)


def difference_text(name: str, dense: float, pruned: float) -> str:
    """Return a signed difference: points for shares, the figure's own unit otherwise; nothing where one is NaN."""
    change = pruned - dense
    if not math.isfinite(change):
        return ""
    return f"{sign(change)}{f'{abs(100 * change):.2f}{NARROW}points' if is_share(name) else significant(abs(change))}"


def _quality_rows(runs: Sequence[RunRecord]) -> list[Row]:
    names = list(dict.fromkeys(name for run in runs for name in quality_names(run)))
    names.sort(key=lambda name: name == "loss")
    return [_quality_row(name, runs) for name in names]


def _quality_row(name: str, runs: Sequence[RunRecord]) -> Row:
    higher = next((h for run in runs if (h := dig(run.result, "higher_is_better", name)) is not None), None)
    if higher is None and name == "loss":
        higher = False
    better = "" if higher is None else "higher is better" if higher else "lower is better"
    spread = "± one standard error" if "accuracy" in name else ""
    detail = "; ".join(filter(None, (better, spread)))
    pairs = [(_quality_cell(name, run, "dense"), _quality_cell(name, run, "pruned")) for run in runs]
    changes = [
        "" if dense.value is None or pruned.value is None else difference_text(name, dense.value, pruned.value)
        for dense, pruned in pairs
    ]
    head = Row(f"quality_{name}", plain(name).capitalize(), MEASURED, detail, None, ())
    return _filled(head, pairs, changes)


def _quality_cell(name: str, run: RunRecord, which: str) -> Cell:
    quality = dig(run.result, "quality", which)
    value, n = number(dig(quality, name)), dig(quality, "n")
    if value is None:
        return missing("no such figure in this run" if quality else f"there was no {which} network in this run")
    text = quality_text(name, value, n)
    # The binomial standard error: right for a share of right answers, not for every figure between 0 and 1; and
    # its plain form says 0, falsely, at 0 and at 1.
    if "accuracy" in name and isinstance(n, int) and n > 0 and 0 < value < 1:
        error = 100 * math.sqrt(value * (1 - value) / n)
        text = f"{text} ±{NARROW}{error:.{2 if n >= _SECOND_DIGIT else 1}f}"
    return Cell(text, exact(value), f"n = {count(n)} examples" if number(n) is not None else "", value)


# Target


def target_text(target: str, value: Any) -> str:
    """Return a target's value as text: a fraction, a ratio or a count."""
    found = number(value)
    if found is None:
        return "not given"
    if target == "compression_ratio":
        return f"{significant(found, 4)}\u00d7"
    return brief(found) if 0 <= found <= 1 else count(found)


def asked_text(prune: Any) -> str:
    """Say what was asked for; that training found it, where nothing was."""
    target = str(dig(prune, "target") or "target")
    if number(dig(prune, "found")) is not None:
        return "found by training"
    return f"asked {target_text(target, dig(prune, 'asked'))}"


def achieved_text(target: str, value: float) -> str:
    """Return what was achieved: like the target, a fraction always with four digits."""
    return fraction(value) if target != "compression_ratio" and 0 <= value <= 1 else target_text(target, value)


def _target_rows(runs: Sequence[RunRecord]) -> list[Row]:
    targets = [str(dig(run.result, "prune", "target") or "target") for run in runs]
    cells = []
    for run, target in zip(runs, targets, strict=True):
        asked, achieved = dig(run.result, "prune", "asked"), number(dig(run.result, "prune", "achieved"))
        said = asked_text(dig(run.result, "prune")) + ("" if target == "sparsity" else f" ({plain(target)})")
        found = missing(said)
        if achieved is not None:
            digits = f"achieved {achieved!r}" if asked is None else f"asked {asked!r}, achieved {achieved!r}"
            found = Cell(achieved_text(target, achieved), digits, said, achieved)
        cells.append(found)
    meaning = "fraction of the prunable weights that was removed"
    if set(targets) == {"sparsity"}:
        return [Row("target", "Sparsity achieved", COUNTED, meaning, None, tuple(cells))]
    sparsities = [number(dig(run.result, "prune", "sparsity")) for run in runs]
    plainly = tuple(missing("not recorded") if s is None else Cell(fraction(s), exact(s), value=s) for s in sparsities)
    return [
        Row("target", "Target achieved", COUNTED, "counted on the masks, beside what was asked", None, tuple(cells)),
        Row("sparsity", "Sparsity", COUNTED, meaning, None, plainly),
    ]


# Profile


def _figure_row(figure: Figure, runs: Sequence[RunRecord]) -> Row:
    profiles = [dig(run.result, "profile") for run in runs]
    pairs = [(figure.read(dig(p, "dense")), figure.read(dig(p, "pruned"))) for p in profiles]
    head = Row(figure.key, figure.label, figure.tag, figure.detail, None, ())
    if figure.key != "compression":
        realised = [str(run.result.get("realised")) for run in runs]
        changes = [figure.against(*pair, how) for pair, how in zip(pairs, realised, strict=True)]
        return _filled(head, pairs, changes)
    totals = [number(dig(p, "dense", "params", "total")) for p in profiles]
    ratios = [_compression(total, pruned) for total, (_, pruned) in zip(totals, pairs, strict=True)]
    return replace(head, dense=Cell("1\u00d7", "1", value=1.0), pruned=tuple(ratios))


def _compression(total: float | None, left: Cell) -> Cell:
    if total is None or not left.value:
        return missing("no parameters recorded")
    ratio = total / left.value
    digits = f"{total!r} / {left.value!r} = {ratio!r}"
    return Cell(f"{significant(ratio)}\u00d7", digits, f"{left.text} of {count(total)} remain", ratio)
