"""Chauvin's energy: hidden units that are active without need are made silent."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import Module

from secateur.errors import RecipeError, WeightError, check_number, nearest
from secateur.penalties._weights import settle

_NOT_HIDDEN = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.MultiheadAttention)


@dataclass(frozen=True)
class Chauvin:
    r"""The energy that hidden units spend.

    .. math:: R = \mu \sum_j e(o_j^2), \qquad \frac{de}{d(o^2)} = \frac{1}{(1 + o^2)^n}

    with :math:`\mu` = ``strength`` and :math:`n` = ``order``, summed over all that the watched modules put out for a
    sample, and averaged over the samples of the batch (the paper sums over patterns, as its error does; with the usual
    mean loss the balance is the same). The closed forms:

    ========= ============================ =====================================================
    ``order`` :math:`e(o^2)`               which activity is pressed on
    ========= ============================ =====================================================
    0         :math:`o^2`                  any, large activity most
    1         :math:`\log(1 + o^2)`        any, the small relatively more
    2         :math:`o^2 / (1 + o^2)`      small activity; what is large costs a constant
    ========= ============================ =====================================================

    It is no function of the weights: :class:`~secateur.penalties.PenalisedActivity` watches the modules, and its
    ``value()`` is added to the loss. Units that carry nothing fall silent; find them by
    :class:`~secateur.scores.ActivationStatistic` afterwards.

    Pitfalls:
        Weights behind a unit can make up for an output that has shrunk: add weight decay. A silent unit is still there:
        find it and cut it out. Activation functions that are called and are no modules are not watched.

    Args:
        strength: :math:`\mu`.
        order: :math:`n`.
        include: Shell patterns of the modules to watch; by default all activation functions that are modules (softmax
            aside).
        exclude: Shell patterns of the modules to leave alone.

    Raises:
        RecipeError: When the strength is negative or not finite, or there is no such order.

    Example:
        >>> o = torch.tensor([[1.0, 0.0], [3.0, 0.0]])  # two samples
        >>> [round(float(Chauvin(1.0, order=n).value(o)), 3) for n in (0, 1, 2)]
        [5.0, 1.498, 0.7]

    References:
        Yves Chauvin, A Back-Propagation Algorithm with Optimal Use of Hidden Units, 1989.
    """

    strength: float = 1e-4
    order: Literal[0, 1, 2] = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_number("chauvin: strength", self.strength)
        if self.order not in (0, 1, 2):
            raise RecipeError(f"chauvin: order must be 0, 1 or 2, got {self.order!r}")
        settle(self, "include", "exclude")

    def modules(self, model: Module) -> tuple[str, ...]:
        """Return the names of the modules that pass the filters.

        Raises:
            WeightError: When there are none, or a pattern matches nothing.
        """
        known = {name: module for name, module in model.named_modules() if name}
        for pattern in (*self.include, *self.exclude):
            if not any(fnmatch.fnmatchcase(name, pattern) for name in known):
                raise WeightError(f"the pattern {pattern!r} of chauvin matches no module; {nearest(pattern, known)}")
        found = [
            name
            for name, module in known.items()
            if (any(fnmatch.fnmatchcase(name, p) for p in self.include) if self.include else _is_activation(module))
            and not any(fnmatch.fnmatchcase(name, p) for p in self.exclude)
        ]
        if not found:
            raise WeightError(
                f"chauvin finds no activation function among the modules of {type(model).__name__}; where the forward "
                "calls functions instead, include the layers in front of them by name"
            )
        return tuple(found)

    def value(self, outputs: Tensor) -> Tensor:
        """Return the energy of one module's outputs."""
        energy = _ENERGIES[self.order](outputs.square())
        return self.strength * energy.sum() / max(len(outputs), 1)


def _saturating(square: Tensor) -> Tensor:
    return square / (1 + square)


_ENERGIES: dict[int, Callable[[Tensor], Tensor]] = {0: torch.clone, 1: torch.log1p, 2: _saturating}


def _is_activation(module: Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, _NOT_HIDDEN)
