"""The page of the EfficientNet benchmark: every figure from the results."""

from __future__ import annotations

from typing import Any

from page_parts import Cell, not_measured, seeds_of, spread_of

REFERENCE = {
    0.75: "Best of the known tools' criteria on the same data: 33 % top-1 (KL 2.1) with no training.",
    0.5: "Best of the known tools' criteria on the same data: under 3 % top-1.",
}
COLUMNS = (
    ("none", "top1", ".1%"),
    ("none", "kl_agreement", ".2f"),
    ("rematch", "top1", ".1%"),
    ("rematch", "top5", ".1%"),
    ("rematch", "kl_agreement", ".2f"),
    ("rematch", "same_agreement", ".1%"),
    ("refit", "top1", ".1%"),
    ("refit", "kl_agreement", ".2f"),
)
"""Repair, figure and format."""
REFERENCE_DISTILLED = (
    "Best of the known tools' criteria on the same data: 43 % (KL 1.5) at 0.75 after 300 steps of batch 8."
)


def page(result: dict[str, Any]) -> str:
    """Return the page."""
    cells = result["cells"]
    targets = sorted({c["target"] for c in cells.values() if "target" in c}, reverse=True)
    parts = [_head(result)]
    for target in targets:
        parts.append(_pruning(result, target))
    parts += [_recipe(result), _distillation(cells, result["titles"]), _latency(cells, result["titles"])]
    parts.append(not_measured(result))
    return "\n".join(part for part in parts if part)


def _head(result: dict[str, Any]) -> str:
    photographs, dense = result["photographs"], result["cells"].get("dense")
    lines = [
        "# EfficientNet-Lite0 with its real weights, made smaller without labels\n",
        f"Made by `{result['command']}`: {result['machine']['cpu']}, one thread, torch {result['versions']['torch']}, "
        f"ONNX Runtime {result['versions'].get('onnxruntime', 'not installed')}. The machine was shared: read ratios, "
        "not seconds. Channels are removed physically, in multiples of 8 unless said otherwise, down to a share of the "
        "MACs at 224 px; each result was proven equal to the masked dense model before it was measured.\n",
        "* Top-1 and top-5: 113 photographs labelled by hand; one is 0.9 points, the standard error about 4.",
        "* KL from the dense model, and how often both say the same class: 228 other photographs.",
        f"* Scores, repair and distillation: unlabelled photographs, {photographs['scored']} for scores and "
        f"{photographs['repaired']} for repairs (the same; one batch of 256 takes twice as long and as much memory). "
        f"Settings were chosen on {photographs['held_out']} more, never on the test.\n",
    ]
    if dense:
        lines.append(
            f"Dense: {dense['top1']:.1%} top-1, {dense['top5']:.1%} top-5, {dense['macs'] / 1e6:.0f} M MACs, "
            f"{dense['parameters'] / 1e6:.2f} M parameters.\n"
        )
    return "\n".join(lines)


def _pruning(result: dict[str, Any], target: float) -> str:
    rows = []
    criteria = list(seeds_of(result["cells"], target))
    ordered = [entry for name in result["titles"] for entry in criteria if entry[0] == name]
    for name, cells in ordered:
        shown = [spread_of(cells, *column) for column in COLUMNS]
        rows.append(
            f"| {_title(result, name)}{_count(cells)} | {cells[0]['macs']:.3f} | {cells[0]['parameters']:.2f} | "
            f"{' | '.join(shown)} |"
        )
    if not rows:
        return ""
    return (
        f"## {target:g} of the MACs, no training\n\n{REFERENCE.get(target, '')}\n\n"
        "| criterion | MACs left | parameters left | top-1, no repair | KL | **top-1, batch norms re-matched** | top-5 "
        "| KL | same class | top-1, least squares too | KL |\n|" + "---|" * 11 + "\n" + "\n".join(rows) + "\n"
    )


def _title(result: dict[str, Any], name: str) -> str:
    title: str = result["titles"][name]
    return f"**{title}**" if name == result["recommended"] else title


def _count(cells: list[Cell]) -> str:
    return f", {len(cells)} seeds (mean, range)" if len(cells) > 1 else ""


