"""The plots of the Fashion-MNIST benchmark."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from fashion_mnist_page import CRITERIA, TITLES, Results, mean_kept, spread
from secateur.errors import MissingExtraError


def figure(panels: int) -> tuple[Any, Any]:
    """Return a row of panels that is drawn alike every time."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots") from error
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "secateur"  # the same results give the same file
    from matplotlib import pyplot

    return pyplot.subplots(1, panels, figsize=(5.2 * panels, 4.2), squeeze=False, constrained_layout=True)


def save(drawn: Any, path: Path) -> Path:
    """Write a plot without a date."""
    drawn.savefig(path, metadata={"Date": None})
    return path


def plot_ratios(results: Results, page: Path) -> Path:
    """Draw the error against compression, with the spread over seeds."""
    drawn, axes = figure(len(results.nets))
    for axis, net in zip(axes[0], results.nets, strict=True):
        ratios = results.protocol(net)["ratios"]
        dense = statistics.mean(results.accuracy(net, "dense"))
        axis.axhline(100 - dense, color="black", linewidth=0.8, label="dense")
        for criterion, (label, colour, line) in CRITERIA.items():
            values = [results.accuracy(net, f"table/{criterion}/{r:g}") for r in ratios]
            means = [100 - statistics.mean(v) for v in values]
            axis.errorbar(
                ratios, means, [spread(v) for v in values], color=colour, linestyle=line, label=label, capsize=2
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_yticks([8, 10, 12, 15, 20, 30, 50, 90], ["8", "10", "12", "15", "20", "30", "50", "90"])
        axis.minorticks_off()
        axis.set_xticks(ratios, [f"{r:g}x" for r in ratios])
        axis.set_title(TITLES[net])
        axis.set_xlabel("compression (all parameters)")
        axis.set_ylabel("test error, % (mean ± std), log scale")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=8)
    return save(drawn, page.with_name(f"{page.stem}_compression.svg"))


def plot_layers(results: Results, page: Path) -> Path:
    """Draw what the two informed global rankings keep in each layer."""
    drawn, axes = figure(len(results.nets))
    for axis, net in zip(axes[0], results.nets, strict=True):
        ratios = results.protocol(net)["ratios"]
        layers = list(results.cells(net, f"table/magnitude_global/{ratios[0]:g}")[0]["kept"])
        for number, layer in enumerate(layers):
            for criterion, line in (("magnitude_global", "-"), ("weight_gradient_global", "--")):
                kept = [100 * mean_kept(results, net, f"table/{criterion}/{r:g}", layer) for r in ratios]
                axis.plot(ratios, kept, line, color=f"C{number}", label=f"{layer}, {CRITERIA[criterion][0]}")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ratios, [f"{r:g}x" for r in ratios])
        axis.set_title(TITLES[net])
        axis.set_xlabel("compression (all parameters)")
        axis.set_ylabel("weights kept, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    return save(drawn, page.with_name(f"{page.stem}_layers.svg"))
