"""How replaceable a filter is by the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.types import GroupView, Stats


@dataclass(frozen=True)
class GeometricMedian:
    r"""Distance of a filter to all others of its group.

    .. math:: S_u = \sum_v \lVert F_u - F_v \rVert_2

    with :math:`F_u` the weights that make unit :math:`u`, signs included. The filter closest to the geometric median
    says least that the others do not, and goes first. A filter far from zero but near the crowd is pruned; a small one
    far from it stays, unlike with a norm.

    Pitfalls:
        Distances grow with the scale of a layer's weights and with its number of units: rank layerwise. Of two filters
        that are equal both are called replaceable, and both may go; what the readers make of a filter is not seen.

    Cost:
        The distances of all pairs of a group's units: units² times weights per unit.

    Example:
        >>> from secateur.types import MemberView
        >>> rows = torch.tensor([[0.0], [1.0], [5.0]])
        >>> GeometricMedian().units(GroupView("conv", 3, (MemberView("conv.weight", "out", rows),)), {}).tolist()
        [6.0, 5.0, 9.0]

    References:
        Yang He, Ping Liu, Ziwei Wang, Zhilan Hu, Yi Yang, Filter Pruning via Geometric Median for Deep Convolutional
        Neural Networks Acceleration, 2019.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Nothing but the weights."""
        return frozenset()

    def units(self, group: GroupView, stats: Stats) -> Tensor | None:
        """Return one score per unit, or ``None`` where nothing makes the units."""
        makers = group.of("out")
        if not makers:
            return None
        rows = torch.cat([m.values.double() for m in makers], dim=1)
        # Without the matrix-product shortcut, whose cancellation is as large as close distances.
        return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
