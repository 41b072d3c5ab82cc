"""Runs to one self-contained HTML page: no scripts, no network, nothing that depends on when it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from secateur.checkpoint import write_atomic
from secateur.errors import DataError, MissingExtraError
from secateur.report import plots
from secateur.report.load import RunRecord
from secateur.report.rows import Row, same_dense, summary_rows
from secateur.report.view import (
    Layer,
    courses,
    engine_rows,
    layers_of,
    layers_summary,
    lead,
    provenance,
    speed_note,
    story,
)
from secateur.report.words import count, dig, exact, fraction, number, percent, plain, significant, size

MAX_HISTOGRAMS = 24
MAX_OPEN_LAYERS = 40
MAX_BARS = 120


@dataclass(frozen=True)
class Plot:
    """A drawing, or the reason why there is none."""

    svg: Markup
    missing: str = ""


@dataclass(frozen=True)
class Histogram:
    """One layer's small plot and its caption."""

    name: str
    plot: Plot
    before: int
    after: int


@dataclass(frozen=True)
class Table:
    """One comparison: its caption, the runs that are its columns, and its rows."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    footnotes: tuple[str, ...]


@dataclass(frozen=True)
class Total:
    """Sums over rows of the table of layers."""

    label: str
    params: int
    kept: int
    macs: float | None
    macs_kept: float | None

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return 1.0 - self.kept / self.params if self.params else 0.0


def render_report(runs: Sequence[RunRecord], *, title: str | None = None) -> str:
    """Render runs as one HTML page.

    The same runs give the same page, byte for byte. Without matplotlib the page says so in the place of each plot.

    Args:
        runs: One or several runs; several from one dense network are compared in one table.
        title: Heading; made from the runs' names when left out.

    Returns:
        The page.

    Raises:
        DataError: When there are no runs.
    """
    if not runs:
        raise DataError("a report needs at least one run; got none")
    try:
        plots.require()
        no_plots = ""
    except MissingExtraError as error:
        no_plots = f"Plot not drawn: {error}"
    folder = resources.files("secateur.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        count=count, size=size, fraction=fraction, percent=percent, exact=exact, plain=plain, significant=significant
    )
    template = environment.from_string(folder.joinpath("template.html.j2").read_text(encoding="utf-8"))
    names = [str(run.result.get("name") or f"run {i}") for i, run in enumerate(runs, 1)]
    return template.render(
        title=title or f"Pruning report: {names[0] if len(names) == 1 else f'{len(names)} runs'}",
        css=Markup(folder.joinpath("style.css").read_text(encoding="utf-8")),
        version=dig(runs[0].result, "versions", "secateur"),
        tables=_tables(runs, names),
        runs=[_run_view(run, name, i, no_plots) for i, (run, name) in enumerate(zip(runs, names, strict=True), 1)],
        max_open_layers=MAX_OPEN_LAYERS,
    )


def write_report(runs: Sequence[RunRecord], path: str | Path, *, title: str | None = None) -> None:
    """Write the page of :func:`render_report`, whole or not at all.

    Args:
        runs: One or several runs.
        path: The file; replaced when it exists.
        title: Heading; made from the runs' names when left out.

    Raises:
        DataError: When there are no runs.
        CheckpointError: When the file cannot be written.
    """
    write_atomic(path, render_report(runs, title=title).encode())


def _tables(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Table]:
    groups = [list(runs)] if same_dense(runs) else [[run] for run in runs]
    tables, start = [], 0
    for group in groups:
        columns = tuple(names[start : start + len(group)])
        start += len(group)
        caption = "The dense network and what pruning made of it"
        caption += f": {columns[0]}" if len(groups) > 1 else ""
        tables.append(Table(caption, columns, summary_rows(group), _footnotes(group)))
    return tables


def _footnotes(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    texts = []
    for run in runs:
        uncounted = dig(run.result, "profile", "dense", "macs", "uncounted")
        if uncounted:
            listed = ", ".join(f"{name} ({times}\u00d7)" for name, times in uncounted.items())
            texts.append(
                f"MACs are those of convolutions and matrix products; these operators are not counted: {listed}."
            )
    return tuple(dict.fromkeys(texts))


def _run_view(run: RunRecord, name: str, index: int, no_plots: str) -> dict[str, Any]:
    prefix = f"r{index}"
    layers = layers_of(run)
    histograms, left_out = _histograms(run, prefix, no_plots)
    listed = sum(layer.params for layer in layers)
    total = number(dig(run.result, "profile", "dense", "params", "total"))
    return {
        "anchor": f"run-{index}",
        "name": name,
        "lead": lead(run),
        "story": story(run),
        "speed_note": speed_note(run),
        "realised": run.result.get("realised"),
        "courses": [
            (course, _drawn(no_plots, plots.course_plot, course, f"{prefix}c{i}"))
            for i, course in enumerate(courses(run))
        ],
        "layers": layers,
        "layers_summary": layers_summary(layers),
        "layers_plot": _layers_plot(layers, run, prefix, no_plots),
        "layers_drawn": min(MAX_BARS, sum(not layer.skipped for layer in layers)),
        "totals": _totals(layers),
        "unlisted": None if total is None or total <= listed else total - listed,
        "histograms": histograms,
        "histograms_left_out": left_out,
        "exports": list(dig(run.result, "exports") or []),
        "engines": engine_rows(run),
        "notes": [*(dig(run.result, "notes") or []), *run.notes, *([no_plots] if no_plots else [])],
        "provenance": provenance(run),
        "recipe_text": str(run.result.get("recipe_text") or ""),
    }


def _drawn(no_plots: str, draw: Any, *args: Any) -> Plot:
    # What draws escapes its labels itself: see plots.page_svg.
    return Plot(Markup(""), no_plots) if no_plots else Plot(Markup(draw(*args)))


def _layers_plot(layers: Sequence[Layer], run: RunRecord, prefix: str, no_plots: str) -> Plot | None:
    touched = [layer for layer in layers if not layer.skipped]
    if not touched:
        return None
    biggest = {layer.name for layer in sorted(touched, key=lambda layer: -layer.params)[:MAX_BARS]}
    shown = [layer for layer in touched if layer.name in biggest]
    label = f"Sparsity of {len(shown)} layers. {layers_summary(layers)}"
    overall = number(dig(run.result, "prune", "sparsity"))
    names, values = [layer.name for layer in shown], [layer.sparsity for layer in shown]
    return _drawn(no_plots, plots.layer_plot, names, values, overall, label, f"{prefix}l")


def _totals(layers: Sequence[Layer]) -> list[Total]:
    def total(label: str, rows: Sequence[Layer]) -> Total:
        costs = [r.macs for r in rows if r.macs is not None]
        kept = [r.macs_kept for r in rows if r.macs_kept is not None]
        return Total(
            label,
            sum(r.params for r in rows),
            sum(r.kept for r in rows),
            sum(costs) if costs else None,
            sum(kept) if kept else None,
        )

    touched = [layer for layer in layers if not layer.skipped]
    totals = [total("Pruned layers", touched)] if touched and len(touched) < len(layers) else []
    return [*totals, total("All listed layers", layers)] if layers else []


def _histograms(run: RunRecord, prefix: str, no_plots: str) -> tuple[list[Histogram], int]:
    found = dig(run.result, "histograms") or {}
    ordered = sorted(found, key=lambda name: (-sum(found[name]["dense"]), name))
    made = []
    for i, name in enumerate(ordered[:MAX_HISTOGRAMS]):
        counts = found[name]
        before, after = sum(counts["dense"]), sum(counts["pruned"])
        low, high = counts["edges"][0], counts["edges"][-1]
        label = f"Weights of {name}: {before} before, {after} kept, from {low:.3g} to {high:.3g}"
        drawing = (counts["edges"], counts["dense"], counts["pruned"], label, f"{prefix}h{i}")
        made.append(Histogram(name, _drawn(no_plots, plots.histogram_plot, *drawing), before, after))
    return made, max(len(ordered) - MAX_HISTOGRAMS, 0)
