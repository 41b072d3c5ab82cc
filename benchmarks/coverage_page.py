"""The page of the coverage table: goals beside figures, every failure with its reason, and a row for each model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

TITLES = {
    "torchvision": "torchvision, classification",
    "torchvision-tasks": "torchvision, segmentation and video",
    "timm": "timm, one small variant of each module",
    "transformers": "transformers, one small random configuration of each family",
}
GOALS = {"torchvision": 1.0, "torchvision-tasks": None, "timm": 0.95, "transformers": 1.0}
LEFT = {"torchvision": 0.45, "torchvision-tasks": 0.45, "timm": 0.45, "transformers": 0.50}
CHECKS = {
    "unseen": "the engine's proof on an unseen input",
    "plain": "second opinion, without code of the engine",
    "sliced": "weights and buffers as before, sliced",
    "ties": "ties kept",
    "state": "momentum cut with the weights",
    "step": "one SGD step",
    "save": "save and load by plan",
    "export": "torch.export",
    "onnx": "ONNX Runtime",
}
BESIDE = {
    "unseen": 1.0,
    "plain": 1.0,
    "sliced": 1.0,
    "ties": 1.0,
    "save": 1.0,
    "step": 1.0,
    "state": 1.0,
    "export": 0.98,
    "onnx": 0.98,
}
HOW = {"zeros": "zeros", "kept channels": "kept", "shapes": "shapes"}


def write_page(result: Row, path: Path) -> Path:
    """Write the page.

    Args:
        result: What the benchmark measured.
        path: The Markdown file.

    Returns:
        ``path``.
    """
    rows = result["rows"]
    sections = [
        opening(result),
        "## Goals and figures",
        table(["goal", "asked", "measured", ""], goals(rows)),
        "## By zoo",
        table(["zoo", "models", *OUTCOMES, "parameters left (median)", "MACs left (median)"], zoos(rows)),
        "## What does not work",
        failures(rows),
        LEGEND,
        *(section(zoo, title, rows) for zoo, title in TITLES.items()),
        not_runnable(result),
        LIMITS,
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(s for s in sections if s) + "\n", encoding="utf-8")
    return path


OUTCOMES = ("pruned", "refused", "crashed", "timed out", "not built")


def opening(result: Row) -> str:
    """Say what was run, where and how."""
    machine, rows = result["machine"], result["rows"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    sources = Counter(row["commit"] for row in rows)
    made = ", ".join(f"{name} ({number} rows)" if len(sources) > 1 else name for name, number in sources.most_common())
    missing = sum(result["models"].values()) - len(rows)
    hours = sum(row["total_seconds"] for row in rows) / 3600
    return "\n\n".join(
        [
            "# Which models structural pruning handles",
            *[f"**Incomplete: {missing} models have not been run.**"] * (missing > 0),
            f"{len(rows)} models, each shrunk to {result['channels_kept']:.0%} of its channels by "
            '`shrink_(model, Method(target=Target("channels", 0.6), pattern=Channel(), allocate=Layerwise()), inputs)`:'
            " no configuration of any model, magnitude scores, channel counts in multiples of 8, random weights.",
            f"`{result['command']}`, {result['date']}, commit {made}; {hours:.1f} hours of computation in "
            f"{machine['processes']} processes of one thread on {machine['cpu']}, {machine['cores']} cores, "
            f"{machine['os']}; {versions}. Seeds: {seeds(result['seeds'])}. Limits: "
            f"{result['limits']['stage_seconds']:g} s for each stage, {result['limits']['memory_gib']:g} GiB.",
        ]
    )


def seeds(found: Row) -> str:
    """Name the seeds."""
    return ", ".join(f"{k} {v if isinstance(v, int) else ' and '.join(map(str, v))}" for k, v in found.items())


# ---------------------------------------------------------------------------------------------------------------- goals


def goals(rows: Sequence[Row]) -> list[list[str]]:
    """Goal by goal, what was asked and what came out."""
    out = []
    for zoo, asked in GOALS.items():
        of_zoo = [row for row in rows if row["zoo"] == zoo]
        if of_zoo:
            out.append(goal(f"{zoo}: pruned", asked, [is_pruned(row) for row in of_zoo]))
    pruned = [row for row in rows if is_pruned(row)]
    out += [
        goal("every success exact: within 1e-10 of the largest output, float64", 1.0, [row["equal"] for row in pruned]),
        none("silent mismatches, on an unseen input or by the second opinion", [mismatch(row) for row in pruned]),
        none("refusals without a type (crashes, hangs)", [row["works"] in ("crashed", "timed out") for row in rows]),
        goal("refused or crashed models left bit for bit as they were", 1.0, told(rows, "untouched")),
        goal("parameters as counted by the report", 1.0, told(rows, "counted_right")),
    ]
    fits = [is_pruned(row) and left(row, "parameters") <= LEFT[row["zoo"]] for row in rows]
    out.append(goal("all models: parameters left ≤ 0.45, transformers ≤ 0.50", 0.9, fits))
    for zoo, limit in LEFT.items():
        of_zoo = [row for row in rows if row["zoo"] == zoo]
        if of_zoo:
            small = [is_pruned(row) and left(row, "parameters") <= limit for row in of_zoo]
            out.append(goal(f"{zoo}: parameters left ≤ {limit:.2f}", None, small))
    for check, asked in BESIDE.items():
        found = [row[check]["ok"] for row in pruned if check in row]
        note = f" ({found.count(None)} do not apply)" if None in found else ""
        if check == "plain":
            hows = Counter(row[check].get("how") for row in pruned if check in row)
            note = " (" + ", ".join(f"{hows[how]} {shown}" for how, shown in HOW.items()) + ")"
        if found:
            out.append(goal(CHECKS[check] + note, asked, [ok for ok in found if ok is not None]))
    return out


def goal(name: str, asked: float | None, met: Sequence[bool]) -> list[str]:
    """One goal of which a share of models must meet it."""
    share = sum(met) / len(met) if met else 1.0
    verdict = "" if asked is None else "met" if share >= asked else "**missed**"
    wanted = "" if asked is None else "all" if asked == 1 else f"≥ {asked:.0%}"
    return [name, wanted, f"{sum(met)} of {len(met)} ({share:.1%})", verdict]


def none(name: str, found: Sequence[bool]) -> list[str]:
    """One goal that must not happen."""
    return [name, "none", f"{sum(found)} of {len(found)}", "**missed**" if any(found) else "met"]


def told(rows: Iterable[Row], key: str) -> list[bool]:
    """The answers of the rows that have one."""
    return [row[key] for row in rows if key in row]


def is_pruned(row: Row) -> bool:
    """Whether there is a pruned model."""
    return bool(row["works"] == "pruned")


def mismatch(row: Row) -> bool:
    """Whether a model that passed the proof differs after all."""
    checks = [row.get(check, {}) for check in ("unseen", "plain")]
    return any(check.get("ok") is False and "difference" in check for check in checks)


def left(row: Row, what: str) -> float:
    """Share of the parameters or MACs that is left."""
    before, after = row[what]
    return float(after / before)


def zoos(rows: Sequence[Row]) -> list[list[str]]:
    """Outcomes, zoo by zoo."""
    out = []
    for zoo in TITLES:
        of_zoo = [row for row in rows if row["zoo"] == zoo]
        if not of_zoo:
            continue
        found = Counter(row["works"] for row in of_zoo)
        pruned = [row for row in of_zoo if is_pruned(row)]
        shares = [median(left(row, what) for row in pruned) for what in ("parameters", "macs")]
        out.append([zoo, str(len(of_zoo)), *(str(found[outcome]) for outcome in OUTCOMES), *shares])
    return out


def median(values: Iterable[float]) -> str:
    """The middle one, written with two digits."""
    ranked = sorted(values)
    return f"{ranked[len(ranked) // 2]:.2f}" if ranked else "–"


# ------------------------------------------------------------------------------------------------------------- failures


def failures(rows: Sequence[Row]) -> str:
    """Everything that went wrong, with the reason given."""
    lines = []
    for row in rows:
        if not is_pruned(row):
            kind = f"{row['works']}, {row['error']}" if "error" in row else row["works"]
            lines.append(f"- {row['zoo']}, **{row['name']}**: {kind}: {code(row['why'])}")
            continue
        for check, title in CHECKS.items():
            if row.get(check, {}).get("ok") is False:
                lines.append(f"- {row['zoo']}, **{row['name']}**, {title}: {code(reason(row[check]))}")
        if not row["equal"]:
            lines.append(f"- {row['zoo']}, **{row['name']}**: differs by {row['difference']:.1e} of {row['scale']:.1e}")
    return "\n".join(lines) or "Nothing."


def reason(check: Row) -> str:
    """What a failed check says."""
    return check.get("why") or f"differs by {check.get('difference', float('nan')):.1e} of {check.get('scale', 0):.1e}"


def code(text: str) -> str:
    """A message as it is, whatever Markdown makes of its characters."""
    return "`` " + text.replace("``", "'") + " ``"


# --------------------------------------------------------------------------------------------------------------- tables

LEGEND = """## Model by model

