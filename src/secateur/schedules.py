"""When to prune, and how fast: a list of moments, each with the sparsity that must hold after it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from secateur.errors import TargetError, check_choice, check_number, check_whole
from secateur.registry import Registry

Unit = Literal["steps", "epochs", "rounds"]


def _cubic(u: float, start: float, end: float) -> float:
    return end + (start - end) * (1.0 - u) ** 3


def _linear(u: float, start: float, end: float) -> float:
    return start + (end - start) * u


def _exponential(u: float, start: float, end: float) -> float:
    if end >= 1.0:
        return start if u < 1.0 else end
    return 1.0 - math.pow(1.0 - start, 1.0 - u) * math.pow(1.0 - end, u)


_CURVES: dict[str, Callable[[float, float, float], float]] = {
    "cubic": _cubic,
    "linear": _linear,
    "exponential": _exponential,
}


@dataclass(frozen=True)
class Schedule:
    """Updates 0..n-1, at ``begin + i·every`` on the schedule's clock.

    The clock counts optimizer steps, epochs, or rounds of (prune, retrain); whether it starts with training or after
    it is the recipe's ``when``. Build one with :func:`one_shot`, :func:`iterative`, :func:`linear`,
    :func:`exponential` or :func:`cubic`.

    Attributes:
        curve: ``"cubic"``, ``"linear"`` or ``"exponential"``.
        updates: Number of updates, at least 1.
        begin: Time of the first update.
        every: Time between updates.
        unit: What the clock counts.
        initial: Sparsity at the first update (the curve then runs from 0 to 1), or ``None``: the first update
            already takes one step along the curve, from sparsity 0.

    Raises:
        TargetError: When a number is out of range; names the field.
    """

    curve: str
    updates: int
    begin: float = 0
    every: float = 1
    unit: Unit = "steps"
    initial: float | None = None

    def __post_init__(self) -> None:
        check_choice("schedule: curve", self.curve, _CURVES)
        check_choice("schedule: unit", self.unit, get_args(Unit))
        check_whole("schedule: the number of updates", self.updates, error=TargetError)
        check_number("schedule: begin", self.begin, error=TargetError)
        if self.updates > 1:
            check_number("schedule: every", self.every, above=True, error=TargetError)
        if self.initial is not None:
            check_number("schedule: the initial sparsity", self.initial, most=1.0, below=True, error=TargetError)

    def level(self, update: int, final: float) -> float:
        """Sparsity that holds after update number ``update``.

        Args:
            update: 0..updates-1.
            final: Sparsity after the last update.

        Returns:
            A sparsity between ``initial`` (or 0) and ``final``; never more than ``final``.
        """
        if update >= self.updates - 1:
            return final
        if self.initial is None:
            u, start = (update + 1) / self.updates, 0.0
        else:
            u, start = update / (self.updates - 1), min(self.initial, final)
        # Rounding may carry a curve past its own end by one unit in the last place.
        return min(max(_CURVES[self.curve](u, start, final), start), final)

    def time(self, update: int) -> float:
        """Time of update number ``update``, in the schedule's unit."""
        return self.begin + update * self.every

    def step(self, update: int, steps_per_epoch: int | None) -> int:
        """Optimizer step at which update number ``update`` is due (0 = before the first step).

        Raises:
            TargetError: When epochs must be converted, and ``steps_per_epoch`` is not known or no count.
        """
        if self.unit == "rounds":
            raise TargetError("a schedule in rounds has no step: it prunes between rounds of retraining")
        if self.unit == "epochs":
            if steps_per_epoch is None:
                raise TargetError("the schedule counts epochs: pass steps_per_epoch, or use unit='steps'")
            check_whole("steps_per_epoch", steps_per_epoch, error=TargetError)
            return round(self.time(update) * steps_per_epoch)
        return round(self.time(update))


def one_shot(*, at: float = 0, unit: Unit = "rounds") -> Schedule:
    r"""Everything at once.

    .. math:: s(t) = s_f \ [t \ge t_0]

    with :math:`s_f` the target's sparsity.

    Args:
        at: Time of the one update.
        unit: ``"steps"``, ``"epochs"`` or ``"rounds"``.

    Returns:
        The schedule.

    Example:
        >>> one_shot().level(0, 0.9)
        0.9
    """
    return Schedule("linear", 1, at, 1, unit)


