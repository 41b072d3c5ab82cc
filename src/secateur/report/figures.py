"""How each figure is read out of a profile, and how the pruned network's is set against the dense one's.

No ratio of latencies or energies is ever made while the mask is only a mask: such a network runs the dense kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from secateur.report.words import count, dig, exact, joules, number, percent, seconds, significant, size

COUNTED, MEASURED, MODELLED = "counted", "measured", "modelled"


@dataclass(frozen=True)
class Cell:
    """One figure as shown.

    Attributes:
        text: The figure, or ``"not measured"``.
        exact: All its digits, for a tooltip.
        detail: What the figure holds for, or why it is missing.
        value: The number behind it, where there is one.
        kind: Counted, measured or modelled, where that depends on the run.
        change: The difference to the dense network.
        dense: The dense figure of the same run, where every run has its own.
    """

    text: str
    exact: str = ""
    detail: str = ""
    value: float | None = None
    kind: str = ""
    change: str = ""
    dense: str = ""


Against = Callable[[Cell, Cell, str], str]
"""(dense, pruned, realised) -> the difference in words, or nothing."""


@dataclass(frozen=True)
class Figure:
    """A figure of a profile.

    Attributes:
        key: Stable name.
        label: Name for readers.
        tag: Counted, measured or modelled, unless the cells say it.
        detail: What it is.
        read: Profile to cell.
        against: Dense and pruned cell to their difference.
    """

    key: str
    label: str
    tag: str
    detail: str
    read: Callable[[Any], Cell]
    against: Against


def missing(reason: str) -> Cell:
    """Return the cell of a figure that nobody measured."""
    return Cell("not measured", detail=reason)


def number_cell(value: Any, show: Callable[[float], str], *, detail: str = "", reason: str = "not recorded") -> Cell:
    """Return the cell of a number, or of its absence.

    Args:
        value: Perhaps a number.
        show: Number to text.
        detail: What it holds for.
        reason: Why it is missing, where it is.

    Returns:
        The cell.
    """
    found = number(value)
    return missing(reason) if found is None else Cell(show(found), exact(found), detail, found)


def remaining(profile: Any) -> float | None:
    """Return the parameters that stay: all, less those that a mask removes."""
    total, prunable, kept = (number(dig(profile, "params", key)) for key in ("total", "prunable", "prunable_kept"))
    return None if total is None or prunable is None or kept is None else total - prunable + kept


# Readers


def _at(show: Callable[[float], str], *path: str) -> Callable[[Any], Cell]:
    return lambda profile: number_cell(dig(profile, *path), show)


def _read_remaining(profile: Any) -> Cell:
    return number_cell(remaining(profile), count)


def _read_macs(key: str) -> Callable[[Any], Cell]:
    def read(profile: Any) -> Cell:
        macs = dig(profile, "macs")
        given = dig(macs, "input")
        return number_cell(
            dig(macs, key),
            count,
            detail=f"input {given}" if given else "",
            reason=str(dig(macs, "not_measured") or "not recorded"),
        )

    return read


def read_latency(profile: Any) -> Cell:
    """Read a measured latency: median, with percentiles, and the conditions it holds under."""
    found = dig(profile, "latency")
    middle, low, high = (number(dig(found, key)) for key in ("median_ms", "p10_ms", "p90_ms"))
    if middle is None or low is None or high is None:
        return missing(str(dig(found, "not_measured") or "not asked for"))
    span = f"[{significant(low)}\u2013{significant(high)}]"
    digits = f"median {middle!r} ms, p10 {low!r} ms, p90 {high!r} ms"
    threads = dig(found, "threads")
    conditions = {
        "runs": f"{dig(found, 'runs')} runs",
        "threads": f"{threads} {'thread' if threads == 1 else 'threads'}",
        "batch": f"batch {dig(found, 'batch')}",
        "device": str(dig(found, "device")),
        "dtype": str(dig(found, "dtype")),
    }
    known = ", ".join(text for key, text in conditions.items() if dig(found, key) is not None)
    return Cell(f"{seconds(middle / 1000)} {span}", digits, known, middle)


def _read_peak(profile: Any) -> Cell:
    memory = dig(profile, "memory")
    kind = str(dig(memory, "not_measured") or dig(memory, "kind") or "not recorded")
    detail = "" if kind == MEASURED else kind
    return number_cell(dig(memory, "peak_rss_bytes"), size, detail=detail, reason=kind.removeprefix("not measured: "))


def _read_energy(profile: Any) -> Cell:
    energy = dig(profile, "energy")
    kind = str(dig(energy, "not_measured") or dig(energy, "kind") or "not asked for")
    value = number(dig(energy, "joules"))
    if value is None:
        return missing(kind.removeprefix("not measured: "))
    return Cell(joules(value), exact(value), kind, value, MODELLED if MODELLED in kind else MEASURED)


# Differences


def _none(dense: Cell, pruned: Cell, realised: str) -> str:
    return ""


def _share(dense: Cell, pruned: Cell, realised: str) -> str:
    if not dense.value or pruned.value is None or dense.detail != pruned.detail:
        return ""
    ratio = pruned.value / dense.value
    if ratio == 1:
        return "as dense"
    return f"{percent(ratio)} of dense" if math.isfinite(ratio) else ""


def _speed(dense: Cell, pruned: Cell, realised: str) -> str:
    if realised == "mask" or not dense.value or not pruned.value:
        return ""
    if dense.detail != pruned.detail:
        return "not compared: measured under other conditions than dense"
    ratio = dense.value / pruned.value
    return f"speed-up {significant(ratio)}\u00d7" if ratio >= 1 else f"slower: {significant(1 / ratio)}\u00d7 the time"


def _energy(dense: Cell, pruned: Cell, realised: str) -> str:
    return "" if realised == "mask" else _share(dense, pruned, realised)


FIGURES = (
    Figure(
        "params", "Parameters", COUNTED, "weights and biases, zeros included", _at(count, "params", "total"), _share
    ),
    Figure("nonzero", "Nonzero parameters", COUNTED, "not exactly zero", _at(count, "params", "nonzero"), _share),
    Figure("compression", "Compression ratio", COUNTED, "original / remaining parameters", _read_remaining, _none),
    Figure("macs", "MACs, dense", COUNTED, "multiply-accumulates of one forward pass", _read_macs("dense"), _share),
    Figure(
        "macs_weighted",
        "MACs, theoretical",
        COUNTED,
        "density-weighted: if every zero could be skipped; no promise of speed",
        _read_macs("density_weighted"),
        _share,
    ),
    Figure("size", "Storage", COUNTED, "safetensors file", _at(size, "storage", "size_bytes"), _share),
    Figure(
        "deflate",
        "Storage, deflated",
        MEASURED,
        "the same file, compressed without loss",
        _at(size, "storage", "deflate_bytes"),
        _share,
    ),
    Figure(
        "csr",
        "Storage as CSR",
        MODELLED,
        "if only nonzero weights and their positions were stored",
        _at(size, "storage", "modelled", "csr_bytes"),
        _share,
    ),
    Figure(
        "bitmask",
        "Storage as bitmask",
        MODELLED,
        "if nonzero weights and one bit per position were stored",
        _at(size, "storage", "modelled", "bitmask_bytes"),
        _share,
    ),
    Figure("latency", "Latency", MEASURED, "one forward pass: median [p10\u2013p90] in ms", read_latency, _speed),
    Figure(
        "weight_memory", "Weight memory", COUNTED, "parameters and buffers", _at(size, "memory", "weight_bytes"), _share
    ),
    Figure("peak_memory", "Peak memory", MEASURED, "whole process, during one forward pass", _read_peak, _none),
    Figure("energy", "Energy", MEASURED, "one forward pass", _read_energy, _energy),
)
