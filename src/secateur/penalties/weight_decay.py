"""Weight decay as a penalty: the square of every weight, along with the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from secateur.errors import check_number
from secateur.penalties._weights import pressed_on, settle
from secateur.types import Tensors


@dataclass(frozen=True)
class WeightDecay:
    r"""Half the sum of the squared weights.

    .. math:: R = \frac{\lambda}{2} \sum_i w_i^2

    with :math:`\lambda` = ``strength``. Its gradient :math:`\lambda w` is added to the loss's: the coupled form, which
    Adam rescales along with it (the decoupled one is the optimizer ``adamw``). With ``proximal_step`` the optimizer's
    step is followed by

    .. math:: w \leftarrow \frac{w}{1 + \eta \lambda}

    instead, with :math:`\eta` how far that step goes for a gradient of one: the same minimum, and stable for any
    strength. On a quadratic loss with Hessian :math:`H` and minimum :math:`w_0` both end at
    :math:`(H + \lambda I)^{-1} H w_0`.

    Pitfalls:
        No weight becomes exactly zero: prune by magnitude afterwards. An optimizer's own ``weight_decay`` adds to this.

    Args:
        strength: :math:`\lambda`.
        proximal_step: Whether to act after the step.
        include: Shell patterns of the parameters to press on; by default all of at least two dimensions.
        exclude: Shell patterns of the parameters to leave alone.

    Raises:
        RecipeError: When the strength is negative or not finite.

    Example:
        >>> penalty, w = WeightDecay(0.1), {"fc.weight": torch.tensor([3.0, -1.0])}
        >>> round(float(penalty.value(w, {})), 6), penalty.gradient(w, {})["fc.weight"].mul(10).round().tolist()
        (0.5, [3.0, -1.0])

    References:
        David C. Plaut, Steven J. Nowlan, Geoffrey E. Hinton, Experiments on Learning by Back Propagation, 1986;
        Russell Reed, Pruning Algorithms - A Survey, 1993.
    """

    strength: float = 1e-4
    proximal_step: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_number("weight_decay: strength", self.strength)
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
        return self.strength / 2 * torch.stack([w.square().sum() for w in weights.values()]).sum()

    def gradient(self, weights: Tensors, state: Tensors) -> dict[str, Tensor]:
        """Return strength times weight."""
        return {} if self.proximal_step else {n: self.strength * w for n, w in weights.items()}

    def proximal(self, weights: Tensors, state: Tensors, rates: Tensors) -> dict[str, Tensor]:
        """Return the weights, shortened by the same factor."""
        if not self.proximal_step:
            return {}
        return {n: w / (1 + rates[n] * self.strength) for n, w in weights.items()}

    def advance(self, weights: Tensors, state: Tensors, step: int, loss: float | None) -> dict[str, Tensor]:
        """Return nothing."""
        return {}
