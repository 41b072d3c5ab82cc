"""How much a unit is used, without labels or gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from secateur.errors import check_choice
from secateur.scores._normalise import Normalise, normalised
from secateur.types import GroupView, Stats

Statistic = Literal["absolute", "rms", "deviation", "nonzero"]

_NEEDS = {
    "absolute": "input_absolute",
    "rms": "input_square",
    "deviation": "input_variance",
    "nonzero": "input_nonzero",
}


@dataclass(frozen=True)
class ActivationStatistic:
    r"""A statistic of what a unit hands to the layers that read it.

    With :math:`a` the unit's activations where a layer reads them, over samples, positions and readers:

    .. math::
        \text{absolute:}\quad & S_u = \mathrm{E}\,|a| \\
        \text{rms:}\quad & S_u = \sqrt{\mathrm{E}\,[a^2]} \\
        \text{deviation:}\quad & S_u = \sqrt{\mathrm{Var}\,[a]} \\
        \text{nonzero:}\quad & S_u = \mathrm{P}(a \ne 0)

    ``nonzero`` is one minus the average percentage of zeros (APoZ), for ReLU networks; with smooth activations it is 1
    everywhere and says nothing. ``deviation`` takes a unit that is large and constant for dispensable, which it is when
    its constant is folded into the layers that read it (:func:`~secateur.structure.fold_constants_`).

    Pitfalls:
        Activations say nothing about what the readers make of them, and compare layers by scale: rank layerwise, or
        normalise. Padded positions count like all others. Groups that something else than a layer reads (a product of
        activations, a recurrent layer) are left whole, and reported.

    Cost:
        One forward pass per batch, and one more number per channel.

    Args:
        statistic: ``"absolute"``, ``"rms"``, ``"deviation"`` or ``"nonzero"``.
        normalise: Divide each group's scores by their own ``mean``, ``max`` or ``l2`` norm, or not at all.

    Example:
        >>> from secateur.types import MemberView
        >>> group = GroupView("conv", 2, (MemberView("next@1", "in", torch.zeros(2, 3)),))
        >>> stats = {"input_square": {"next@1": torch.tensor([[4.0], [9.0]])}}
        >>> ActivationStatistic("rms").units(group, stats).tolist()
        [2.0, 3.0]

    References:
        Hengyuan Hu, Rui Peng, Yu-Wing Tai, Chi-Keung Tang, Network Trimming, 2016 (``nonzero``); Pavlo Molchanov,
        Stephen Tyree, Tero Karras, Timo Aila, Jan Kautz, Pruning Convolutional Neural Networks for Resource Efficient
        Inference, 2017 (mean and deviation); Jocelyn Sietsma, Robert J. F. Dow, Neural Net Pruning: Why and How, 1988
        (units of constant output).
    """

    statistic: Statistic = "absolute"
    normalise: Normalise = "none"

    def __post_init__(self) -> None:
        check_choice("activation: statistic", self.statistic, get_args(Statistic))
        check_choice("activation: normalise", self.normalise, get_args(Normalise))

    @property
    def needs(self) -> frozenset[str]:
        """One statistic of the inputs of the layers that read the units."""
        return frozenset({_NEEDS[self.statistic]})

    def units(self, group: GroupView, stats: Stats) -> Tensor | None:
        """Return one score per unit, or ``None`` where nothing was seen of them."""
        table = stats[_NEEDS[self.statistic]]
        seen = [table[m.name] for m in group.members if m.name in table]
        if not seen:
            return None
        mean = torch.cat(seen, 1).double().mean(1)
        return normalised(mean.sqrt() if self.statistic in ("rms", "deviation") else mean, self.normalise)
