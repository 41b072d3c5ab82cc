"""What a pruning step reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """What happened to one weight."""

    name: str
    shape: tuple[int, ...]
    total: int
    kept: int

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return 1.0 - self.kept / self.total if self.total else 0.0


@dataclass(frozen=True)
class GroupReport:
    """One coupled group.

    Attributes:
        name: Its name.
        units: Units before.
        kept: Units after.
        members: Tensors and dimensions that shrink with it, ``"layer1.0.conv1.weight[0]"``, and modules that go with
            its units, ``"mixture.experts.3"``.
    """

    name: str
    units: int
    kept: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class PruneReport:
    """Asked beside achieved: what every pruning step returns.

    Attributes:
        target: Name of the target, as in the recipe.
        asked: The target's value at this point of the schedule.
        achieved: The same quantity, counted on the masks.
        goal: The target's value at the end of the schedule.
        finished: Whether the schedule has reached its end.
        sparsity: Fraction of the prunable weights that is zero by mask.
        layers: One row per weight.
        skipped: Weights left alone, and why; with coupled units, groups.
        groups: One row per coupled group, where units of coupled groups are pruned.
        ablation: What the method was robbed of, in words; empty for the method itself.
    """

    target: str
    asked: float
    achieved: float
    goal: float
    finished: bool
    sparsity: float
    layers: tuple[LayerReport, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[GroupReport, ...] = ()
    ablation: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "target": self.target,
            "asked": self.asked,
            "achieved": self.achieved,
            "goal": self.goal,
            "finished": self.finished,
            "sparsity": self.sparsity,
            "layers": [
                {"name": r.name, "shape": list(r.shape), "total": r.total, "kept": r.kept, "sparsity": r.sparsity}
                for r in self.layers
            ],
            "skipped": dict(self.skipped),
            "groups": [{"name": g.name, "units": g.units, "kept": g.kept} for g in self.groups],
            "ablation": self.ablation,
        }
