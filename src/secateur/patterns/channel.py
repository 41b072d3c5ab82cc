"""Output units: neurons of a linear layer, filters of a convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from secateur.errors import PatternError, check_choice
from secateur.patterns._layout import from_oki, oki_shape, to_oki
from secateur.patterns.block import Reduce, aggregate
from secateur.select import keep_top_k
from secateur.types import Masks, Weight


@dataclass(frozen=True)
class Channel:
    """All weights of one output unit, with its bias, as one unit; or everything coupled to it.

    As a mask it covers the layer's own weight and bias and, given example inputs, the scale and shift of the norm
    behind it, so that a masked unit is silent. The network still carries the zeros; ``secateur.shrink_`` cuts them out
    of every layer that they reach. The budget counts weights; the vectors that die with their units come on top, and a
    target in parameters reports them as achieved.

    Layers whose outputs are added up (residual streams), heads that share keys, and the like must lose the same
    units, or little can be cut out. With ``coupled`` they do: units of coupled groups are scored and go together, the
    masks cover every parameter that has a place for the unit, and the target counts what is left once they are cut
    out. That needs example inputs, and takes group scores and targets in channels too.

    Args:
        reduce_by: How element scores become the unit's: ``mean`` (comparable between layers), ``sum`` (the L1 norm
            of the paper when the score is the magnitude), ``l2`` or ``max``.
        coupled: Mask units of coupled groups, wherever they have a place.
        align: With ``coupled``: channel counts stay multiples of it; 1 switches it off.
        uniform: With ``coupled``: dimensions of one size keep one size.
        exact: With ``coupled``: leave dimensions alone that a normalisation runs over; cutting out then changes
            nothing but rounding.

    Example:
        >>> w = Weight("conv.weight", (2, 1, 1, 2))
        >>> Channel().reduce(w, torch.tensor([1.0, 3.0, 5.0, 7.0]).view(2, 1, 1, 2)).tolist()
        [2.0, 6.0]

    References:
        Hao Li, Asim Kadav, Igor Durdanovic, Hanan Samet, Hans Peter Graf, Pruning Filters for Efficient ConvNets,
        2017. Gongfan Fang, Xinyin Ma, Mingli Song, Michael Bi Mi, Xinchao Wang, DepGraph: Towards Any Structural
        Pruning, 2023 (coupled groups).
    """

    reduce_by: Reduce = "mean"
    coupled: bool = False
    align: int = 8
    uniform: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        check_choice("channel: reduce_by", self.reduce_by, get_args(Reduce))
        if isinstance(self.align, bool) or not isinstance(self.align, int) or self.align < 1:
            raise PatternError(f"channel: align must be a whole number of at least 1, got {self.align!r}")
        if not self.coupled and (self.align != 8 or self.uniform or self.exact):
            raise PatternError("channel: align, uniform and exact are about coupled units; add coupled = true")

    @property
    def density(self) -> float | None:
        """Free: any number of units may stay."""
        return None

    def check(self, weight: Weight) -> None:
        """Accept every shape."""

    def reduce(self, weight: Weight, values: Tensor) -> Tensor:
        """Aggregate over everything but the output dimension."""
        rows = to_oki(weight, values).flatten(1)
        if rows.dtype == torch.bool:
            return rows.any(1)
        return aggregate(rows, rows.shape[1], self.reduce_by)

    def sizes(self, weight: Weight) -> int | Tensor:
        """Elements of one output unit."""
        _, kernel, inputs = oki_shape(weight)
        return kernel * inputs

    def select(self, weight: Weight, scores: Tensor, keep: int) -> Tensor:
        """Keep the ``keep`` highest."""
        return keep_top_k(scores, keep)

    def expand(self, weight: Weight, kept: Tensor) -> Masks:
        """Repeat every flag over its unit, and mask the unit's bias and companions."""
        shape = oki_shape(weight)
        masks = {weight.name: from_oki(weight, kept[:, None, None].expand(shape))}
        own = weight.companions if weight.bias is None else (weight.bias, *weight.companions)
        masks |= {name: kept.clone() for name in own}
        return masks