def iterative(*, rounds: int, begin: float = 0, every: float = 1, unit: Unit = "rounds") -> Schedule:
    r"""Remove the same fraction of the survivors in each round.

    .. math:: s_i = 1 - (1 - s_f)^{i / n}, \qquad i = 1 \dots n

    with :math:`s_f` the target's sparsity.

    Args:
        rounds: :math:`n`.
        begin: Time of the first round.
        every: Time between rounds.
        unit: What the clock counts.

    Returns:
        The schedule.

    Example:
        >>> s = iterative(rounds=2)
        >>> [round(s.level(i, 0.75), 4) for i in range(2)]
        [0.5, 0.75]

    References:
        Song Han, Jeff Pool, John Tran, William J. Dally, Learning both Weights and Connections for Efficient Neural
        Networks, 2015; Jonathan Frankle, Michael Carbin, The Lottery Ticket Hypothesis, 2019 (the geometric form).
    """
    return Schedule("exponential", rounds, begin, every, unit)


def linear(*, begin: float, end: float, every: float = 1, unit: Unit = "steps", initial: float = 0.0) -> Schedule:
    r"""Equal steps of sparsity.

    .. math:: s(t) = s_0 + (s_f - s_0)\,\frac{t - t_0}{t_1 - t_0}

    Args:
        begin: :math:`t_0`.
        end: :math:`t_1`, the time of the last update.
        every: Time between updates; must divide ``end - begin``.
        unit: What the clock counts.
        initial: :math:`s_0`.

    Returns:
        The schedule.

    Example:
        >>> s = linear(begin=0, end=4)
        >>> [s.level(i, 0.8) for i in range(5)]
        [0.0, 0.2, 0.4, 0.6000000000000001, 0.8]
    """
    return _spanning("linear", begin, end, every, unit, initial)


def exponential(*, begin: float, end: float, every: float = 1, unit: Unit = "steps", initial: float = 0.0) -> Schedule:
    r"""Equal factors of density.

    .. math:: 1 - s(t) = (1 - s_0)^{1-u} (1 - s_f)^u, \qquad u = \frac{t - t_0}{t_1 - t_0}

    Args:
        begin: :math:`t_0`.
        end: :math:`t_1`, the time of the last update.
        every: Time between updates; must divide ``end - begin``.
        unit: What the clock counts.
        initial: :math:`s_0`.

    Returns:
        The schedule.

    Example:
        >>> s = exponential(begin=0, end=2)
        >>> [round(s.level(i, 0.75), 4) for i in range(3)]
        [0.0, 0.5, 0.75]

    References:
        Hidenori Tanaka, Daniel Kunin, Daniel Yamins, Surya Ganguli, Pruning neural networks without any data by
        iteratively conserving synaptic flow, 2020.
    """
    return _spanning("exponential", begin, end, every, unit, initial)


def cubic(*, begin: float, end: float, every: float = 1, unit: Unit = "steps", initial: float = 0.0) -> Schedule:
    r"""Gradual pruning: fast while the network is redundant, then slower and slower.

    .. math:: s(t) = s_f + (s_0 - s_f)\,\Bigl(1 - \frac{t - t_0}{n\,\Delta t}\Bigr)^3,
        \qquad t \in \{t_0, t_0 + \Delta t, \dots, t_0 + n\,\Delta t\}

    with :math:`\Delta t` = ``every`` and :math:`n` = (end - begin) / every. The last update is at ``end`` itself;
    libraries differ here by one. Half-way the sparsity is 7/8 of the final one (from :math:`s_0` = 0). Pruned weights
    stay pruned: masks are ranked with them at the bottom.

    Args:
        begin: :math:`t_0`.
        end: Time of the last update.
        every: Time between updates; must divide ``end - begin``.
        unit: What the clock counts.
        initial: :math:`s_0`.

    Returns:
        The schedule.

    Example:
        >>> s = cubic(begin=0, end=2)
        >>> [s.level(i, 0.8) for i in range(3)]
        [0.0, 0.7000000000000001, 0.8]

    References:
        Michael Zhu, Suyog Gupta, To prune, or not to prune: exploring the efficacy of pruning for model compression,
        2017.
    """
    return _spanning("cubic", begin, end, every, unit, initial)


def _spanning(curve: str, begin: float, end: float, every: float, unit: Unit, initial: float) -> Schedule:
    check_number("schedule: begin", begin, error=TargetError)
    check_number("schedule: end", end, error=TargetError)
    check_number("schedule: every", every, above=True, error=TargetError)
    if not end > begin:
        raise TargetError(f"schedule: end must be after begin, got begin={begin}, end={end}")
    intervals = (end - begin) / every
    if abs(intervals - round(intervals)) > 1e-9 * intervals or round(intervals) < 1:
        raise TargetError(
            f"schedule: every={every} does not divide end - begin = {end - begin}, so no update would fall on end"
        )
    return Schedule(curve, round(intervals) + 1, begin, every, unit, initial)


SCHEDULES = Registry(
    "schedule",
    {"one_shot": one_shot, "iterative": iterative, "linear": linear, "exponential": exponential, "cubic": cubic},
)
