"""The page of the founding benchmark: tables and plots, all computed from the results."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fashion_mnist_page import TITLES, shown, table
from founding_cells import CLOSE

Cell = dict[str, Any]

FAMILIES = {
    "after": "pruned after training, then retrained",
    "during": "pruned while training goes on",
    "before": "pruned before training",
    "sparse": "sparse from the first step to the last",
}


class Results:
    """Look-ups in the result file; cells that are not there yet are no error."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.raw = result
        self._cells: dict[tuple[str, str], list[Cell]] = {}
        for cell in sorted(result["cells"], key=lambda c: int(c["seed"])):
            self._cells.setdefault((cell["net"], cell["key"]), []).append(cell)

    def protocol(self, net: str) -> dict[str, Any]:
        """Settings of one network."""
        found: dict[str, Any] = self.raw["protocol"][net]
        return found

    def cells(self, net: str, key: str) -> list[Cell]:
        """The finished seeds of a cell."""
        return self._cells.get((net, key), [])

    def keys(self, net: str, prefix: str) -> list[str]:
        """Keys of a network that begin alike, in the order in which they were computed."""
        return [key for own, key in self._cells if own == net and key.startswith(prefix)]

    def names(self, net: str, family: str) -> list[str]:
        """Methods of one family, in the order in which they were computed."""
        return list(dict.fromkeys(key.split("/")[1] for key in self.keys(net, f"{family}/")))


def mean_of(cells: Sequence[Cell], key: str = "accuracy") -> str:
    """Mean and spread of a figure over seeds, with the number of seeds where it is one."""
    values = [float(c[key]) for c in cells if c.get(key) is not None]
    if not values:
        return ""
    return shown(values) if len(values) > 1 else f"{values[0]:.2f} (1 seed)"


