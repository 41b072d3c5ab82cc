"""GraNet: gradual pruning in which weights may come back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from secateur.errors import RecipeError, TargetError, check_number, check_whole
from secateur.schedules import Schedule, cubic
from secateur.training._swap import cosine, due_every, moved, swap
from secateur.types import Move, Turn

Unit = Literal["steps", "epochs"]


@dataclass(frozen=True)
class GraNet:
    r"""Prune gradually along the cubic schedule, and swap as RigL does after each step of it.

    .. math:: s(t) = s_f \Bigl(1 - \bigl(1 - \tfrac{t - t_0}{t_1 - t_0}\bigr)^3\Bigr), \qquad
        f_t = \frac{\alpha}{2} \Bigl(1 + \mathrm{cos} \frac{(t - t_0)\,\pi}{t_1 - t_0}\Bigr)

    First the method's score and allocation prune to :math:`s(t)`; pruned weights, being zero, are not ranked. Then
    :math:`\lfloor f_t n_l \rfloor` of each layer's :math:`n_l` survivors, the smallest, are exchanged for those with
    the largest gradients among all others, weights pruned earlier included. So they return by their gradient and never
    by their size: this is what sets it apart from a :class:`~secateur.pruner.Pruner` with the schedule ``cubic``, in
    which pruned stays pruned. New weights start at zero and without momentum.

    Pitfalls:
        It begins dense, so early training costs what dense training does. The gradient of a single batch decides what
        grows: small batches grow noise. Moves that end late leave too little training for what grew last.

    Args:
        end: :math:`t_1`, the time of the last move, which swaps nothing.
        begin: :math:`t_0`, the time of the first.
        every: Time between moves; must divide ``end - begin``.
        fraction: :math:`\alpha`.
        unit: What the times count.

    Raises:
        RecipeError: When a number is out of range.

    References:
        Shiwei Liu, Tianlong Chen, Xiaohan Chen, Zahra Atashgahi, Lu Yin, Huanyu Kou, Li Shen, Mykola Pechenizkiy,
        Zhangyang Wang, Decebal Constantin Mocanu, Sparse Training via Boosting Pruning Plasticity with
        Neuroregeneration, 2021.
    """

    end: int
    begin: int = 0
    every: int = 1
    fraction: float = 0.5
    unit: Unit = "epochs"

    def __post_init__(self) -> None:
        check_number("granet: fraction", self.fraction, most=1.0)
        check_whole("granet: end", self.end)
        check_whole("granet: every", self.every)
        check_whole("granet: begin", self.begin, least=0)
        try:
            _ = self.schedule
        except TargetError as error:
            raise RecipeError(f"granet: {error}") from None

    @property
    def schedule(self) -> Schedule:
        """The levels."""
        return cubic(begin=self.begin, end=self.end, every=self.every, unit=self.unit)

    @property
    def needs(self) -> frozenset[str]:
        """Units of each weight, and gradients."""
        return frozenset({"units", "gradients"})

    @property
    def sparse_start(self) -> bool:
        """No: it starts dense."""
        return False

    @property
    def last(self) -> int | None:
        """The end."""
        return self.end

    def due(self, time: int) -> bool:
        """At each interval."""
        return time <= self.end and due_every(self.every, time, begin=self.begin)

    def update(self, turn: Turn) -> Move:
        """Prune, then swap."""
        level = self.schedule.level((turn.time - self.begin) // self.every, turn.final)
        left = turn.reduce(turn.select(level))
        pruned = {name: replace(units, active=left[name]) for name, units in turn.units.items()}
        now = cosine(self.fraction, (turn.time - self.begin) / (self.end - self.begin))
        return moved(turn, swap(pruned, now, lambda name, units: units.gradients), level)
