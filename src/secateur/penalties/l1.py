"""The sum of the sizes of all weights: the penalty that makes single weights exactly zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from secateur.errors import check_number
from secateur.penalties._shrink import softened
from secateur.penalties._weights import pressed_on, settle
from secateur.types import Tensors


@dataclass(frozen=True)
class L1:
    r"""The sum of the absolute weights (lasso).

    .. math:: R = \lambda \sum_i |w_i|

    with :math:`\lambda` = ``strength``. The subgradient :math:`\lambda\,\mathrm{sign}(w)` is added before each step:
    weights that the loss does not need end up around zero, within a step of it, and never at it. With
    ``proximal_step`` the step is followed by the soft threshold

    .. math:: w \leftarrow \mathrm{sign}(w) \max(0, |w| - \eta \lambda)

    instead, with :math:`\eta` how far the optimizer's step goes for a gradient of one: the same minimum, with exact
    zeros.

    Pitfalls:
        It presses on large weights as on small ones, so what stays is smaller than it should be: prune, and train on
        without it. Without ``proximal_step`` no weight is ever exactly zero. A norm behind a layer divides its scale
        out again, so that weights can shrink without anything getting smaller.

    Args:
        strength: :math:`\lambda`.
        proximal_step: Whether to act after the step, with exact zeros.
        include: Shell patterns of the parameters to press on; by default all of at least two dimensions.
        exclude: Shell patterns of the parameters to leave alone.

    Raises:
        RecipeError: When the strength is negative or not finite.

    Example:
        >>> w = {"fc.weight": torch.tensor([3.0, -1.0, 0.25])}
        >>> L1(0.5, proximal_step=True).proximal(w, {}, {"fc.weight": torch.tensor(1.0)})["fc.weight"].tolist()
        [2.5, -0.5, 0.0]

    References:
        Robert Tibshirani, Regression Shrinkage and Selection via the Lasso, 1996; Ingrid Daubechies, Michel Defrise,
        Christine De Mol, An Iterative Thresholding Algorithm for Linear Inverse Problems with a Sparsity Constraint,
        2004.
    """

    strength: float = 1e-4
    proximal_step: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_number("l1: strength", self.strength)
        settle(self, "include", "exclude")

    def parameters(self, model: Module) -> tuple[str, ...]:
        """Return the names of the parameters that pass the filters.

        Raises:
            WeightError: When there are none, or a pattern matches nothing.
        """
        return pressed_on(model, self.include, self.exclude)

    def start(self, weights: Tensors) -> dict[str, Tensor]:
        """Return nothing: no step differs from another."""
        return {}

    def value(self, weights: Tensors, state: Tensors) -> Tensor:
        """Return the penalty."""
        return self.strength * torch.stack([w.abs().sum() for w in weights.values()]).sum()

    def gradient(self, weights: Tensors, state: Tensors) -> dict[str, Tensor]:
        """Return the subgradient, zero at zero."""
        return {} if self.proximal_step else {n: self.strength * w.sign() for n, w in weights.items()}

    def proximal(self, weights: Tensors, state: Tensors, rates: Tensors) -> dict[str, Tensor]:
        """Return the weights, nearer to zero by rate times strength."""
        return softened(weights, rates, self.strength) if self.proximal_step else {}

    def advance(self, weights: Tensors, state: Tensors, step: int, loss: float | None) -> dict[str, Tensor]:
        """Return nothing."""
        return {}