*Difference*: the largest between the pruned and the masked dense model in float64, by the engine's proof. *Inputs*: how
many it compared. *Scale*: the largest output. *Second opinion*, which shares no code with the engine: `zeros`: equal to
the dense model whose removed parameters are zero, on two inputs; `kept`: the same, with normalisation modules given the
kept channels only; `shapes`: statistics are computed outside of such modules, so that only finiteness, shapes and
dependence on the pruning were looked at. *Train* is one SGD step. `–` means that there is nothing to check, or
that the dense model cannot do it either. Seconds are CPU seconds of `shrink_`, proof included. *Groups*: coupled
groups, and how many of them stay whole."""

HEAD = (
    "model", "works", "difference", "scale", "inputs", "second opinion", "unseen", "parameters left", "MACs left",
    "ties", "train", "save", "export", "ONNX", "seconds", "groups",
)  # fmt: skip


def section(zoo: str, title: str, rows: Sequence[Row]) -> str:
    """The table of one zoo."""
    of_zoo = [row for row in rows if row["zoo"] == zoo]
    if not of_zoo:
        return ""
    parts = [f"### {title[0].upper()}{title[1:]}", table(HEAD, map(cells, of_zoo))]
    notes = [f"- {row['name']}: {'; '.join(said)}" for row in of_zoo if (said := remarks(row))]
    if notes:
        parts += ["What the engine had to find out by trial, and operators it has no rule for:", "\n".join(notes)]
    return "\n\n".join(parts)


def cells(row: Row) -> list[str]:
    """One model."""
    if not is_pruned(row):
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else "–"
        return [row["name"], f"**{row['works']}**", *["–"] * 12, seconds, "–"]
    whole = f" ({row['whole']} whole)" if row["whole"] else ""
    second = row.get("plain", {})
    opinion = HOW.get(second.get("how", ""), "**no**") if second.get("ok") else "**no**"
    return [
        row["name"],
        "pruned",
        f"{row['difference']:.0e}",
        f"{row['scale']:.2g}",
        str(row["inputs"]),
        opinion,
        mark(row, "unseen"),
        f"{left(row, 'parameters'):.3f}",
        f"{left(row, 'macs'):.3f}",
        mark(row, "ties"),
        mark(row, "step"),
        mark(row, "save"),
        mark(row, "export"),
        mark(row, "onnx"),
        f"{row['seconds']:.1f}",
        f"{row['groups']}{whole}",
    ]


def mark(row: Row, check: str) -> str:
    """Yes, no, or nothing to say."""
    return {True: "yes", False: "**no**", None: "–"}[row[check]["ok"]] if check in row else ""


def remarks(row: Row) -> list[str]:
    """What is worth knowing of a pruned model."""
    said = [code(why) for why in row.get("frozen", {}).values()]
    if row.get("unknown"):
        said.append("no rule for " + ", ".join(row["unknown"]))
    return said


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a Markdown table: first column left, the others right."""
    lines = [f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def not_runnable(result: Row) -> str:
    """Name the models that are left out."""
    reasons: dict[str, list[str]] = {}
    for name, why in result["not_runnable"].items():
        reasons.setdefault(why, []).append(name)
    lines = [f"- {', '.join(names)}: {why}." for why, names in reasons.items()]
    return "\n".join(["### Left out", "", *lines]) if lines else ""


LIMITS = """## Limits

- Random weights: this page says which models can be pruned and that the result is right, nothing of accuracy.
- timm and transformers models are small variants; other variants of a family can differ in structure.
- Inputs are as small as the architecture allows, so that MACs are those of these inputs.
- Exact means exact for the inputs compared. A branch that none of them takes is not compared."""
