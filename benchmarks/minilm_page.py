"""The page of the MiniLM benchmark: every figure from the results."""

from __future__ import annotations

from typing import Any

from page_parts import Cell, not_measured, seeds_of, spread_of

COLUMNS = (
    ("none", "wordsim353", ".3f"),
    ("none", "agreement_sentences", ".3f"),
    ("mean", "wordsim353", ".3f"),
    ("mean", "agreement_sentences", ".3f"),
    ("refit", "wordsim353", ".3f"),
    ("refit", "simlex999", ".3f"),
    ("refit", "agreement_sentences", ".3f"),
    ("refit", "agreement_words", ".3f"),
)
"""Repair, figure and format."""
STARTS = {
    "refit": "least squares",
    "new weights": "the same widths, new weights",
    "new layers": "the same widths, new layers on the dense embedding tables",
}


def page(result: dict[str, Any]) -> str:
    """Return the page."""
    cells = result["cells"]
    targets = sorted({c["target"] for c in cells.values() if "target" in c}, reverse=True)
    parts = [_head(result), *(_pruning(result, target) for target in targets)]
    parts += [_method(result), _distillation(result), _latency(cells, result["titles"]), not_measured(result)]
    return "\n".join(part for part in parts if part)


def _head(result: dict[str, Any]) -> str:
    dense, texts = result["cells"].get("dense"), result["texts"]
    versions = result["versions"]
    lines = [
        "# MiniLM-L6 with its real weights, made smaller without labels\n",
        f"Made by `{result['command']}`: {result['machine']['cpu']}, one thread, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, ONNX Runtime {versions.get('onnxruntime', 'not installed')}. The "
        "machine was shared: read ratios, not seconds.\n",
    ]
    if not dense:
        return "\n".join(lines)
    groups, split = dense["groups"], dense["texts"]
    per_token = dense["macs"] / (2 * result["length"]) / 1e6
    lines += [
        f"all-MiniLM-L6-v2: {dense['parameters'] / 1e6:.2f} M parameters, {dense['layer_parameters'] / 1e6:.2f} M of "
        "them in the six layers. The rest are the embedding tables, which cost no multiplications and are not pruned. "
        f"{per_token:.2f} M MACs per token at {result['length']} tokens: linear layers and the products of attention. "
        f"secateur finds {groups['count']} groups, in each layer {groups['heads']} heads (rows of query, key and "
        f"value, columns of attention.output) and {groups['neurons']} neurons (rows of intermediate, columns of "
        "output). The hidden width is the embedding's, and stays.\n",
        f"* Dense: WordSim-353 **{dense['wordsim353']:.3f}**, SimLex-999 {dense['simlex999']:.3f}: Spearman between "
        "the cosine of two words' embeddings and people's judgement. The standard error of the first is about 0.025, "
        "so that neighbours in a table are often equal; the cosines tell models apart better.",
        f"* Cosine: mean cosine with the dense model's embedding, on {texts['judged']['sentences']} sentences and "
        f"{texts['judged']['words']} words of 25 documents that nothing else sees.",
        f"* Scores, repair and distillation see unlabelled news: {split['calibration'][0]:,} sentences of 250 "
        f"documents, {split['calibration'][1]:,} spans and {split['calibration'][2]:,} single words of them, none of "
        "these a word of a test. Settings were chosen on 25 other documents, never on the tests.",
        f"* Proof: {_proofs(result['cells'])}\n",
    ]
    return "\n".join(lines)


def _proofs(cells: dict[str, Cell]) -> str:
    found = [c for c in cells.values() if "max_difference" in c]
    if not found:
        return "none yet."
    equal = sum(bool(c["equal"]) for c in found)
    inputs = min(c["proof"]["inputs"] for c in found)
    return (
        f"{equal} of {len(found)} pruned models are equal to the dense model with zeros in the pruned places, in "
        f"float64 on {inputs} inputs each; the largest difference is {max(c['max_difference'] for c in found):.1e} "
        "(embeddings have length 1)."
    )