def _recipe(result: dict[str, Any]) -> str:
    seconds = [
        f"{c['seconds']['prune']:.0f} s for pruning and {c['seconds']['rematch']:.0f} s for the last repair at {t:g}"
        for t in (0.75, 0.5)
        if (c := result["cells"].get(f"prune/{t}/{result['recommended']}"))
    ]
    return (
        "## Recommended: rank by what a unit's variation does to the outputs, per MAC\n\n"
        "1. Push random directions drawn from the Fisher matrix of the dense model's softmax (temperature 4) back "
        "through the network, one for each unlabelled photograph. For each unit, take the sum of gradient times input "
        "over all layers that read it, after subtracting the unit's mean, and square it: the expected KL divergence, "
        "to second order, when the unit is replaced by its mean. The gradient of the divergence itself is zero at the "
        "dense model, so ordinary Taylor scores need labels or made-up ones; this one does not.\n"
        "2. Divide by the MACs that the unit costs, and rank globally: a budget of MACs is a knapsack.\n"
        "3. Shrink, and re-match the batch norms to the dense model's: this puts back the mean that step 1 counted as "
        "free. At 0.5, fit the 1×1 convolutions on the way (least squares).\n"
        "4. Distil the dense model's logits.\n\n"
        "Pruning in three steps, scores taken anew on the repaired model, was no better on the held-out photographs "
        "at 0.75. "
        "Step 1 and 2 are `secateur.scores.Sensitivity`; `repair_` in `benchmarks/efficientnet_parts.py` uses the "
        "public API only"
        + (f"; {', '.join(seconds)}, on this shared machine" if seconds else "")
        + ".\n\n**Least squares** sets each 1×1 convolution to the fit of the dense layer's outputs from the inputs "
        "that are left, one layer after the other, before its batch norm is re-matched. It gains little where little "
        "is missing and more where much is.\n"
    )


def _distillation(cells: dict[str, Cell], titles: dict[str, str]) -> str:
    rows = []
    how: dict[str, Any] = {}
    for name, cell in cells.items():
        if not name.startswith("distil/"):
            continue
        how = cell["distillation"]
        title = titles[cell["criterion"]]
        start = cells.get(f"prune/{cell['target']}/{cell['criterion']}", {}).get(cell["start"])
        before = f"{start['top1']:.1%} (KL {start['kl_agreement']:.2f})" if start else cell["start"]
        what = f"the same widths, {cell['start']}" if cell["start"] == "new weights" else title
        mode = "training" if how["train_norms"] else "evaluation"
        rows.append(
            f"| {cell['target']:g} | {what} | {how['steps']} | {how['lr']:g}, {mode} | {before} | {cell['top1']:.1%} | "
            f"{cell['top5']:.1%} | {cell['kl_agreement']:.2f} | {cell['same_agreement']:.1%} |"
        )
    if not rows:
        return ""
    return (
        f"## Distilled on unlabelled photographs\n\n{REFERENCE_DISTILLED} Here: batch {how['batch']}, AdamW, "
        f"temperature {how['temperature']:g}, random crops and flips. {_trials(cells)}\n\n"
        "| MACs | criterion | steps | lr, mode of the batch norms | top-1 before | top-1 after | top-5 | KL "
        "| same class |\n|" + "---|" * 9 + "\n" + "\n".join(rows) + "\n"
    )


def _trials(cells: dict[str, Cell]) -> str:
    """Return the sentence on the settings that were compared."""
    found = {name.rpartition("/")[2]: c for name, c in cells.items() if name.startswith("trial/")}
    if len(found) < 2:
        return ""
    steps = next(iter(found.values()))["distillation"]["steps"]
    shown = ", ".join(f"{c['kl_held_out']:.3f} ({name})" for name, c in found.items())
    return f"Held-out KL after trials of {steps} steps, by mode of the batch norms and peak learning rate: {shown}."


def _latency(cells: dict[str, Cell], titles: dict[str, str]) -> str:
    rows = []
    for name, cell in cells.items():
        if not name.startswith("latency/"):
            continue
        for runtime, times in cell["rows"].items():
            dense = times["dense"]["median_ms"]
            for key in times:
                left = "1" if key == "dense" else f"{cell['sizes'][key]['macs']:.3f}"
                t = times[key]
                rows.append(
                    f"| {runtime} | {key} | {left} | {t['median_ms']:.1f} | {t['p10_ms']:.1f} to {t['p90_ms']:.1f} | "
                    f"{dense / t['median_ms']:.2f}× |"
                )
    if not rows:
        return ""
    named = {titles[c["criterion"]] for n, c in cells.items() if n.startswith("latency/")}
    return (
        f"## Latency, one photograph, one thread\n\nDense and pruned ({'; '.join(sorted(named))}) interleaved in one "
        "process; the ONNX files are written and checked by `secateur.export_model`.\n\n"
        "| runtime | model | MACs left | median, ms | p10 to p90 | speed |\n|"
        + "---|" * 6
        + "\n"
        + "\n".join(rows)
        + "\n"
    )
