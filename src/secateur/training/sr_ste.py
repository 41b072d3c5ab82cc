"""N:M sparsity from scratch: the mask follows the weights, and pruned ones are held back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from secateur.errors import SelectionError, check_number
from secateur.patterns import NM
from secateur.training._tensors import wide, zeroed
from secateur.types import Masks, Moment, Tensors, Weight


class _Refined(torch.autograd.Function):
    """Masks going forward; going back, lets the whole gradient through and pulls pruned weights towards zero."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        """Return the masked weight."""
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return zeroed(weight, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return g + decay * (1 - mask) * w."""
        weight, mask = ctx.saved_tensors
        return grads[0] + ctx.decay * zeroed(weight, ~mask), None, None


@dataclass(frozen=True)
class SrSte:
    r"""The N largest of every M weights in each forward pass, with a sparse-refined straight-through gradient.

    .. math:: W = w \odot m, \qquad \frac{\partial L}{\partial w} := g + \lambda\,(1 - m) \odot w

    with :math:`m` the N:M mask of the largest :math:`|w|`, made anew every time, :math:`g` the gradient of :math:`W`,
    for pruned weights too, and :math:`\lambda` = ``decay``: without it the mask keeps changing until the end. With 0 it
    is the plain straight-through estimator.

    Pitfalls:
        The decay is added once per backward pass, whatever the loss is scaled with: with a ``GradScaler``, or when
        gradients of several passes are added up, it is weaker or stronger accordingly.

    Args:
        n: Weights kept of each group.
        m: Group size, along the input dimension.
        decay: :math:`\lambda`.

    Raises:
        PatternError: When not 1 <= n <= m.
        RecipeError: When the decay is negative or not finite.

    Example:
        >>> at = Moment({"w": torch.tensor([[3.0, -1.0, 2.0, 0.5]])}, {}, {"w": Weight("w", (1, 4))})
        >>> SrSte(2, 4).final(at)[0]["w"].tolist()
        [[3.0, 0.0, 2.0, 0.0]]

    References:
        Aojun Zhou, Yukun Ma, Junnan Zhu, Jianbo Liu, Zhijie Zhang, Kun Yuan, Wenxiu Sun, Hongsheng Li, Learning N:M
        Fine-grained Structured Sparse Neural Networks From Scratch, 2021.
    """

    n: int = 2
    m: int = 4
    decay: float = 2e-4

    def __post_init__(self) -> None:
        NM(self.n, self.m)
        check_number("sr_ste: decay", self.decay)

    @property
    def pattern(self) -> NM:
        """N of every M."""
        return NM(self.n, self.m)

    def check(self, weight: Weight) -> None:
        """Refuse an input dimension that M does not divide.

        Raises:
            PatternError: Names the weight and the ways out.
        """
        self.pattern.check(weight)

    def asked(self, step: int | None) -> float | None:
        """Return 1 - N/M, always."""
        return 1.0 - self.n / self.m

    def start(self, weights: Tensors, layouts: Mapping[str, Weight], noise: Generator) -> dict[str, Tensor]:
        """Return nothing: the weights are all there is."""
        return {}

    def _masks(self, at: Moment) -> Masks:
        pattern = self.pattern
        masks: Masks = {}
        for name, layout in at.layouts.items():
            scores = pattern.reduce(layout, wide(at.weights[name].detach()).abs())
            try:
                kept = pattern.select(layout, scores, scores.numel() // self.m * self.n)
            except SelectionError as error:
                raise SelectionError(f"{name}: {error}") from None
            masks |= pattern.expand(layout, kept)
        return masks

    def weights(self, at: Moment, noise: Generator | None) -> dict[str, Tensor]:
        """Return the masked weights."""
        out: dict[str, Tensor] = {}
        for name, mask in self._masks(at).items():
            out[name] = _Refined.apply(at.weights[name], mask, self.decay)  # type: ignore[no-untyped-call]
        return out

    def final(self, at: Moment) -> tuple[dict[str, Tensor], Masks]:
        """Return the masked weights."""
        masks = self._masks(at)
        return {n: torch.where(m, at.weights[n], 0.0) for n, m in masks.items()}, masks

    def penalty(self, at: Moment) -> Tensor:
        """Return zero: the pressure on pruned weights is in their gradient."""
        return torch.zeros(())

    def advance(self, at: Moment) -> dict[str, Tensor]:
        """Return nothing."""
        return {}
