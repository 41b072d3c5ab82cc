"""What the page shows of one run, as plain values for the template: sentences, layers, curves, provenance."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.report.figures import Cell, read_latency
from secateur.report.load import RunRecord
from secateur.report.plots import ACCENT, MUTED, Course, Line
from secateur.report.rows import (
    NOT_FASTER,
    achieved_text,
    asked_text,
    difference_text,
    quality_names,
    quality_text,
    summary_rows,
)
from secateur.report.words import (
    count,
    dig,
    is_share,
    method_words,
    number,
    pattern_words,
    percent,
    plain,
    retrain_words,
    round_percent,
    significant,
    size,
)
from secateur.report.words import seconds as duration

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """One weight of the network; a field is ``None`` where nobody recorded it.

    Attributes:
        name: Qualified name.
        shape: Shape when dense.
        params: Elements when dense.
        kept: Elements that stay.
        macs: Multiply-accumulates when dense.
        macs_kept: The same, of kept weights only: theoretical.
        skipped: Why it was left alone, where it was.
    """

    name: str
    shape: tuple[int, ...]
    params: int
    kept: int
    macs: float | None = None
    macs_kept: float | None = None
    skipped: str = ""

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return 1.0 - self.kept / self.params if self.params else 0.0


# Sentences


def lead(run: RunRecord) -> str:
    """Say in one sentence what was removed, how, at what price, and whether that is what was asked."""
    prune = dig(run.result, "prune")
    target, achieved = str(dig(prune, "target") or "target"), number(dig(prune, "achieved"))
    sparsity = number(dig(prune, "sparsity"))
    method = method_words(dig(run.result, "recipe"))
    removed = "Weights" if sparsity is None else f"{round_percent(sparsity)} of the weights"
    got = "nothing recorded" if achieved is None else achieved_text(target, achieved)
    name = "" if target == "sparsity" else f" ({plain(target)})"
    parts = [
        f"{removed} removed" + (f" by {method}" if method else ""),
        _price(run),
        f"{asked_text(prune)}{':' if dig(prune, 'asked') is None else ', achieved'} {got}{name}",
    ]
    return "; ".join(filter(None, parts)) + "."


def _price(run: RunRecord) -> str:
    names = quality_names(run)
    if not names:
        return ""
    dense, pruned = (number(dig(run.result, "quality", which, names[0])) for which in ("dense", "pruned"))
    n = dig(run.result, "quality", "pruned", "n")
    texts = ["not measured" if v is None else quality_text(names[0], v, n) for v in (dense, pruned)]
    change = "" if dense is None or pruned is None else difference_text(names[0], dense, pruned)
    return f"{plain(names[0])} {texts[0]} \u2192 {texts[1]}" + (f" ({change})" if change else "")


def story(run: RunRecord) -> list[str]:
    """Say in a few sentences what happened, for a reader who knows nothing of it."""
    layers = [layer for layer in layers_of(run) if not layer.skipped]
    total, kept = sum(r.params for r in layers), sum(r.kept for r in layers)
    n = dig(run.result, "quality", "pruned", "n")
    recipe = dig(run.result, "recipe")
    where = f"{len(layers)} {'layer' if len(layers) == 1 else 'layers'}"
    said = [
        f"Of {count(total)} prunable weights in {where}, {count(kept)} were kept" if layers else "",
        pattern_words(recipe),
        retrain_words(recipe),
        f"Quality was measured on {count(n)} examples" if number(n) is not None else "",
    ]
    return [f"{text}." for text in said if text]


def speed_note(run: RunRecord) -> str:
    """Say whether the pruning has been turned into speed yet, and how much was measured."""
    realised = str(run.result.get("realised"))
    said = {
        "mask": NOT_FASTER,
        "slice": "The removed parts have been cut out of the network: it really is smaller.",
        "sparse": "The pruned network runs on sparse kernels, which skip the removed weights.",
    }.get(realised, "")
    latency = next(row for row in summary_rows([run]) if row.key == "latency")
    dense, pruned = latency.dense, latency.pruned[0]
    if realised == "mask" or dense is None or dense.value is None or pruned.value is None or not pruned.change:
        return said
    return f"{said} Measured latency: {dense.text} \u2192 {pruned.text}; {pruned.change}."


@dataclass(frozen=True)
class EngineRow:
    """One engine's measured time.

    Attributes:
        engine: Its name.
        network: What it ran.
        latency: Median with percentiles.
        change: Beside dense PyTorch.
    """

    engine: str
    network: str
    latency: Cell
    change: str


def engine_rows(run: RunRecord) -> list[EngineRow]:
    """Return the engines that a run was timed in, side by side."""
    rows = list(dig(run.result, "engines") or [])
    dense = next((number(row["median_ms"]) for row in rows if row["network"] == "dense"), None)
    out = []
    for row in rows:
        cell = read_latency({"latency": row})
        ratio = dense / cell.value if dense and cell.value else None
        change = "" if ratio is None or row["network"] == "dense" else f"{significant(ratio)} times as fast"
        out.append(EngineRow(str(row["engine"]), str(row["network"]), cell, change))
    return out


# Layers


def layers_of(run: RunRecord) -> list[Layer]:
    """Join what pruning and the profiles say about each weight, in the network's order."""
    prune, profile = dig(run.result, "prune"), dig(run.result, "profile")
    skipped = dig(prune, "skipped") or {}
    pruned = {str(row["name"]): row for row in dig(prune, "layers") or []}
    before, after = (_by_name(dig(profile, which, "layers") or [], pruned) for which in ("dense", "pruned"))
    names = list(dict.fromkeys([*before, *pruned]))
    out = []
    for name in names:
        row = pruned.get(name) or before[name]
        params = int(row.get("total", row.get("params", 0)))
        out.append(
            Layer(
                name,
                tuple(row.get("shape") or ()),
                params,
                int(row.get("kept", params)),
                number(dig(before.get(name), "macs")),
                number(dig(after.get(name), "density_weighted_macs")),
                "" if name in pruned else str(skipped.get(name, "not prunable")),
            )
        )
    return out


