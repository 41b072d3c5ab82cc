"""Absolute value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from secateur.errors import check_choice
from secateur.scores._wide import wide
from secateur.types import Stats, Tensors


@dataclass(frozen=True)
class Magnitude:
    r"""The size of the weight.

    .. math:: S_{ij} = |w_{ij}|^p

    with :math:`p` = ``p``. For single weights both ranks are the same; summed over a block or a filter, p = 1 gives
    the L1 norm and p = 2 the squared L2 norm.

    Pitfalls:
        Global ranking compares layers by scale: multiplying a convolution in front of a batch norm by 1000 changes
        nothing that the network computes and everything about this score. Rank layerwise, or by ``lamp``, where scales
        differ.

    Cost:
        Nothing: no data, no pass.

    Args:
        p: 1 or 2.

    Example:
        >>> import torch
        >>> Magnitude(p=2)({"w": torch.tensor([-3.0, 2.0])}, {})["w"].tolist()
        [9.0, 4.0]

    References:
        Song Han, Jeff Pool, John Tran, William J. Dally, Learning both Weights and Connections for Efficient Neural
        Networks, 2015; Hao Li et al., Pruning Filters for Efficient ConvNets, 2017 (filter norms).
    """

    p: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        check_choice("magnitude: p", self.p, (1, 2))

    @property
    def needs(self) -> frozenset[str]:
        """Nothing but the weights."""
        return frozenset()

    def __call__(self, weights: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return |w|^p, in float32 or better: squares of small float16 weights are all zero in float16."""
        return {name: _power(wide(w), self.p) for name, w in weights.items()}


def _power(w: Tensor, p: int) -> Tensor:
    return w.abs() if p == 1 else w.square()
