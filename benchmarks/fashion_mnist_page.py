"""The page of the Fashion-MNIST benchmark: tables, plots and sentences, all computed from the results."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TITLES = {"lenet_300_100": "LeNet-300-100", "lenet_5_caffe": "LeNet-5 (Caffe)"}
CRITERIA = {
    "random_layerwise": ("random, layerwise", "#999999", ":"),
    "random_global": ("random, global", "#555555", ":"),
    "magnitude_layerwise": ("magnitude, layerwise", "#56b4e9", "--"),
    "magnitude_global": ("magnitude, global", "#0072b2", "-"),
    "weight_gradient_layerwise": ("weight x gradient, layerwise", "#e69f00", "--"),
    "weight_gradient_global": ("weight x gradient, global", "#d55e00", "-"),
}
REASONS = {
    "lenet_5_caffe": "LeNet-5: at 0.05, the best on held-out images, training on the whole training set diverged for "
    "seed 0 (its training loss became NaN); both rates were lowered to the next one tried.",
}
"""Why a setting is not the one that validation prefers."""
GOAL = 0.3
"""Points of accuracy that a network 12 times smaller may lose."""


class Results:
    """Look-ups in the result file."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.raw = result
        self._cells = {(c["net"], c["key"], c["seed"]): c for c in result["cells"]}

    @property
    def nets(self) -> list[str]:
        """Networks, in the order of the titles."""
        return [net for net in TITLES if net in self.raw["protocol"]]

    def protocol(self, net: str) -> dict[str, Any]:
        """Settings of one network."""
        found: dict[str, Any] = self.raw["protocol"][net]
        return found

    def cells(self, net: str, key: str) -> list[dict[str, Any]]:
        """One cell for each seed."""
        return [self._cells[net, key, seed] for seed in self.protocol(net)["seeds"]]

    def accuracy(self, net: str, key: str) -> list[float]:
        """Test accuracy in percent, one for each seed."""
        return [float(c["accuracy"]) for c in self.cells(net, key)]


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation over seeds, 0 for one seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def shown(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.2f} ± {spread(values):.2f}"


def each(values: Iterable[float]) -> str:
    """Every seed's value."""
    return ", ".join(f"{v:.2f}" for v in values)


def differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Seed by seed: both started from the same weights."""
    return [x - y for x, y in zip(a, b, strict=True)]


def compared(change: Sequence[float]) -> str:
    """Say in words what the seeds' differences allow to say."""
    mean = statistics.mean(change)
    agree = all(d > 0 for d in change) or all(d < 0 for d in change)
    certain = "same sign in every seed" if agree else "the seeds agree on no sign"
    return f"{mean:+.2f} points ({certain}: {', '.join(f'{d:+.2f}' for d in change)})"