def _pruning(result: dict[str, Any], target: float) -> str:
    found = dict(seeds_of(result["cells"], target))
    rows = []
    for name in result["titles"]:
        cells = found.get(name)
        if not cells:
            continue
        title = result["titles"][name]
        title = f"**{title}**" if name == result["recommended"] else title
        count = f", {len(cells)} seeds (mean, range)" if len(cells) > 1 else ""
        shown = [spread_of(cells, *column) for column in COLUMNS]
        rows.append(
            f"| {title}{count} | {cells[0]['macs']:.3f} | {cells[0]['parameters']:.3f} | {' | '.join(shown)} | "
            f"{max(c['max_difference'] for c in cells):.0e} |"
        )
    if not rows:
        return ""
    best = result["cells"].get(f"prune/{target}/{result['recommended']}")
    widths = ""
    if best:
        heads, neurons = (", ".join(map(str, best["kept"][kind])) for kind in ("heads", "neurons"))
        widths = f"\nWhat the criterion in bold keeps, layer by layer: heads {heads}; neurons {neurons}.\n"
    return (
        f"## {target:g} of the MACs, no training\n\n"
        "| criterion | MACs left | parameters left | WordSim, no repair | cosine | WordSim, biases fitted | cosine "
        "| **WordSim, least squares** | SimLex | cosine | of words | proof: difference |\n|"
        + "---|" * 12
        + "\n"
        + "\n".join(rows)
        + "\n"
        + widths
    )


def _method(result: dict[str, Any]) -> str:
    cells, texts = result["cells"], result["texts"]
    trials = {n.rpartition("/")[2]: c for n, c in cells.items() if n.startswith("trial/repair/")}
    compared = "; ".join(
        f"{c['held_out_sentences']:.3f} and {c['held_out_words']:.3f} ({name})" for name, c in trials.items()
    )
    three = ""
    if all(f"prune/0.5/sensitivity_{name}" in cells for name in ("per_mac", "three_steps")):
        one, many = (
            cells[f"prune/0.5/sensitivity_{name}"]["refit"]["held_out_sentences"] for name in ("per_mac", "three_steps")
        )
        three = f" Pruning in one step gives {one:.3f} on the same sentences, in three with repairs between {many:.3f}."
    return (
        "## Score and repair\n\n"
        "**Sensitivity.** Any distance to the dense embedding has gradient zero at the dense model, so plain Taylor "
        "scores need another loss. Here a random direction, one per text, is pushed back from the normalised embedding "
        "to the inputs of the layers that read units (`attention.output.dense` for heads, `output.dense` for neurons). "
        "The square of gradient times input, summed over a unit and the tokens after subtracting the unit's mean, is "
        "in expectation the squared distance that the embedding moves, to first order, when the unit is replaced by "
        "its mean. Per MAC, it is divided by the unit's weights: a budget of MACs is a knapsack, and a head costs as "
        f"much as 64 neurons. {sum(texts['scored'].values())} texts.\n\n"
        "**Least squares.** The dense and the pruned model walk through the texts side by side. Before each of its "
        "norms, a layer adds what a linear layer makes of the units to its input; that linear layer is set to the "
        "fit of the dense model's whole sum less the pruned model's own input, so that errors of earlier layers are "
        f"made up for. {sum(texts['repaired'].values()):,} texts, no gradient. *Biases fitted* moves the biases "
        "only, which puts back the mean that a unit contributed."
        + (f" Held-out cosines of sentences and words at 0.5: {compared}." if compared else "")
        + three
        + "\n\nThe Taylor scores use a contrastive loss, in which the next sentence of a document is the one to find "
        "among 16, or the same random directions at the weights that make a unit. `Sensitivity` and `repair_` in "
        "`benchmarks/minilm_parts.py` use the public API only.\n"
    )


