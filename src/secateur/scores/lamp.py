"""A unit's share of what would be left if the smaller ones were gone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.scores.coupled import Coupled
from secateur.scores.magnitude import Magnitude
from secateur.types import GroupView, Need, Stats


@dataclass(frozen=True)
class Lamp:
    r"""Layer-adaptive magnitude, on whole units: the squared score over the sum of those that outlive it.

    With :math:`s_u` the inner score of unit :math:`u`, and the units of a group in the order in which they would go:

    .. math:: S_u = \frac{s_u^2}{\sum_{v \succeq u} s_v^2}

    The order within a group is that of the inner score. Across groups, ranked globally, it weighs a unit against what
    its own group would have left: the largest unit of every group scores 1, so that no group is emptied, and no group
    is favoured for the scale of its weights.

    Of equal units the one with the lowest index goes first, and its score counts all the others as outliving it; the
    paper's elementwise form does the same with any order of ties.

    Args:
        score: The inner score: root mean square of everything that a unit owns, unless given.

    Example:
        >>> from secateur.types import MemberView, Need
        >>> group = GroupView("fc", 3, (MemberView("fc@0", "out", torch.tensor([[2.0], [1.0], [2.0]])),))
        >>> [round(s, 3) for s in Lamp().units(group, {}).tolist()]
        [0.5, 0.111, 1.0]

    References:
        Jaeho Lee, Sejun Park, Sangwoo Mo, Sungsoo Ahn, Jinwoo Shin, Layer-adaptive Sparsity for the Magnitude-based
        Pruning, 2021.
    """

    score: Coupled = field(default_factory=lambda: Coupled(Magnitude(), "l2"))

    @property
    def needs(self) -> frozenset[Need]:
        """What the inner score needs."""
        return self.score.needs

    def units(self, group: GroupView, stats: Stats) -> Tensor | None:
        """Return one score per unit; ``None`` where the inner score says nothing."""
        inner = self.score.units(group, stats)
        if inner is None:
            return None
        # Float64: sums of many float32 squares would lose the small ones.
        square, order = inner.double().square().sort(stable=True)
        outlive = square.flip(0).cumsum(0).flip(0)
        return torch.empty_like(square).scatter(0, order, square / outlive.clamp_min(1e-300))