def write_page(result: dict[str, Any], path: Path) -> Path:
    """Write the page and its plots.

    Args:
        result: What the benchmark measured.
        path: The Markdown file; plots go beside it.

    Returns:
        ``path``.

    Raises:
        MissingExtraError: When matplotlib is not installed.
    """
    from founding_plots import plot_collapse, plot_compression, plot_ranks  # here, since it imports from this page

    results = Results(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    nets = [net for net in TITLES if results.keys(net, "dense")]
    parts = [
        head(results),
        *section("Which saliency ranks weights rightly", ranks(results), plot_ranks(results, path)),
        *section("Accuracy against compression", *(c for net in nets for c in compression(results, net))),
        *([f"![Test error against compression]({plot_compression(results, path).name})"] if nets else []),
        *section("Lottery tickets", *(t for net in nets if (t := tickets(results, net)))),
        *section("Sparsity that training finds", *(f for net in nets if (f := found(results, net)))),
        *section("Layer collapse", collapse(results), plot_collapse(results, path)),
        *section("Cut out for real", slimming(results), gates(results)),
        LIMITS,
        diverged(results),
        missing(results),
    ]
    path.write_text("\n\n".join(p for p in parts if p) + "\n", encoding="utf-8")
    return path


def section(title: str, *parts: str | Path | None) -> Iterator[str]:
    """Yield a heading and what stands under it, or nothing where nothing does."""
    there = [f"![{title}]({p.name})" if isinstance(p, Path) else p for p in parts if p]
    if there:
        yield f"## {title}"
        yield from there


def head(results: Results) -> str:
    """Say what was run, where."""
    raw = results.raw
    machine, versions = raw["machine"], ", ".join(f"{k} {v}" for k, v in raw["versions"].items())
    return "\n".join(
        [
            "# The founding methods, measured against each other",
            "",
            *(["**A quick run on little data: its figures mean nothing.**", ""] * raw["quick"]),
            f"`{raw['command']}`, {raw['started'][:10]}. {raw['cell_seconds'] / 60:.0f} minutes of computation in "
            f"processes of one thread on {machine['cpu']}, {machine['cores']} cores, {machine['os']}; {versions}. "
            "Fashion-MNIST, 60,000 training and 10,000 test images, no augmentation; figures are percentages of the "
            "test set after the last epoch, mean ± standard deviation over the seeds that are finished.",
            "",
            "Optimal Brain Surgeon, Optimal Brain Damage and magnitude on XOR and the MONK's problems: "
            "[obs.md](obs.md).",
        ]
    )


def ranks(results: Results) -> str:
    """Return the table of rank correlations."""
    sets = [key.split("/")[1] for key in results.keys("ranks", "ranks/")]
    if not sets:
        return ""
    cells = {name: results.cells("ranks", f"ranks/{name}") for name in sets}
    rows = []
    for score in cells[sets[0]][0]["correlation"]:
        row = [score]
        for name in sets:
            for truth in ("alone", "again"):
                values = [c["correlation"][score][truth] for c in cells[name]]
                row.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        rows.append(row)
    columns = [f"{name}, {truth}" for name in sets for truth in ("alone", "retrained")]
    best = {
        column: max(rows, key=lambda row, i=i: float(row[i + 1].split()[0]))[0]  # type: ignore[misc]
        for i, column in enumerate(columns)
    }
    weights = ", ".join(f"{cells[name][0]['weights']} weights ({name})" for name in sets)
    return "\n\n".join(
        [
            f"Networks with one hidden layer, trained to a minimum in float64; {weights}. Every weight was set to zero "
            "once, by brute force: *alone*, the loss as it is then; *retrained*, the loss after all other weights went "
            "to a minimum again. Spearman's correlation of each score with both, mean (least to most) over "
            f"{len(cells[sets[0]])} seeds. At a minimum under weight decay the gradient of the loss is the decay's, "
            "so first-order scores rank as magnitude does.",
            table(["score", *columns], rows),
            "Highest: " + "; ".join(f"{column}: {name}" for column, name in best.items()) + ".",
        ]
    )


def compression(results: Results, net: str) -> Iterator[str]:
    """Yield the tables of one network."""
    p = results.protocol(net)
    ratios = p["ratios"]
    dense = results.cells(net, "dense")
    yield (
        f"### {TITLES[net]}\n\nDense {mean_of(dense)} %, {p['dense_epochs']} epochs. After and during: from the dense "
        f"weights, {epochs(p['cell_epochs'])} more; before and sparse: {p['dense_epochs']} epochs from new weights. "
        "Compression counts all parameters; every layer is pruned, the last too, biases never. Rounds halve the "
        f"weights, and so end up to {CLOSE:.0%} above the compression of their column."
    )
    rows = []
    for family, title in FAMILIES.items():
        for name in results.names(net, family):
            cells = [results.cells(net, f"{family}/{name}/{ratio:g}") for ratio in ratios]
            rows.append([f"{name}, {title}", *(mean_of(c) for c in cells)])
    path = results.cells(net, "rounds/magnitude")
    if path:
        rows.append(
            [
                f"magnitude, halved and retrained {epochs(p['cell_epochs'])}, again and again",
                *(mean_of([at(c["path"], ratio) for c in path]) for ratio in ratios),
            ]
        )
    yield table(["method", *(f"{ratio:g}x" for ratio in ratios)], rows)


def diverged(results: Results) -> str:
    """Name the trainings that did not stay finite: they count as they are."""
    found = [
        f"{TITLES.get(cell['net'], cell['net'])}, {cell['key']}, seed {cell['seed']} ({cell['accuracy']:.0f} %)"
        for cell in results.raw["cells"]
        if cell.get("diverged")
    ]
    if not found:
        return ""
    return f"Training diverged, and counts in its mean with the accuracy that it ended with: {'; '.join(found)}."


def epochs(count: int) -> str:
    """Return a number of epochs in words."""
    return f"{count} epoch{'s' * (count != 1)}"


def at(path: Sequence[Cell], ratio: float) -> Cell:
    """Return the point of a path that stands for a ratio, or an empty one."""
    best = min(path, key=lambda c: abs(float(c["ratio"]) - ratio))
    return best if abs(best["ratio"] / ratio - 1) <= CLOSE else {}


def tickets(results: Results, net: str) -> str:
    """Return the table of rewound weights beside new ones under the same masks."""
    cells = results.cells(net, "tickets")
    if not cells:
        return ""
    ratios = results.protocol(net)["ratios"]
    p = results.protocol(net)
    return "\n\n".join(
        [
            f"### {TITLES[net]}, weights rewound to step {p['late']}\n\nEvery round halves the weights by magnitude, "
            f"rewinds and trains {p['dense_epochs']} epochs; beside it the same masks on other new weights.",
            table(
                ["", *(f"{ratio:g}x" for ratio in ratios)],
                [
                    ["rewound", *(mean_of([at(c["path"], ratio) for c in cells]) for ratio in ratios)],
                    ["new weights", *(mean_of([at(c["reinitialised"], ratio) for c in cells]) for ratio in ratios)],
                ],
            ),
        ]
    )


def found(results: Results, net: str) -> str:
    """Return the table of sparsity that follows from a strength."""
    rows = []
    for key in results.keys(net, "found/"):
        _, name, strength = key.split("/")
        cells = results.cells(net, key)
        live = cells[0]["live"]
        units = "-".join(str(columns) for _, columns in live.values())
        rows.append(
            [
                name,
                strength,
                mean_of(cells),
                " to ".join(f"{f(float(c['achieved_ratio']) for c in cells):.1f}x" for f in (min, max)),
                units,
                f"{100 * statistics.mean(float(c['macs_left']) for c in cells):.0f} %",
            ]
        )
    if not rows:
        return ""
    trained = results.protocol(net)["dense_epochs"]
    return (
        f"### {TITLES[net]}, {trained} epochs from new weights\n\nUnits: inputs of each layer with a weight left, in "
        "the first seed.\n\n"
        + table(["method", "strength", "accuracy", "compression", "units", "MACs, weighted by density"], rows)
    )


def collapse(results: Results) -> str:
    """Return where each score first empties a layer, and where nothing passes through the network any more."""
    parts = []
    for key in results.keys("collapse", "collapse/"):
        cells = results.cells("collapse", key)
        rows = []
        for name in cells[0]["collapse"]:
            paths = [c["collapse"][name] for c in cells]
            rows.append([name, first(paths, lambda p: p["least"] == 0), first(paths, lambda p: not p["connected"])])
        parts.append(
            f"{TITLES[key.split('/')[1]]}, untrained, {cells[0]['layers']:,} weights:\n\n"
            + table(["score", "a layer is empty from", "no path is left from"], rows)
        )
    if not parts:
        return ""
    intro = "Compression at which a score first takes the last weight of a layer, and at which no input reaches an "
    return "\n\n".join([intro + "output any more (median over seeds).", *parts])


def first(paths: Sequence[Sequence[Cell]], broken: Any) -> str:
    """Median over seeds of the first ratio at which something is broken."""
    found = [next((float(p["ratio"]) for p in path if broken(p)), float("inf")) for path in paths]
    middle = statistics.median_low(found)
    return "never" if middle == float("inf") else f"{middle:,.0f}x"


def slimming(results: Results) -> str:
    """Return the table of network slimming and its controls."""
    rows = []
    for key in results.keys("norm_net", "slimming/"):
        _, name, target = key.split("/")
        rows.append([name, target, *physical(results.cells("norm_net", key))])
    if not rows:
        return ""
    p = results.protocol("norm_net")
    return (
        f"A network of three convolutions with batch norm: {p['dense_epochs']} epochs (slimming: with the L1 penalty "
        "on its scales), channels cut out, constants folded, statistics re-estimated, "
        f"{epochs(p['cell_epochs'])} more. Latency: dense over pruned, measured side by side on one thread.\n\n"
        + table(["channels by", "MACs asked", *PHYSICAL], rows)
    )


PHYSICAL = ("dense", "pruned", "widths", "MACs left", "parameters left", "faster, 1 image", "faster, 64 images")


def physical(cells: Sequence[Cell]) -> list[str]:
    """Return the figures of networks that are smaller for real."""
    ratio = [statistics.mean(c[key][1] / c[key][0] for c in cells) for key in ("macs", "parameters")]
    faster = [
        statistics.mean(c["latency_ms"][batch]["dense"] / c["latency_ms"][batch]["small"] for c in cells)
        for batch in ("1", "64")
    ]
    widths = "-".join(str(w) for w in cells[0]["widths"].values())
    return [
        mean_of(cells, "dense"),
        mean_of(cells),
        widths,
        *(f"{r:.2f}" for r in ratio),
        *(f"{f:.2f}x" for f in faster),
    ]


def gates(results: Results) -> str:
    """Return what L0 gates have closed, cut out."""
    rows = []
    for net in TITLES:
        for key in results.keys(net, "found/l0/"):
            cells = [c for c in results.cells(net, key) if "latency_ms" in c]
            if cells:
                rows.append([TITLES[net], key.split("/")[2], *physical(cells)[1:]])
    if not rows:
        return ""
    return "L0 gates, what they closed cut out, the same accuracy before and after (proven equal):\n\n" + table(
        ["network", "strength", *PHYSICAL[1:]], rows
    )


LIMITS = """## What this does not show

Budgets are small so that two cores can carry them: methods that need long trainings (L0, variational dropout, soft
thresholds, movement, sparse training) are at a disadvantage here, and published figures come from many times as many
epochs. Learning rates are those of the dense network, except for methods with trained latents: their optimizers, rates
and strengths were chosen on the last 10,000 training images. Three seeds tell apart what differs by several standard
deviations, and nothing less. Pruning in rounds and tickets train several times as long as the others."""


def missing(results: Results) -> str:
    """Name the parts whose seeds are not all finished."""
    gaps = []
    for net, p in results.raw["protocol"].items():
        keys = results.keys(net, "")
        short = [k for k in keys if len(results.cells(net, k)) < len(p["seeds"])]
        if not keys:
            gaps.append(f"all of `{net}`")
        elif short:
            gaps.append(f"{len(short)} of {len(keys)} cells of `{net}` lack seeds")
    if not gaps:
        return ""
    return "## Not measured yet\n\nThe same command makes the rest and keeps what is there: " + "; ".join(gaps) + "."
