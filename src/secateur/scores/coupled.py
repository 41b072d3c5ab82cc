"""Any element score, added up over everything that a unit owns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from secateur.errors import check_choice
from secateur.scores._normalise import Normalise, normalised
from secateur.scores.magnitude import Magnitude
from secateur.types import GroupView, Need, Score, Stats

Reduce = Literal["sum", "mean", "l2", "max"]
Over = Literal["all", "out", "in", "norm"]


@dataclass(frozen=True)
class Coupled:
    r"""Aggregate an element score over the parameters coupled to a unit.

    With :math:`S` the element score and :math:`P_u` the parameters of unit :math:`u` (rows of the layer that makes
    it, columns of the layers that read it, its scales, shifts and biases):

    .. math:: S_u = \underset{w \in P_u}{\mathrm{reduce}}\; S(w), \qquad
              \hat S_u = S_u \,/\, \mathrm{normalise}_{v \in \text{group}}(S_v)

    ``over = "out"`` with magnitudes and ``sum`` is the filter norm of Li et al.; ``over = "all"`` with squared
    magnitudes, ``mean`` and ``normalise = "mean"`` is the group norm of DepGraph.

    Pitfalls:
        Without normalisation, a global ranking compares groups by the scale of their weights. With ``over = "all"`` a
        group that many layers read is rated by its readers more than by itself.

    Cost:
        What the element score costs, and a sum.

    Args:
        score: The element score.
        reduce_by: ``sum``, ``mean``, ``l2`` (root of the mean square) or ``max``.
        over: Which of a unit's parameters count: ``all``, those that make it (``out``), that read it (``in``), or
            normalisation scales (``norm``).
        normalise: Divide each group's scores by their own ``mean``, ``max`` or ``l2`` norm, or not at all.

    Example:
        >>> from secateur.types import MemberView, Need
        >>> group = GroupView("conv", 2, (MemberView("conv.weight", "out", torch.tensor([[1.0, -2.0], [3.0, 4.0]])),))
        >>> Coupled(reduce_by="sum").units(group, {}).tolist()
        [3.0, 7.0]

    References:
        Hao Li, Asim Kadav, Igor Durdanovic, Hanan Samet, Hans Peter Graf, Pruning Filters for Efficient ConvNets,
        2017. Gongfan Fang, Xinyin Ma, Mingli Song, Michael Bi Mi, Xinchao Wang, DepGraph: Towards Any Structural
        Pruning, 2023.
    """

    score: Score = field(default_factory=Magnitude)
    reduce_by: Reduce = "mean"
    over: Over = "all"
    normalise: Normalise = "none"

    def __post_init__(self) -> None:
        check_choice("coupled: reduce_by", self.reduce_by, get_args(Reduce))
        check_choice("coupled: over", self.over, get_args(Over))
        check_choice("coupled: normalise", self.normalise, get_args(Normalise))

    @property
    def needs(self) -> frozenset[Need]:
        """What the element score needs."""
        return self.score.needs

    def units(self, group: GroupView, stats: Stats) -> Tensor | None:
        """Return one score per unit; ``None`` where the group owns nothing of the asked kind."""
        partials = []
        for member in group.members if self.over == "all" else group.of(self.over):
            own = {key: {member.name: table[member.name]} for key, table in stats.items() if member.name in table}
            elements = self.score({member.name: member.values}, own)[member.name]
            partials.append((self.partial(elements, [1]), elements.shape[1]))
        return self.combined(partials)

    def partial(self, elements: Tensor, dims: list[int]) -> Tensor:
        """Reduce element scores over some dimensions, so far as that can be done before the parts are combined."""
        if not dims:
            return elements.double().square() if self.reduce_by == "l2" else elements.double()
        if self.reduce_by == "max":
            return elements.amax(dims).double()
        if self.reduce_by == "l2":
            return elements.square().sum(dims).double()
        return elements.sum(dims).double()  # added up pairwise in the score's own width

    def combined(self, partials: list[tuple[Tensor, int]]) -> Tensor | None:
        """Combine what :meth:`partial` made of a group's members into one normalised score per unit.

        Args:
            partials: Per member, one number per unit and the elements per unit behind it.

        Returns:
            One score per unit; ``None`` without members.
        """
        if not partials:
            return None
        stacked = torch.stack([values for values, _ in partials])
        count = sum(elements for _, elements in partials)
        out = {
            "sum": lambda: stacked.sum(0),
            "mean": lambda: stacked.sum(0) / count,
            "l2": lambda: (stacked.sum(0) / count).sqrt(),
            "max": lambda: stacked.amax(0),
        }[self.reduce_by]()
        return normalised(out, self.normalise)
