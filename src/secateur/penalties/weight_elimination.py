"""Weight elimination: a count of the weights that matter, softened so that it has a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from secateur.errors import MissingStatsError, check_number, check_whole
from secateur.penalties._weights import pressed_on, settle
from secateur.types import Tensors


@dataclass(frozen=True)
class WeightElimination:
    r"""The number of weights that are large beside a scale.

    .. math:: R = \lambda \sum_i \frac{w_i^2 / w_0^2}{1 + w_i^2 / w_0^2}

    with :math:`w_0` = ``scale``. A weight far above it costs :math:`\lambda`, whatever its size; one far below pays as
    under weight decay. The gradient

    .. math:: \lambda \frac{2 w_i / w_0^2}{(1 + w_i^2 / w_0^2)^2}

    is largest at :math:`w_0 / \sqrt{3}`: what is smaller is driven out, what is larger is left in peace. A large
    ``scale`` gives weight decay, a small one counts the weights that are not zero.

    :math:`\lambda` = ``strength`` stays as it is when given. Left out, it starts at zero and follows the error
    :math:`E_n`, the mean of the losses that :meth:`~secateur.penalties.Penalised.observe` was told over ``every``
    steps (a step sees the last one told). With :math:`A_n = \gamma A_{n-1} + (1 - \gamma) E_n`, :math:`\gamma` =
    ``memory``, and the wanted error :math:`D` = ``wanted``:

    ======================================== ====================================================
    the error                                then
    ======================================== ====================================================
    :math:`E_n < D` or :math:`E_n < E_{n-1}` :math:`\lambda` grows by ``delta``
    else :math:`E_n < A_n`: high for once    :math:`\lambda` falls by ``delta``, but not below zero
    else: high and staying so                :math:`\lambda` is multiplied by ``cut``
    ======================================== ====================================================

    The paper starts from zero, raises :math:`\lambda` while the error falls and cuts it back when it rises, comparing
    errors of whole epochs: for that, let ``every`` be the number of steps in one. The three cases and their numbers are
    written from memory of it and were not compared with its text: take all defaults, ``delta`` and ``cut`` included, as
    this library's own. So is that the first :math:`E_n` only starts the comparison, and that :math:`\lambda` stops at
    zero.

    Pitfalls:
        The penalty is not convex: there is no proximal step, and pressed on from the first step, weights below the
        scale are driven out before any has learned something. Nothing becomes exactly zero: prune afterwards.

    Args:
        strength: :math:`\lambda`, or nothing for one that follows the error.
        scale: :math:`w_0`; of the order of the weights that are to stay.
        delta: What :math:`\lambda` grows and falls by.
        cut: What it is multiplied by when the error is high.
        memory: :math:`\gamma`, of the average error.
        wanted: :math:`D`, an error that is good enough.
        every: Steps between two decisions.
        include: Shell patterns of the parameters to press on; by default all of at least two dimensions.
        exclude: Shell patterns of the parameters to leave alone.

    Raises:
        RecipeError: When a number is out of its range.

    Example:
        >>> penalty, w = WeightElimination(1.0, scale=1.0), {"fc.weight": torch.tensor([100.0, 1.0, 0.0])}
        >>> round(float(penalty.value(w, {})), 3)  # one weight, half a weight, none
        1.5

    References:
        Andreas S. Weigend, David E. Rumelhart, Bernardo A. Huberman, Generalization by Weight-Elimination with
        Application to Forecasting, 1991.
    """

    strength: float | None = None
    scale: float = 1.0
    delta: float = 5e-6
    cut: float = 0.9
    memory: float = 0.9
    wanted: float = 0.0
    every: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.strength is not None:
            check_number("weight_elimination: strength", self.strength)
        check_number("weight_elimination: scale", self.scale, above=True)
        check_number("weight_elimination: delta", self.delta)
        check_number("weight_elimination: cut", self.cut, most=1.0)
        check_number("weight_elimination: memory", self.memory, most=1.0)
        check_number("weight_elimination: wanted", self.wanted, least=-math.inf)
        check_whole("weight_elimination: every", self.every)
        settle(self, "include", "exclude")

    @property
    def follows_loss(self) -> bool:
        """Whether the strength follows the loss."""
        return self.strength is None

    def parameters(self, model: Module) -> tuple[str, ...]:
        """Return the names of the parameters that pass the filters.

        Raises:
            WeightError: When there are none, or a pattern matches nothing.
        """
        return pressed_on(model, self.include, self.exclude)

    def start(self, weights: Tensors) -> dict[str, Tensor]:
        """Return the strength, zero; the last and the average error, of which there is none yet; and a running sum."""
        if not self.follows_loss:
            return {}
        none, zero = (torch.tensor(x, dtype=torch.float64) for x in (math.inf, 0.0))
        return {
            "strength": zero,
            "previous": none,
            "average": none.clone(),
            "sum": zero.clone(),
            "count": zero.clone(),
        }

    def _strength(self, state: Tensors) -> float:
        return float(state["strength"]) if self.strength is None else self.strength

    def value(self, weights: Tensors, state: Tensors) -> Tensor:
        """Return the penalty."""
        squares = [(w / self.scale).square() for w in weights.values()]
        return self._strength(state) * torch.stack([(q / (1 + q)).sum() for q in squares]).sum()

    def gradient(self, weights: Tensors, state: Tensors) -> dict[str, Tensor]:
        """Return the gradient."""
        slope = self._strength(state) * 2 / self.scale
        return {n: slope * (w / self.scale) / (1 + (w / self.scale).square()).square() for n, w in weights.items()}

    def proximal(self, weights: Tensors, state: Tensors, rates: Tensors) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def advance(self, weights: Tensors, state: Tensors, step: int, loss: float | None) -> dict[str, Tensor]:
        """Return the state after a step, decided anew when enough losses are in.

        Raises:
            MissingStatsError: When the strength follows the loss, and nobody told it.
        """
        if not self.follows_loss:
            return {}
        if loss is None:
            raise MissingStatsError("weight_elimination: the strength follows the training loss, which nobody told it")
        now = {n: float(t) for n, t in state.items()}
        now["sum"], now["count"] = now["sum"] + loss, now["count"] + 1
        if now["count"] >= self.every:
            error = now["sum"] / now["count"]
            now = self._decided(now, error) | {"sum": 0.0, "count": 0.0}
        return {n: torch.tensor(now[n], dtype=t.dtype, device=t.device) for n, t in state.items()}

    def _decided(self, now: dict[str, float], error: float) -> dict[str, float]:
        if now["previous"] == math.inf:
            return now | {"previous": error, "average": error}
        average = self.memory * now["average"] + (1 - self.memory) * error
        strength = now["strength"]
        if error < self.wanted or error < now["previous"]:
            strength += self.delta
        elif error < average:
            strength = max(0.0, strength - self.delta)
        else:
            strength *= self.cut
        return now | {"strength": strength, "previous": error, "average": average}