def _distillation(result: dict[str, Any]) -> str:
    cells, titles = result["cells"], result["titles"]
    rows, how = [], {}
    for name, cell in cells.items():
        if not name.startswith("distil/"):
            continue
        how = cell["distillation"]
        start = cells.get(f"prune/{cell['target']}/{cell['criterion']}") or cells.get(
            f"prune/{cell['target']}/{cell['criterion']}/0"
        )
        before = f"{start['refit']['wordsim353']:.3f}" if start and cell["start"] == "refit" else ""
        what = titles[cell["criterion"]] if cell["start"] == "refit" else STARTS[cell["start"]]
        rows.append(
            f"| {cell['target']:g} | {what} | {how['lr']:g} | {before} | **{cell['wordsim353']:.3f}** | "
            f"{cell['simlex999']:.3f} | {cell['agreement_sentences']:.3f} | {cell['agreement_words']:.3f} | "
            f"{cell['seconds']:.0f} |"
        )
    if not rows:
        return ""
    return (
        f"## Distilled on unlabelled text\n\n{how['steps']} steps of {how['batch']} texts, AdamW, loss 1 - cosine with "
        "the dense embedding (no temperature), one thread. Pruned models start from the least-squares repair and keep "
        "the embedding tables; the controls are the same architecture (of the recommended criterion) from new "
        f"weights, everywhere or in the layers only, with the same steps. {_trials(cells)}\n\n"
        "| MACs | start | peak lr | WordSim before | WordSim after | SimLex | cosine | of words | seconds |\n|"
        + "---|" * 9
        + "\n"
        + "\n".join(rows)
        + "\n"
        + _words(cells)
    )


def _words(cells: dict[str, Cell]) -> str:
    """Say what the control with the dense embedding tables shows about the test."""
    for name, cell in cells.items():
        if name.startswith("distil/") and cell["start"] == "new layers":
            return (
                "\nThe dense tables below new layers, distilled alike, are enough for WordSim "
                f"{cell['wordsim353']:.3f} but only for a cosine of {cell['agreement_sentences']:.3f}: single words "
                "test the layers little, sentences test them well.\n"
            )
    return ""


def _trials(cells: dict[str, Cell]) -> str:
    """Return the sentence on the settings that were compared."""
    found = {n.removeprefix("trial/distil/"): c for n, c in cells.items() if n.startswith("trial/distil/")}
    if len(found) < 2:
        return ""
    steps = next(iter(found.values()))["distillation"]["steps"]
    shown = ", ".join(
        f"{c['held_out_sentences']:.3f} and {c['held_out_words']:.3f} ({name.replace('/', ', ')})"
        for name, c in found.items()
    )
    return f"Held-out cosines of sentences and words after trials of {steps} steps at 0.5: {shown}."


def _latency(cells: dict[str, Cell], titles: dict[str, str]) -> str:
    rows = []
    for name, cell in cells.items():
        if not name.startswith("latency/"):
            continue
        for runtime, times in cell["rows"].items():
            dense = times["dense"]["median_ms"]
            for key, t in times.items():
                left = "1" if key == "dense" else f"{cell['sizes'][key]['macs']:.3f}"
                rows.append(
                    f"| {cell['length']} | {runtime} | {left} | {t['median_ms']:.2f} | {t['p10_ms']:.2f} to "
                    f"{t['p90_ms']:.2f} | {dense / t['median_ms']:.2f}× |"
                )
    if not rows:
        return ""
    named = {titles[c["criterion"]] for n, c in cells.items() if n.startswith("latency/")}
    gap = max(e["max_difference"] for n, c in cells.items() if n.startswith("latency/") for e in c["export"].values())
    return (
        f"## Latency, one sentence, one thread\n\nDense and pruned ({'; '.join(sorted(named))}) interleaved in one "
        "process. The ONNX files are written and checked by `secateur.export_model`; the largest difference from "
        f"PyTorch is {gap:.0e}.\n\n"
        "| tokens | runtime | MACs left | median, ms | p10 to p90 | speed |\n|"
        + "---|" * 6
        + "\n"
        + "\n".join(rows)
        + "\n"
    )
