"""The page of the sparse benchmark: tables against the goals, and plots, all computed from the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fashion_mnist_page import table

Row = dict[str, Any]
SPARSITIES = (0.7, 0.8, 0.9, 0.95)

GOALS = {
    "768 -> 3072, 128 tokens": (2.0, 3.2, 6.0, 10.0),
    "4096 -> 4096, 128 tokens": (2.0, 3.2, 6.0, 10.0),
    "768 -> 3072, 128 tokens, 4x1 blocks": (3.1, 4.3, 8.5, 14.0),
    "4096 -> 4096, 128 tokens, 4x1 blocks": (3.1, 4.3, 8.5, 14.0),
    "768 -> 3072, 8 tokens": (1.4, 2.0, 4.0, 7.0),
    "4096 -> 4096, 8 tokens": (1.4, 2.0, 4.0, 7.0),
    "4096 -> 4096, 1 token, weights in memory": (2.3, 2.7, 4.3, 7.5),
    "ResNet-50, batch 1": (1.6, 2.1, 3.1, 3.8),
    "BERT-base, 128 tokens": (2.0, 2.6, 4.0, 5.1),
}
"""Speed-ups over the fastest dense engine that the kernels were built to reach, at the four sparsities."""


def write_page(result: dict[str, Any], path: Path) -> Path:
    """Write the page and its plot.

    Args:
        result: What the benchmark measured.
        path: The Markdown file; the plot goes beside it.

    Returns:
        ``path``.
    """
    rows = result["rows"]
    one = {k: r for k, r in rows.items() if k.endswith("/1")}
    names = list(dict.fromkeys(r["workload"] for r in one.values()))
    parts = [head(result), "## One thread", speedups(one, names), engines(one, names), "## Bytes and tuning"]
    parts += [sizes(one, names), roofline(rows, one, names), two_threads(rows), narrower(rows), LIMITS]
    if any(names):
        plot(one, names, path.with_suffix(".svg"))
        parts.insert(3, f"![Speed-up against sparsity]({path.with_suffix('.svg').name})")
    path.write_text("\n\n".join(p for p in parts if p) + "\n", encoding="utf-8")
    return path


def head(result: dict[str, Any]) -> str:
    """Say what was run, where."""
    more = sum("again" in row for row in result["rows"].values())
    again = (
        f" {more} rows were measured again after the first run: the code had changed since, or other users of the "
        "machine had disturbed them."
        if more
        else ""
    )
    machine, versions = result["machine"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    return (
        "# The sparse CPU runtime against dense engines\n\n"
        f"`{result['command']}`, {result['finished'][:10]}. {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['os']}, {machine['isa']}; {versions}. Medians of {result['runs']} rounds in which all engines take "
        "turns; before each call of a layer its weights are out of the caches and its input is in them, as in a "
        "network. A speed-up is the fastest dense engine's time over ours, in the same row; behind one that misses its "
        f"goal stands the goal.{again}"
    )


def found(rows: dict[str, Row], name: str, sparsity: float) -> Row | None:
    """Return one row, if it has been measured."""
    return next((r for r in rows.values() if r["workload"] == name and r.get("sparsity") == sparsity), None)


def speedups(rows: dict[str, Row], names: Sequence[str]) -> str:
    """Return the table of speed-ups beside the goals."""
    lines = []
    for name in names:
        line = [name]
        for i, sparsity in enumerate(SPARSITIES):
            row, goal = found(rows, name, sparsity), GOALS.get(name, (0.0,) * 4)[i]
            text = "" if row is None else f"{row['speedup']:.2f}x"
            line.append(text if row is None or row["speedup"] >= goal else f"{text} ({goal:g})")
        lines.append(line)
    return table(["workload", *(f"{s:.0%}" for s in SPARSITIES)], lines)


def engines(rows: dict[str, Row], names: Sequence[str]) -> str:
    """Return all times at 90 %."""
    lines, columns = [], list(dict.fromkeys(engine for r in rows.values() for engine in r["ms"]))
    for name in names:
        row = found(rows, name, 0.9)
        if row is not None:
            lines.append([name, *(f"{row['ms'][e]:.3f}" if e in row["ms"] else "" for e in columns)])
    return "Milliseconds at 90 % sparsity:\n\n" + table(["workload", *columns], lines)


def _beside(row: Row) -> str:
    """Name the layers that run in the kernels without a sparse weight."""
    count = row.get("kernels", 0)
    return f", {count} dense in the kernels" if count else ""


def sizes(rows: dict[str, Row], names: Sequence[str]) -> str:
    """Return bytes, how the kernels ran, and how long tuning took."""
    lines = []
    for name in names:
        row = found(rows, name, 0.9)
        if row is None:
            continue
        what = row.get("option") or f"{row['packed']} of {row['layers']} layers packed{_beside(row)}"
        difference = f"{row['difference']:.0e}" if "difference" in row else ""
        lines.append([name, f"{row['bytes']:.3f}", what, f"{row['tuning_s']:.1f} s", difference])
    columns = ["workload, 90 %", "bytes of the weights, of dense", "runs as", "tuning", "answers differ by"]
    return table(columns, lines)


def roofline(rows: dict[str, Row], one: dict[str, Row], names: Sequence[str]) -> str:
    """Return which part of what one core can do is reached: multiply-adds, or for one vector bytes from memory."""
    peak, read = rows.get("peak"), rows.get("bandwidth")
    if peak is None or read is None:
        return ""
    lines = []
    for name in names:
        measured = [found(one, name, sparsity) for sparsity in SPARSITIES]
        if not any(r is not None and "gmac_per_s" in r for r in measured):
            continue
        line = [name]
        for row in measured:
            if row is None:
                line.append("")
            elif row["tokens"] == 1:
                line.append(f"{row['gb_per_s'] / read['gb_per_s']:.0%} of the bandwidth")
            else:
                line.append(f"{row['gmac_per_s'] / peak['gmac_per_s']:.0%}")
        lines.append(line)
    return (
        "## Against what one core can do\n\nMultiply-adds with weights that are not zero, as part of the "
        f"{peak['gmac_per_s']:.0f} billion per second that torch reaches in a dense 2048x2048x2048 product; with one "
        f"vector, the packed weight's bytes as part of the {read['gb_per_s']:.1f} GB/s at which one thread sums up 512 "
        "MiB.\n\n" + table(["workload", *(f"{s:.0%}" for s in SPARSITIES)], lines)
    )


def two_threads(rows: dict[str, Row]) -> str:
    """Return how two threads scale."""
    lines = []
    for row in rows.values():
        alone = row.get("ms, one thread")
        if not alone:
            continue
        dense = row["fastest_dense"]
        scale = {engine: alone[engine] / row["ms"][engine] for engine in ("secateur", dense)}
        shown = [f"{scale['secateur']:.2f}x", f"{scale[dense]:.2f}x ({dense})", f"{row['speedup']:.2f}x"]
        lines.append([row["workload"], *shown, str(row["disturbed"])])
    if not lines:
        return ""
    columns = [
        "workload, 90 %",
        "two threads over one",
        "the fastest dense engine's",
        "over the fastest dense engine with two",
        "disturbed rounds",
    ]
    return (
        "## Two threads\n\nEvery engine runs with one and with two threads in the same rounds. The machine is a virtual"
        " one, whose two processors share one core at times; rounds in which torch's dense 512x512x512 product gains "
        "less than 1.8 from the second thread do not count, for any engine.\n\n" + table(columns, lines)
    )


def narrower(rows: dict[str, Row]) -> str:
    """Return the next instruction set's speed beside the widest."""
    lines = [[r["workload"], f"{r['ratio']:.2f}"] for k, r in rows.items() if k.startswith("narrower/")]
    if not lines:
        return ""
    return "## x86-64-v3 (AVX2) on the same processor\n\n" + table(["workload, 90 %", "speed, of x86-64-v4"], lines)


def plot(rows: dict[str, Row], names: Sequence[str], path: Path) -> None:
    """Draw speed-ups against sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "secateur"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5))
    for number, name in enumerate(names):
        points = [(s, r["speedup"]) for s in SPARSITIES if (r := found(rows, name, s)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="os^"[number // 7], label=name, color=f"C{number % 7}")
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.set(xlabel="sparsity", ylabel="times as fast as the fastest dense engine", yscale="log")
    ticks = ["0.5", "1", "2", "3", "4", "6", "8", "12"]
    axes.set_yticks([float(tick) for tick in ticks], labels=ticks)
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


LIMITS = """## What this does not show

EfficientNet-Lite0's depthwise convolutions are not pruned, and take half of its time.
Random masks are the hardest for caches and the fairest to compare; masks of trained networks are a little kinder.
Dense engines in bfloat16 or int8 are faster than these float32 ones, and lose some accuracy; so could sparse kernels of
these widths, which this library does not have yet. One processor was measured."""