def _by_name(rows: Sequence[Values], pruned: Mapping[str, Any]) -> dict[str, Values]:
    """Index a profile's rows by parameter; a profile may name the module that owns the weight instead."""
    named = {}
    for row in rows:
        name = str(row["name"])
        named[f"{name}.weight" if name not in pruned and f"{name}.weight" in pruned else name] = row
    return named


def layers_summary(layers: Sequence[Layer]) -> str:
    """Say in one sentence how the removal is spread over the layers."""
    touched = [layer for layer in layers if not layer.skipped]
    if not touched:
        return "No layer was pruned."
    low, high = (pick(touched, key=lambda layer: layer.sparsity) for pick in (min, max))
    if len(touched) == 1:
        return f"One layer was pruned: {low.name}, {percent(low.sparsity)} removed."
    least, most = percent(low.sparsity), percent(high.sparsity)
    if least == most:
        return f"From each of the {len(touched)} pruned layers, {least} of the weights were removed."
    return f"Least was removed from {low.name} ({least}), most from {high.name} ({most})."


# Curves


def courses(run: RunRecord) -> list[Course]:
    """Return the headline figure and the loss over the epochs, with every pruning step; none without epochs."""
    # A resumed run may have logged an epoch twice: the last one counts.
    epochs = {e["epoch"]: e for e in run.events if e.get("event") == "epoch" and number(e.get("epoch")) is not None}
    rows = [epochs[key] for key in sorted(epochs)]
    if not rows:
        return []
    shift = 1 if rows[0]["epoch"] == 0 else 0  # the axis counts epochs done
    x = [float(row["epoch"] + shift) for row in rows]
    prunings = [(_epoch_of(e, rows, x), float(e["sparsity"])) for e in _prunings(run)]
    last = max([*x, *(epoch for epoch, _ in prunings)])
    made = []
    for name in [*[n for n in quality_names(run) if n != "loss"][:1], "loss"]:
        lines = _lines(name, rows, x)
        if lines:
            reference = number(dig(run.result, "quality", "dense", name))
            made.append(_course(name, lines, prunings, last, reference))
    return made


