"""What shrinking did: asked beside achieved, group by group, with the proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.graph.groups import Group
from secateur.graph.plan import Plan
from secateur.graph.verify import Proof
from secateur.types import GroupReport


@dataclass(frozen=True)
class ShrinkReport:
    """A shrunk model in figures.

    Attributes:
        plan: What was done; replays on a fresh instance.
        proof: The comparison with the masked dense model.
        parameters: Parameters before and after, tied ones once.
        macs: Multiply-accumulates of the example input before and after.
        groups: One row per coupled group.
        skipped: Groups left whole on purpose, and why.
        frozen: Modules that trial and error had to constrain, and why.
        unknown: Operators without a rule, and the modules that call them.
        target: Name of the target, empty for a plan or masks.
        asked: Its value.
        achieved: The same quantity of the shrunk model.
        config: Why the model's configuration object could not be brought in line; empty where it was, or has none.
    """

    plan: Plan
    proof: Proof
    parameters: tuple[int, int]
    macs: tuple[int, int]
    groups: tuple[GroupReport, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    frozen: Mapping[str, str] = field(default_factory=dict)
    unknown: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    target: str = ""
    asked: float | None = None
    achieved: float | None = None
    config: str = ""

    def explain(self, name: str) -> str:
        """Say what happens to a layer, and what goes with it.

        Args:
            name: Name of a group, a module or a parameter.
        """
        return explain(self.groups, self.skipped, name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "target": self.target,
            "asked": self.asked,
            "achieved": self.achieved,
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "macs": {"before": self.macs[0], "after": self.macs[1]},
            "proof": self.proof.to_dict(),
            "groups": [
                {"name": g.name, "units": g.units, "kept": g.kept, "members": list(g.members)} for g in self.groups
            ],
            "skipped": dict(self.skipped),
            "frozen": dict(self.frozen),
            "config": self.config,
            "unknown": {name: list(modules) for name, modules in self.unknown.items()},
        }

    def __str__(self) -> str:
        (p0, p1), (m0, m1) = self.parameters, self.macs
        lines = [f"parameters {p0:,} -> {p1:,} ({p1 / p0:.1%}), MACs {m0:,} -> {m1:,} ({m1 / max(m0, 1):.1%})"]
        if self.asked is not None and self.achieved is not None:
            lines.append(f"target {self.target}: asked {self.asked:g}, achieved {self.achieved:.4g}")
        lines.append(str(self.proof))
        if self.config:
            lines.append(self.config)
        if self.unknown:
            lines.append("operators without a rule (what they touch stays whole): " + ", ".join(self.unknown))
        return "\n".join(lines)


def members_of(group: Group) -> tuple[str, ...]:
    """Return what goes with a group's units: dimensions of tensors, and whole modules."""
    dims = tuple(f"{m.name}[{m.dim}]" for m in group.members)
    return dims + tuple(entry for entries in group.owned for entry in entries)


def explain(groups: tuple[GroupReport, ...], skipped: Mapping[str, str], name: str) -> str:
    """Describe the groups that a layer takes part in."""
    lines = []
    for group in groups:
        touched = [
            m
            for m in group.members
            if m.partition("[")[0] == name or m.startswith(f"{name}.") or name.startswith(f"{m}.")
        ]
        if group.name == name or touched:
            why = f", left whole: {skipped[group.name]}" if group.name in skipped else ""
            lines.append(f"{group.name}: {group.kept} of {group.units} units stay{why}; goes with it: "
                         + ", ".join(group.members))  # fmt: skip
    return "\n".join(lines)
