"""Decay of whole units, the stronger the less they matter: weak ones die, strong ones are spared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from secateur.errors import check_number, check_whole
from secateur.penalties._units import By, check_units, half_squares, parameters_by, scaled, units_of
from secateur.penalties._weights import settle
from secateur.types import CoupledGroup, Tensors


@dataclass(frozen=True)
class GroupNorm:
    r"""Squared norms of units, weighted by how small they are.

    .. math:: R = \frac{\lambda}{2} \sum_k \gamma_k \|w_k\|_2^2, \qquad
        \gamma_k = 2^{\alpha (I_{max} - I_k) / (I_{max} - I_{min})}

    with :math:`\lambda` = ``strength``, :math:`\alpha` = ``alpha``, and :math:`I_k = \|w_k\|_2^2`, compared among the
    units of one weight or coupled group: the largest has the factor 1, the smallest :math:`2^\alpha`. Where all are
    alike, it is 1. The factors are taken anew every ``every`` steps, and are constants to the gradient
    :math:`\lambda \gamma_k w_k`, which is added before each step. The paper presses on everything coupled to a
    channel: ``by = "coupled"``, with the columns that read it.

    Pitfalls:
        Only units of one weight or group are compared: where all matter the smallest is pressed on all the same. No
        unit becomes exactly zero: prune afterwards.

    Args:
        strength: :math:`\lambda`.
        alpha: :math:`\alpha`.
        every: Steps between two looks at the norms.
        by: What a unit is; see :class:`~secateur.penalties.GroupLasso`.
        include: Shell patterns of the parameters to press on; by default all of at least two dimensions.
        exclude: Shell patterns of the parameters to leave alone.
        groups: The coupled groups; not in recipes, which find them themselves.

    Raises:
        RecipeError: When a number is out of its range, or groups do not go with ``by``.

    Example:
        >>> w = {"fc.weight": torch.tensor([[2.0], [1.0], [0.0]])}
        >>> GroupNorm(1.0, alpha=4.0).start(w)["fc.weight"].tolist()  # norms 4, 1, 0: exponents 0, 3, 4
        [1.0, 8.0, 16.0]

    References:
        Gongfan Fang, Xinyin Ma, Mingli Song, Michael Bi Mi, Xinchao Wang, DepGraph: Towards Any Structural Pruning,
        2023.
    """

    strength: float = 1e-4
    alpha: float = 4.0
    every: int = 1
    by: By = "out"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    groups: tuple[CoupledGroup, ...] = ()

    def __post_init__(self) -> None:
        check_number("group_norm: strength", self.strength)
        check_number("group_norm: alpha", self.alpha, most=64.0)
        check_whole("group_norm: every", self.every)
        settle(self, "include", "exclude", "groups")
        check_units("group_norm", self.by, self.groups)

    def parameters(self, model: Module) -> tuple[str, ...]:
        """Return the names of the parameters that have units and pass the filters.

        Raises:
            WeightError: When there are none, a pattern matches nothing, or a weight has no such units.
            RecipeError: When the coupled groups are missing.
        """
        return parameters_by("group_norm", model, self.by, self.groups, self.include, self.exclude)

    def start(self, weights: Tensors) -> dict[str, Tensor]:
        """Return the factor of each unit."""
        state = {}
        for some in units_of(self.by, self.groups, weights):
            squares = some.squares(weights)
            span = squares.max() - squares.min()
            apart = (squares.max() - squares) / torch.where(span > 0, span, 1.0)
            state[some.name] = torch.exp2(self.alpha * apart)
        return state

    def value(self, weights: Tensors, state: Tensors) -> Tensor:
        """Return the penalty."""
        return self.strength * half_squares(units_of(self.by, self.groups, weights), state, weights)

    def gradient(self, weights: Tensors, state: Tensors) -> dict[str, Tensor]:
        """Return each unit's weights times strength and factor."""
        factors = {n: self.strength * s for n, s in state.items()}
        return scaled(units_of(self.by, self.groups, weights), factors, weights)

    def proximal(self, weights: Tensors, state: Tensors, rates: Tensors) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def advance(self, weights: Tensors, state: Tensors, step: int, loss: float | None) -> dict[str, Tensor]:
        """Return the factors, taken anew after every ``every`` steps."""
        return dict(state) if (step + 1) % self.every else self.start(weights)