def verdict(pruned: Sequence[float], dense: Sequence[float]) -> str:
    """Hold the mean loss of accuracy against the goal."""
    lost = statistics.mean(dense) - statistics.mean(pruned)
    return f"within the goal of {GOAL} points" if lost <= GOAL else f"missing the goal of {GOAL} points"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a Markdown table: first column left, the others right."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def write_page(result: dict[str, Any], tuning: dict[str, Any] | None, path: Path) -> Path:
    """Write the page and its plots.

    Args:
        result: What the benchmark measured.
        tuning: Validation accuracies that the settings were chosen by, if there are any.
        path: The Markdown file; plots go beside it.

    Returns:
        ``path``.

    Raises:
        MissingExtraError: When matplotlib is not installed.
    """
    from fashion_mnist_plots import plot_layers, plot_ratios  # here, since it imports from this page

    results = Results(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    plots = [plot_ratios(results, path), plot_layers(results, path)]
    sections = [
        head(results),
        founding(results),
        f"![Test error against compression]({plots[0].name})",
        *(criteria(results, net) for net in results.nets),
        f"![Weights kept in each layer]({plots[1].name})",
        gradual(results),
        settings(results, tuning),
        LIMITS,
    ]
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def head(results: Results) -> str:
    """Say what was run, where, and what came out."""
    raw = results.raw
    machine, versions = raw["machine"], ", ".join(f"{k} {v}" for k, v in raw["versions"].items())
    findings = [s for net in results.nets for s in net_findings(results, net)]
    lines = [
        "# Pruning on Fashion-MNIST",
        "",
        *(
            ["**A quick run on little data: it shows that everything works, and its figures mean nothing.**", ""]
            * raw["quick"]
        ),
        f"`{raw['command']}`, {raw['started'][:10]}. {raw['cell_seconds'] / 60:.0f} minutes of computation in "
        f"{raw['processes']} processes of one thread on {machine['cpu']}, {machine['cores']} cores, {machine['os']}; "
        f"{versions}. {raw['data']['train']:,} training and {raw['data']['test']:,} test images, no augmentation.",
        "",
        "Accuracies are percentages of the test set after the last epoch: mean ± standard deviation over seeds, with "
        "every seed's value beside it. Compression is the ratio of all parameters before and after; weights are pruned "
        "in every layer, the last included, and biases never.",
        "",
        "## What the numbers say",
        "",
        "These sentences are computed from the results.",
        "",
        *(f"- {finding}" for finding in findings),
    ]
    return "\n".join(lines)


def net_findings(results: Results, net: str) -> list[str]:
    """Findings of one network."""
    title, p = TITLES[net], results.protocol(net)
    dense, pruned = results.accuracy(net, "dense"), results.accuracy(net, "founding/iterative")
    longer = results.accuracy(net, "founding/dense_longer")
    found = [
        f"**{title}, {p['founding_ratio']:g}x fewer parameters:** {shown(pruned)} % against {shown(dense)} % dense: "
        f"{compared(differences(pruned, dense))}, {verdict(pruned, dense)}. Against the dense network trained as long "
        f"({shown(longer)} %): {compared(differences(pruned, longer))}, {verdict(pruned, longer)}."
    ]
    for ratio in p["ratios"]:
        values = {c: results.accuracy(net, f"table/{c}/{ratio:g}") for c in CRITERIA}
        means = {c: statistics.mean(v) for c, v in values.items()}
        best, worst = max(means, key=lambda c: means[c]), min(means, key=lambda c: means[c])
        scope = compared(differences(values["magnitude_global"], values["magnitude_layerwise"]))
        score = compared(differences(values["weight_gradient_global"], values["magnitude_global"]))
        found.append(
            f"{title}, {ratio:g}x: best {CRITERIA[best][0]} ({means[best]:.2f} %), worst {CRITERIA[worst][0]} "
            f"({means[worst]:.2f} %). Magnitude, global minus layerwise: {scope}. Global, weight x gradient minus "
            f"magnitude: {score}."
        )
    found += cut_off(results, net)
    change = differences(results.accuracy(net, "gradual/cubic"), results.accuracy(net, "gradual/one_shot"))
    found.append(f"{title}, {p['gradual_sparsity']:.0%} sparsity: cubic minus one-shot {compared(change)}.")
    return found


def cut_off(results: Results, net: str) -> list[str]:
    """Name the cells whose pruning left a class without a single weight."""
    cells = {
        f"{title} at {ratio:g}x": [classes_cut(c) for c in results.cells(net, f"table/{criterion}/{ratio:g}")]
        for criterion, (title, *_) in CRITERIA.items()
        for ratio in results.protocol(net)["ratios"]
    }
    named = [f"{cell} ({', '.join(map(str, counts))})" for cell, counts in cells.items() if any(counts)]
    if not named:
        return []
    return [f"{TITLES[net]}: classes were cut off, in at least one seed, by {'; '.join(named)}."]


def classes_cut(cell: dict[str, Any]) -> int:
    """Outputs of the last layer that have no weight left."""
    return int(list(cell["cut"].values())[-1])


def founding(results: Results) -> str:
    """Section (a)."""
    rows = []
    for net in results.nets:
        p, pruned = results.protocol(net), results.cells(net, "founding/iterative")
        more = p["rounds"] * p["round_epochs"]
        rows += [
            [TITLES[net], "dense", "1", str(p["dense_epochs"]), *scores(results, net, "dense")],
            [
                "",
                "dense, trained as long",
                "1",
                f"{p['dense_epochs']} + {more}",
                *scores(results, net, "founding/dense_longer"),
            ],
            [
                "",
                f"pruned in {p['rounds']} rounds",
                f"{statistics.mean(c['achieved_ratio'] for c in pruned):.2f}",
                f"{p['dense_epochs']} + {more}",
                *scores(results, net, "founding/iterative"),
            ],
        ]
    layers = [
        [TITLES[net], name, f"{sizes[1]:,}", f"{100 * mean_kept(results, net, 'founding/iterative', name):.1f} %"]
        for net in results.nets
        for name, sizes in results.cells(net, "founding/iterative")[0]["kept"].items()
    ]
    return "\n".join(
        [
            "## (a) Iterative magnitude pruning",
            "",
            "Global magnitude. Each round removes the same fraction of the surviving weights and is followed by "
            "retraining with the learning rate restarted. The dense network trained as long gets the same restarts.",
            "",
            table(["network", "", "compression", "epochs", "accuracy, %", "each seed"], rows),
            "",
            "Weights kept in each layer, mean over seeds:",
            "",
            table(["network", "layer", "weights", "kept"], layers),
        ]
    )


def scores(results: Results, net: str, key: str) -> tuple[str, str]:
    """Accuracy, twice: summarised and in full."""
    values = results.accuracy(net, key)
    return shown(values), each(values)


def mean_kept(results: Results, net: str, key: str, layer: str) -> float:
    """Fraction of a layer's weights that stays, mean over seeds."""
    return statistics.mean([float(c["kept"][layer][0] / c["kept"][layer][1]) for c in results.cells(net, key)])


def criteria(results: Results, net: str) -> str:
    """Section (b) of one network."""
    p = results.protocol(net)
    columns = [f"{ratio:g}x" for ratio in p["ratios"]]

    def rows(show: Any) -> list[list[str]]:
        return [
            [t[0], *(show(results.cells(net, f"table/{c}/{r:g}")) for r in p["ratios"])] for c, t in CRITERIA.items()
        ]

    def speedup(cells: list[dict[str, Any]]) -> str:
        return f"{statistics.mean(c['macs']['dense'] / c['macs']['density_weighted'] for c in cells):.2f}"

    layers = list(results.cells(net, f"table/magnitude_global/{p['ratios'][0]:g}")[0]["kept"])
    kept = [
        [
            CRITERIA[c][0],
            layer,
            *(f"{100 * mean_kept(results, net, f'table/{c}/{r:g}', layer):.1f}" for r in p["ratios"]),
        ]
        for c in CRITERIA
        if c.endswith("_global")
        for layer in layers
    ]
    return "\n\n".join(
        [
            f"## (b) {TITLES[net]}: which weights to remove",
            f"Everything at once from the same dense weights ({shown(results.accuracy(net, 'dense'))} %), then "
            f"{p['cell_epochs']} epoch(s) of retraining with the same batches. Accuracy in percent:",
            table(["criterion", *columns], rows(lambda cells: shown([c["accuracy"] for c in cells]))),
            "Each seed:",
            table(["criterion", *columns], rows(lambda cells: each(c["accuracy"] for c in cells))),
            "Before retraining:",
            table(["criterion", *columns], rows(lambda cells: shown([c["before_retraining"] for c in cells]))),
            "Classes cut off, for each seed: outputs of the last layer with no weight left, which only their bias can "
            "choose.",
            table(["criterion", *columns], rows(lambda cells: ", ".join(str(classes_cut(c)) for c in cells))),
            "Theoretical speed-up (modelled, not measured): multiply-accumulates of one image, dense over weighted by "
            "density. A masked network runs no faster than the dense one.",
            table(["criterion", *columns], rows(speedup)),
            "Percentage of each layer's weights that the global rankings keep, mean over seeds:",
            table(["criterion", "layer", *columns], kept),
        ]
    )


def gradual(results: Results) -> str:
    """Section (c)."""
    rows = []
    for net in results.nets:
        p = results.protocol(net)
        cubic = results.cells(net, "gradual/cubic")[0]
        one = [TITLES[net], "at once, before the first epoch", str(p["gradual_epochs"])]
        many = ["", f"cubic, {cubic['updates']} updates in the first 60 %", str(p["gradual_epochs"])]
        rows += [[*one, *scores(results, net, "gradual/one_shot")], [*many, *scores(results, net, "gradual/cubic")]]
    sparsity = results.protocol(results.nets[0])["gradual_sparsity"]
    return "\n\n".join(
        [
            f"## (c) Gradually or at once, to {sparsity:.0%} sparsity",
            "Global magnitude from the same dense weights, with the same epochs, learning rates and batches.",
            table(["network", "schedule", "epochs", "accuracy, %", "each seed"], rows),
        ]
    )


def settings(results: Results, tuning: dict[str, Any] | None) -> str:
    """Say what was set, and how it was chosen."""
    names = [k for k in results.protocol(results.nets[0]) if k != "images"]
    rows = [[k, *(format_setting(results.protocol(net)[k]) for net in results.nets)] for k in names]
    parts = [
        "## Settings",
        "SGD with momentum and weight decay; in every training the learning rate falls linearly to zero. Weights start "
        "from PyTorch's defaults. Weight x gradient averages |w·g| over the batches of a fixed training sample.",
        table(["setting", *(TITLES[net] for net in results.nets)], rows),
    ]
    if tuning is None:
        return "\n\n".join([*parts, "There is no record of how the learning rates were chosen (`--tune` makes one)."])
    used = tuning["settings"]
    parts.append(
        f"Learning rates were chosen on {used['held_out']:,} images held out of the training set, seed {used['seed']} "
        f"(`--tune`): `lr` for the dense network, `retrain_lr` for {CRITERIA[used['retrain_method']][0]} at "
        f"{used['retrain_ratio']:g}x. Validation accuracy, in percent:"
    )
    rows, reasons = [], {}
    for net in results.nets:
        for setting, tried in tuning["accuracy"][net].items():
            best, chosen = max(tried, key=lambda k: tried[k]), f"{results.protocol(net)[setting]:g}"
            preferred = tried.get(chosen) == max(tried.values())
            if not preferred:
                reasons[net] = REASONS.get(net, f"{TITLES[net]}: no reason is recorded for using another rate.")
            note = chosen if preferred else f"{chosen} (validation prefers {best})"
            rows.append([TITLES[net], setting, ", ".join(f"{k}: {v:.2f}" for k, v in tried.items()), note])
    return "\n\n".join([*parts, table(["network", "setting", "tried", "used"], rows), *reasons.values()])


def format_setting(value: object) -> str:
    """Write a setting as a reader would."""
    if isinstance(value, list):
        return ", ".join(f"{v:g}" for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


LIMITS = """## Limits

- One data set of small grey images, two small networks of the 1990s, three seeds. Nothing here says how a method ranks
  on large networks.
- A standard deviation over three seeds is itself uncertain; read the single values, and the signs of the differences
  seed by seed.
- Budgets are short; longer ones may rank the criteria differently.
- The learning rate of retraining was chosen with global magnitude, which may favour it over the other criteria.
- Speed-ups are counted, not measured: the masks are not exploited by any kernel here."""
