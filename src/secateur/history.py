"""Reports of past pruning steps as plain values, and back: what a pruner's state remembers of them.

A training may prune a thousand times, so what all reports share (names, shapes, reasons) is written once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from secateur.errors import CheckpointError, check_whole
from secateur.types import GroupReport, LayerReport, PruneReport

_WHAT = "this pruner state: history"
_TEXTS = ("target", "ablation")
_NUMBERS = ("asked", "achieved", "goal", "sparsity")


def plain_history(reports: Iterable[PruneReport]) -> dict[str, Any]:
    """Write reports as plain values.

    Args:
        reports: The reports, oldest first.

    Returns:
        Dicts, lists, numbers and text.
    """
    tables: list[dict[str, Any]] = []
    rows = []
    for report in reports:
        table = {
            "layers": [[r.name, list(r.shape), r.total] for r in report.layers],
            "groups": [[g.name, g.units, list(g.members)] for g in report.groups],
            "skipped": dict(report.skipped),
        }
        if not tables or tables[-1] != table:  # it rarely changes, and never back
            tables.append(table)
        rows.append(
            {name: getattr(report, name) for name in (*_TEXTS, "finished")}
            | {name: float(getattr(report, name)) for name in _NUMBERS}
            | {
                "table": len(tables) - 1,
                "layers": [r.kept for r in report.layers],
                "groups": [g.kept for g in report.groups],
            }
        )
    return {"tables": tables, "reports": rows}


def read_history(plain: Any) -> list[PruneReport]:
    """Read what :func:`plain_history` wrote; anything else is refused.

    Args:
        plain: Values from a file that may hold anything.

    Returns:
        Equal reports.

    Raises:
        CheckpointError: Says what is wrong where.
    """
    whole = _entries(_WHAT, plain, {"tables": list, "reports": list})
    tables = [_table(f"{_WHAT}: table {i}", table) for i, table in enumerate(whole["tables"])]
    return [_report(f"{_WHAT}: report {i}", row, tables) for i, row in enumerate(whole["reports"])]


_Table = tuple[list[tuple[str, tuple[int, ...], int]], list[tuple[str, int, tuple[str, ...]]], dict[str, str]]


def _table(what: str, plain: Any) -> _Table:
    table = _entries(what, plain, {"layers": list, "groups": list, "skipped": dict})
    layers, groups = [], []
    for row in table["layers"]:
        name, shape, total = _items(what, row, (str, list, int))
        for size in (*shape, total):
            check_whole(f"{what}: {name!r}", size, least=0, error=CheckpointError)
        layers.append((name, tuple(shape), total))
    for row in table["groups"]:
        name, units, members = _items(what, row, (str, int, list))
        check_whole(f"{what}: {name!r}", units, least=0, error=CheckpointError)
        groups.append((name, units, tuple(_items(what, members, (str,) * len(members)))))
    for name, why in table["skipped"].items():
        _items(what, [name, why], (str, str))
    return layers, groups, dict(table["skipped"])


def _report(what: str, plain: Any, tables: Sequence[_Table]) -> PruneReport:
    kinds = dict.fromkeys(_TEXTS, str) | dict.fromkeys(_NUMBERS, float) | {"finished": bool, "table": int}
    row = _entries(what, plain, kinds | {"layers": list, "groups": list})
    if not 0 <= row["table"] < len(tables):
        raise CheckpointError(f"{what} names table {row['table']} of {len(tables)}")
    layers, groups, skipped = tables[row["table"]]
    for kept, totals in ((row["layers"], [r[2] for r in layers]), (row["groups"], [g[1] for g in groups])):
        if len(kept) != len(totals):
            raise CheckpointError(f"{what} has {len(kept)} rows, and its table {len(totals)}")
        for count, total in zip(kept, totals, strict=True):
            check_whole(f"{what}: kept", count, least=0, error=CheckpointError)
            if count > total:
                raise CheckpointError(f"{what} keeps {count} of {total}")
    said: dict[str, Any] = {name: row[name] for name in (*_TEXTS, *_NUMBERS, "finished")}
    return PruneReport(
        **said,
        layers=tuple(
            LayerReport(n, shape, total, k) for (n, shape, total), k in zip(layers, row["layers"], strict=True)
        ),
        groups=tuple(GroupReport(n, units, k, own) for (n, units, own), k in zip(groups, row["groups"], strict=True)),
        skipped=skipped,
    )


def _entries(what: str, plain: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    """Return the entries of a dict that must have exactly these, of these types."""
    if not isinstance(plain, Mapping) or set(plain) != set(kinds):
        got = sorted(map(str, plain)) if isinstance(plain, Mapping) else type(plain).__name__
        raise CheckpointError(f"{what} must have {sorted(kinds)}, got {got}")
    return dict(zip(kinds, _items(what, [plain[name] for name in kinds], tuple(kinds.values())), strict=True))


def _items(what: str, plain: Any, kinds: tuple[type, ...]) -> list[Any]:
    """Return the items of a list that must have exactly these types, and no NaN among them."""
    if not isinstance(plain, list) or len(plain) != len(kinds):
        raise CheckpointError(f"{what} must have {len(kinds)} items there, got {plain!r:.80}")
    for value, kind in zip(plain, kinds, strict=True):
        if type(value) is not kind or value != value:
            raise CheckpointError(f"{what} must have {kind.__name__} there, got {value!r:.80}")
    return plain