def _course(
    name: str, lines: list[Line], prunings: list[tuple[float, float]], last: float, reference: float | None
) -> Course:
    final = lines[0].y[-1]
    text = f"{plain(name).capitalize()} over {last:g} epochs, ending at {quality_text(name, final)}"
    if prunings:
        steps = ", ".join(f"{percent(s, 0)} at epoch {e:.3g}" for e, s in prunings[-6:])
        which = "" if len(prunings) <= 6 else f"{len(prunings)} times, the last six "
        text += f"; pruned {which}to a sparsity of {steps}"
    if reference is not None:
        text += f"; the dense network had {quality_text(name, reference)}"
    return Course(name, lines, prunings, last, is_share(name), reference, text)


def _prunings(run: RunRecord) -> list[Values]:
    found = (e for e in run.events if e.get("event") == "prune" and number(e.get("sparsity")) is not None)
    return list({(e.get("round"), e.get("epoch"), e.get("step")): e for e in found}.values())


def _epoch_of(event: Values, rows: Sequence[Values], x: Sequence[float]) -> float:
    """Place a pruning step on the axis of epochs by its optimizer step, which is finer than its epoch."""
    steps = [number(row.get("step")) for row in rows]
    step = number(event.get("step"))
    known = [s for s in steps if s is not None]
    if step is None or len(known) != len(steps):
        return float(event.get("epoch") or 0)
    ends, places = [0.0, *known], [0.0, *x]
    after = bisect_right(ends, step)
    if after >= len(ends):
        return places[-1]
    width = ends[after] - ends[after - 1]
    return places[after - 1] + (places[after] - places[after - 1]) * (step - ends[after - 1]) / width


def _lines(name: str, rows: Sequence[Values], x: Sequence[float]) -> list[Line]:
    def values(read: Any) -> tuple[list[float], list[float]]:
        found = [(place, number(read(row))) for place, row in zip(x, rows, strict=True)]
        kept = [(place, value) for place, value in found if value is not None and math.isfinite(value)]
        return [place for place, _ in kept], [value for _, value in kept]

    if name != "loss":
        places, held = values(lambda row: dig(row, "metrics", name))
        return [Line(places, held, ACCENT)] if held else []
    lines = [
        (values(lambda row: row.get("loss")), ACCENT, False),
        (values(lambda row: row.get("train_loss")), MUTED, True),
    ]
    return [Line(places, held, role, dashed) for (places, held), role, dashed in lines if held]


# Provenance


def provenance(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return (what, text, exact text) of how the run was made."""
    result = run.result
    machine, spent = dig(result, "machine"), number(result.get("seconds"))
    memory = number(dig(machine, "memory_bytes"))
    cores, threads = dig(machine, "cores"), dig(machine, "threads")
    parts = [
        dig(machine, "cpu"),
        f"{cores} {'core' if cores == 1 else 'cores'}" if cores else None,
        f"{threads} {'thread' if threads == 1 else 'threads'} used" if threads else None,
        f"{size(memory)} memory" if memory is not None else None,
        dig(machine, "gpu") or ("no GPU" if isinstance(machine, Mapping) else None),
        dig(machine, "os"),
    ]
    versions = dig(result, "versions") or {}
    items = [
        ("Command", str(result.get("command") or ""), ""),
        ("Started", _when(str(result.get("started") or "")), str(result.get("started") or "")),
        ("Took", "" if spent is None else duration(spent), "" if spent is None else f"{spent!r} s"),
        ("Seed", "" if result.get("seed") is None else str(result["seed"]), ""),
        ("Machine", ", ".join(str(part) for part in parts if part), ""),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()), ""),
    ]
    return [(what, text or "not recorded", digits) for what, text, digits in items]


def _when(started: str) -> str:
    """Return an ISO time with a space for its T, and UTC for its zero offset."""
    return started.replace("T", " ", 1).replace("+00:00", " UTC")
