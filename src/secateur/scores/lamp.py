"""A unit's share of what would be left if the smaller ones were gone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.scores.coupled import Coupled
from secateur.scores.magnitude import Magnitude
from secateur.types import GroupView, Need, Stats, Tensors


@dataclass(frozen=True)
class Lamp:
    r"""Layer-adaptive magnitude: the squared score over the sum of those that outlive it.

    With :math:`s_u` the inner score of weight :math:`u`, or of a whole unit of a coupled group, and those of a layer or
    group in the order in which they would go:

    .. math:: S_u = \frac{s_u^2}{\sum_{v \succeq u} s_v^2}

    The order within a layer is that of the inner score. Across layers, ranked globally, it weighs a weight against what
    its own layer would have left: the largest of every layer scores 1, so that no layer is emptied, and none is
    favoured for the scale of its weights.

    Pitfalls:
        Use it with the global allocation; layerwise it ranks as the inner score. It makes layers comparable, not right:
        a layer that hardly matters keeps its share all the same. Of equals the one with the lowest index goes first,
        and its score counts all the others as outliving it; the authors' code gives them one score, which is less than
        1 for a layer whose largest weights are equal.

    Cost:
        One sort of each layer's weights, in float64.

    Args:
        score: The inner score of units: root mean square of everything that a unit owns, unless given. Single weights
            take the element score inside it, the magnitude.

    Example:
        >>> from secateur.types import MemberView, Need
        >>> group = GroupView("fc", 3, (MemberView("fc@0", "out", torch.tensor([[2.0], [1.0], [2.0]])),))
        >>> [round(s, 3) for s in Lamp().units(group, {}).tolist()]
        [0.5, 0.111, 1.0]
        >>> [round(s, 3) for s in Lamp()({"w": torch.tensor([2.0, 1.0, 2.0])}, {})["w"].tolist()]
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
        return _over_survivors(inner)

    def __call__(self, weights: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return one score per element, float64, each layer by itself."""
        return {n: _over_survivors(s.flatten()).view_as(s) for n, s in self.score.score(weights, stats).items()}


def _over_survivors(scores: Tensor) -> Tensor:
    # Float64: sums of many float32 squares would lose the small ones.
    square, order = scores.double().square().sort(stable=True)
    outlive = square.flip(0).cumsum(0).flip(0)
    return torch.empty_like(square).scatter(0, order, square / outlive.clamp_min(1e-300))
