"""Sparse evolutionary training: drop the smallest, grow at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from secateur.errors import RecipeError, check_choice, check_number, check_whole
from secateur.training._swap import due_every, moved, noise, swap
from secateur.types import Move, Turn

Unit = Literal["steps", "epochs"]


@dataclass(frozen=True)
class SET:
    r"""Drop the smallest weights of every layer at each interval, and grow as many at random.

    .. math:: k_l = \lfloor \zeta\, n_l \rfloor

    Of a layer's :math:`n_l` active units the :math:`k_l` with the smallest :math:`|w|` go, and :math:`k_l` of all
    others, drawn at random, come; :math:`\zeta` is ``fraction``. Each layer keeps its number of weights. New ones
    start at zero and without momentum; one that has just been dropped may be drawn, and then stays as it was. It needs
    no gradients of masked weights. The paper starts from a random mask with Erdős–Rényi densities:
    ``Method(score=Random(seed), allocate=ErdosRenyi())``.

    The paper drops the smallest positive and the largest negative weights, :math:`\zeta` of each sign; here signs do
    not matter.

    Pitfalls:
        Growth at random finds useful weights slowly in large layers. Left without an ``end``, masks move until training
        does, and what grew last has hardly been trained.

    Args:
        seed: Seed of what grows. It depends on the seed, the time and the layer's name alone.
        fraction: :math:`\zeta`.
        every: Time between moves.
        end: Time after which nothing moves, or nothing: it moves until training ends.
        unit: What the times count.

    Raises:
        RecipeError: When a number is out of range, or no interval ends in time.

    References:
        Decebal Constantin Mocanu, Elena Mocanu, Peter Stone, Phuong H. Nguyen, Madeleine Gibescu, Antonio Liotta,
        Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity inspired by Network Science,
        2018.
    """

    seed: int
    fraction: float = 0.3
    every: int = 1
    end: int | None = None
    unit: Unit = "epochs"

    def __post_init__(self) -> None:
        check_choice("set: unit", self.unit, get_args(Unit))
        check_number("set: fraction", self.fraction, most=1.0)
        check_whole("set: seed", self.seed, least=0)
        check_whole("set: every", self.every)
        if self.end is not None:
            check_whole("set: end", self.end)
            if self.end < self.every:
                raise RecipeError(f"set: no interval of every={self.every} ends by end={self.end}: nothing would move")

    @property
    def needs(self) -> frozenset[str]:
        """Units of each weight."""
        return frozenset({"units"})

    @property
    def sparse_start(self) -> bool:
        """Yes."""
        return True

    @property
    def last(self) -> int | None:
        """The last multiple of ``every``, if there is an end."""
        return None if self.end is None else self.end // self.every * self.every

    def due(self, time: int) -> bool:
        """At each multiple of ``every``."""
        return (self.end is None or time <= self.end) and due_every(self.every, time)

    def update(self, turn: Turn) -> Move:
        """Swap."""
        active = swap(turn.units, self.fraction, noise(self.seed, turn.time))
        return moved(turn, active, turn.final)
