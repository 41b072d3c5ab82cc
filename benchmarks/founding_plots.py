"""The plots of the founding benchmark."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from fashion_mnist_page import TITLES
from fashion_mnist_plots import figure, save
from founding_page import FAMILIES, Results, at

LINES = {"after": "-", "during": "-.", "before": "--", "sparse": ":"}


def plot_ranks(results: Results, page: Path) -> Path | None:
    """Draw the correlations as bars, one panel per data set."""
    keys = results.keys("ranks", "ranks/")
    if not keys:
        return None
    drawn, axes = figure(len(keys))
    for axis, key in zip(axes[0], keys, strict=True):
        cells = results.cells("ranks", key)
        scores = list(cells[0]["correlation"])
        for shift, truth, colour in ((0.2, "alone", "#0072b2"), (-0.2, "again", "#d55e00")):
            means = [statistics.mean(c["correlation"][s][truth] for c in cells) for s in scores]
            label = "without the weight" if truth == "alone" else "and the others retrained"
            axis.barh([shift + i for i in range(len(scores))], means, height=0.4, color=colour, label=label)
        axis.set_yticks(range(len(scores)), scores, fontsize=6)
        axis.invert_yaxis()
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(key.split("/")[1])
        axis.set_xlabel("rank correlation with brute force")
        axis.grid(alpha=0.3, axis="x")
    axes[0][0].legend(fontsize=7)
    return save(drawn, page.with_name(f"{page.stem}_ranks.svg"))


def plot_compression(results: Results, page: Path) -> Path:
    """Draw the error of every method against compression."""
    nets = [net for net in TITLES if results.keys(net, "dense")]
    drawn, axes = figure(len(nets))
    for axis, net in zip(axes[0], nets, strict=True):
        ratios = results.protocol(net)["ratios"]
        dense = statistics.mean(float(c["accuracy"]) for c in results.cells(net, "dense"))
        axis.axhline(100 - dense, color="black", linewidth=0.8, label="dense")
        number = 0
        for family in FAMILIES:
            for name in results.names(net, family):
                found = {r: results.cells(net, f"{family}/{name}/{r:g}") for r in ratios}
                _draw(axis, {r: c for r, c in found.items() if c}, f"{name} ({family})", LINES[family], number)
                number += 1
        paths = results.cells(net, "rounds/magnitude")
        points = {r: [p for c in paths if (p := at(c["path"], r))] for r in ratios}
        _draw(axis, {r: c for r, c in points.items() if c}, "magnitude (rounds)", "-", number)
        _scales(axis, ratios)
        axis.set_title(TITLES[net])
        axis.set_ylabel("test error, %, log scale")
    axes[0][-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return save(drawn, page.with_name(f"{page.stem}_compression.svg"))


def _draw(axis: Any, points: dict[float, list[dict[str, Any]]], label: str, line: str, number: int) -> None:
    means = [100 - statistics.mean(float(c["accuracy"]) for c in cells) for cells in points.values()]
    if means:
        axis.plot(list(points), means, line, marker=".", label=label, color=f"C{number % 10}")


def _scales(axis: Any, ratios: list[float]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ratios, [f"{r:g}x" for r in ratios])
    axis.set_yticks([8, 10, 12, 15, 20, 30, 50, 90], ["8", "10", "12", "15", "20", "30", "50", "90"])
    axis.minorticks_off()
    axis.set_xlabel("compression (all parameters)")
    axis.grid(alpha=0.3)


def plot_collapse(results: Results, page: Path) -> Path | None:
    """Draw the weights of the thinnest layer against compression, first seed."""
    keys = results.keys("collapse", "collapse/")
    if not keys:
        return None
    drawn, axes = figure(len(keys))
    for axis, key in zip(axes[0], keys, strict=True):
        for number, (name, path) in enumerate(results.cells("collapse", key)[0]["collapse"].items()):
            axis.plot([p["ratio"] for p in path], [p["least"] for p in path], ".-", label=name, color=f"C{number}")
        axis.set_xscale("log")
        axis.set_yscale("symlog", linthresh=1)
        axis.set_title(TITLES[key.split("/")[1]])
        axis.set_xlabel("compression (weights)")
        axis.set_ylabel("weights left in the thinnest layer")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    return save(drawn, page.with_name(f"{page.stem}_collapse.svg"))
