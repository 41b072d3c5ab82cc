"""The comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from secateur.errors import DataError
from secateur.report.figures import Cell
from secateur.report.load import RunRecord
from secateur.report.rows import NOT_FASTER, Row, same_dense, summary_rows
from secateur.report.words import NARROW

_DETAILED = ("target", "energy")
"""Rows whose cells say more than their figure: what was asked, what kind of energy it is."""

_LEFT_OUT = ("csr", "bitmask")
"""Modelled storage is for the page: here it would only lengthen the table."""


def summary_table(runs: Sequence[RunRecord]) -> Table:
    """Put dense and pruned figures side by side, in 80 columns for up to three runs.

    Args:
        runs: One or several runs.

    Returns:
        A table; names and notes are shown as they are, never read as markup.

    Raises:
        DataError: When there are no runs.
    """
    if not runs:
        raise DataError("a summary needs at least one run; got none")
    masked = sum(run.result.get("realised") == "mask" for run in runs)
    caption = NOT_FASTER if masked == len(runs) else f"{masked} of {len(runs)} masked only. {NOT_FASTER}"
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        collapse_padding=True,
        caption=Text(caption) if masked else None,
        caption_justify="left",
    )
    table.add_column("", min_width=13, overflow="fold")
    shared = same_dense(runs)
    if shared:
        table.add_column("dense", justify="right", overflow="fold")
    for i, run in enumerate(runs, 1):
        name = "pruned" if len(runs) == 1 else str(run.result.get("name") or f"run {i}")
        table.add_column(Text(name), justify="right", overflow="fold")
    for row in summary_rows(runs):
        if row.key in _LEFT_OUT:
            continue
        dense = [_dense_text(row)] if shared else []
        table.add_row(_label(row), *dense, *(_cell_text(row, cell) for cell in row.pruned))
    return table


def _label(row: Row) -> Text:
    return Text(row.label).append(f"\n{row.tag}", style="dim")


def _dense_text(row: Row) -> Text:
    return Text("") if row.dense is None else _styled(row.dense)


def _cell_text(row: Row, cell: Cell) -> Text:
    text = _styled(cell)
    more = [cell.change, cell.detail if row.key in _DETAILED or cell.value is None else ""]
    if cell.dense:
        more.insert(0, f"from {cell.dense}".replace(" [", "\n["))
    for line in filter(None, more):
        text.append(f"\n{_plain(line)}", style="dim")
    return text


def _styled(cell: Cell) -> Text:
    return Text(_figure(cell), style="dim" if cell.value is None else "")


def _figure(cell: Cell) -> str:
    # A range goes on a line of its own: "0.429 ms [0.376-0.521]" is too wide for three runs side by side.
    return _plain(cell.text).replace(" [", "\n[")


def _plain(text: str) -> str:
    return text.replace(NARROW, " ")
