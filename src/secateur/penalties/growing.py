"""Growing regularisation: units that are to go are pressed harder and harder, until removing them costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from secateur.errors import RecipeError, check_number, check_whole
from secateur.penalties._units import By, check_units, half_squares, parameters_by, scaled, units_of
from secateur.penalties._weights import settle
from secateur.select import keep_top_k
from secateur.types import CoupledGroup, Tensors


@dataclass(frozen=True)
class Growing:
    r"""Weight decay on the smallest units, which grows.

    .. math:: R = \frac{\lambda_n}{2} \sum_{k \in P} \|w_k\|_2^2, \qquad
        \lambda_n = \min(\lambda_\infty, \lambda_0 + \delta \lfloor n / K \rfloor)

    in step :math:`n`, with :math:`\lambda_0` = ``strength``, :math:`\delta` = ``step``, :math:`K` = ``every`` and
    :math:`\lambda_\infty` = ``ceiling``. :math:`P` is chosen once, at the start: in every weight (or coupled group) the
    ``share`` of units with the smallest :math:`\|w_k\|_1`, rounded down, exactly. What a unit is, ``by`` says, as in
    :class:`~secateur.penalties.GroupLasso`.

    The gradient :math:`\lambda_n w` is added before each step. Weights shrink with :math:`\eta \lambda_n`, so a
    ceiling near one over the learning rate is the most that makes sense; the paper grows from 1e-4 to 1.

    Pitfalls:
        The units are chosen once, at the start: begin with a trained network, and prune the same share afterwards. With
        plain SGD a ceiling above two over the learning rate diverges.

    Args:
        share: Fraction of the units that is pressed on.
        strength: :math:`\lambda_0`; above zero.
        step: :math:`\delta`.
        every: :math:`K`.
        ceiling: :math:`\lambda_\infty`.
        by: What a unit is.
        include: Shell patterns of the parameters to press on; by default all of at least two dimensions.
        exclude: Shell patterns of the parameters to leave alone.
        groups: The coupled groups; not in recipes, which find them themselves.

    Raises:
        RecipeError: When a number is out of its range, or groups do not go with ``by``.

    Example:
        >>> w = {"fc.weight": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}
        >>> penalty = Growing(share=0.5, strength=0.5, step=0.25, every=2)
        >>> state = penalty.start(w)
        >>> for n in range(4):
        ...     state = penalty.advance(w, state, n, None)
        >>> state["fc.weight"].tolist()
        [0.0, 1.0]

    References:
        Huan Wang, Can Qin, Yulun Zhang, Yun Fu, Neural Pruning via Growing Regularization, 2021.
    """

    share: float = 0.5
    strength: float = 1e-4
    step: float = 1e-4
    every: int = 10
    ceiling: float = 1.0
    by: By = "out"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    groups: tuple[CoupledGroup, ...] = ()

    def __post_init__(self) -> None:
        check_number("growing: share", self.share, most=1.0)
        check_number("growing: strength", self.strength, above=True)
        check_number("growing: step", self.step)
        check_whole("growing: every", self.every)
        check_number("growing: ceiling", self.ceiling, least=self.strength)
        settle(self, "include", "exclude", "groups")
        check_units("growing", self.by, self.groups)

    def parameters(self, model: Module) -> tuple[str, ...]:
        """Return the names of the parameters that have units and pass the filters.

        Raises:
            WeightError: When there are none, a pattern matches nothing, or a weight has no such units.
            RecipeError: When the coupled groups are missing.
        """
        return parameters_by("growing", model, self.by, self.groups, self.include, self.exclude)

    def start(self, weights: Tensors) -> dict[str, Tensor]:
        """Return the strength on each unit: that of the start, or zero.

        Raises:
            RecipeError: When the share of every weight's units is none at all.
        """
        state = {}
        for some in units_of(self.by, self.groups, weights):
            sizes = some.total({m.name: weights[m.name].abs() for m in some.members})
            stay = some.count - int(self.share * some.count + 1e-9)
            gone = ~keep_top_k(sizes, stay, some.name)
            state[some.name] = self.strength * gone.to(sizes)
        if self.share > 0 and not any(bool(s.any()) for s in state.values()):
            raise RecipeError(f"growing: share = {self.share} of at most {max(map(len, state.values()))} units is none")
        return state

    def value(self, weights: Tensors, state: Tensors) -> Tensor:
        """Return the penalty."""
        return half_squares(units_of(self.by, self.groups, weights), state, weights)

    def gradient(self, weights: Tensors, state: Tensors) -> dict[str, Tensor]:
        """Return each unit's weights times its strength."""
        return scaled(units_of(self.by, self.groups, weights), dict(state), weights)

    def proximal(self, weights: Tensors, state: Tensors, rates: Tensors) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def advance(self, weights: Tensors, state: Tensors, step: int, loss: float | None) -> dict[str, Tensor]:
        """Return the strengths, grown after every ``every`` steps."""
        if (step + 1) % self.every:
            return dict(state)
        # Counted, not added up: a sum of ten thousand steps would have drifted.
        now = min(self.ceiling, self.strength + self.step * ((step + 1) // self.every))
        return {n: torch.where(s > 0, now, 0.0).to(s) for n, s in state.items()}
