"""The scale of the normalisation behind a channel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.types import GroupView, Stats


@dataclass(frozen=True)
class NormScale:
    r"""Size of a channel's batch-norm scale.

    .. math:: S_u = \textstyle\sum_l |\gamma_{l,u}|

    summed over the normalisations that the unit passes through (one, in a plain network). Groups that no normalisation
    follows are left whole, and reported.

    Pitfalls:
        A scale means something after training with an L1 penalty on :math:`\gamma`: without one, scales say little. The
        shift of a channel outlives its scale: fold it into what follows (:func:`~secateur.structure.fold_constants_`),
        or the outputs move.

    Cost:
        Nothing: no data, no pass.

    Example:
        >>> import torch
        >>> from secateur.types import MemberView
        >>> group = GroupView("conv", 2, (MemberView("bn.weight", "norm", torch.tensor([[-0.5], [0.1]])),))
        >>> [round(s, 2) for s in NormScale().units(group, {}).tolist()]
        [0.5, 0.1]

    References:
        Zhuang Liu, Jianguo Li, Zhiqiang Shen, Gao Huang, Shoumeng Yan, Changshui Zhang, Learning Efficient
        Convolutional Networks through Network Slimming, 2017.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Nothing but the weights."""
        return frozenset()

    def units(self, group: GroupView, stats: Stats) -> Tensor | None:
        """Return one score per unit, or ``None`` without a normalisation."""
        norms = group.of("norm")
        if not norms:
            return None
        first, *others = (m.values.double().abs().sum(1) for m in norms)
        return sum(others, start=first)
