"""RigL: drop the smallest, grow where the gradient is largest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from secateur.errors import RecipeError, check_choice, check_number, check_whole
from secateur.training._swap import cosine, due_every, moved, swap
from secateur.types import Move, Turn

Unit = Literal["steps", "epochs"]


@dataclass(frozen=True)
class RigL:
    r"""Drop the smallest weights of every layer now and then, and grow those with the largest gradients.

    .. math:: f_t = \frac{\alpha}{2} \Bigl(1 + \mathrm{cos} \frac{(t - t_0)\,\pi}{T - t_0}\Bigr), \qquad
        k_l = \lfloor f_t\, n_l \rfloor

    At times :math:`t_0 + i\,\Delta t < T` the :math:`k_l` smallest :math:`|w|` of a layer's :math:`n_l` active weights
    go, and the :math:`k_l` largest :math:`|\partial L / \partial w|` among all others come: those just dropped
    included, which then have never left. New weights start at zero and without momentum. Each layer keeps its number
    of weights. Ties go to the higher index; the authors' code adds a little noise. With :math:`t_0` = 0 the first move
    is at :math:`\Delta t`, and a later :math:`t_0` shifts the cosine along.

    Gradients are dense in this library, because masks act after the optimizer's step: at a move the ``.grad`` of the
    batch is read. In the paper a move takes the place of the optimizer's step; see
    :class:`~secateur.training.SparseTraining`. The paper starts from a random mask: ``Method(score=Random(seed),
    allocate=ErdosRenyiKernel())``. It takes :math:`\Delta t` = 100, :math:`\alpha` = 0.3 and :math:`T` = three quarters
    of the training.

    Pitfalls:
        Adam counts steps per tensor: new weights start with empty moments at full step count, so their first step is
        :math:`(1-\beta_1)/\sqrt{1-\beta_2}` learning rates long (3.2 with its defaults), and the next are longer. The
        gradient of a single batch decides what grows: small batches grow noise. With ``erk``, the usual start, a
        network has more multiply-accumulates than a uniform one of the same sparsity: compare both figures.

    Args:
        end: :math:`T`.
        every: :math:`\Delta t`.
        fraction: :math:`\alpha`.
        begin: :math:`t_0`.
        unit: What the times count.

    Raises:
        RecipeError: When a number is out of range, or no move falls before the end.

    Example:
        >>> rigl = RigL(end=1000)
        >>> [round(rigl.fraction_at(t), 3) for t in (0, 500, 1000)]
        [0.3, 0.15, 0.0]

    References:
        Utku Evci, Trevor Gale, Jacob Menick, Pablo Samuel Castro, Erich Elsen, Rigging the Lottery: Making All Tickets
        Winners, 2020.
    """

    end: int
    every: int = 100
    fraction: float = 0.3
    begin: int = 0
    unit: Unit = "steps"

    def __post_init__(self) -> None:
        check_choice("rigl: unit", self.unit, get_args(Unit))
        check_number("rigl: fraction", self.fraction, most=1.0)
        check_whole("rigl: end", self.end)
        check_whole("rigl: every", self.every)
        check_whole("rigl: begin", self.begin, least=0)
        if (self.begin or self.every) >= self.end:
            raise RecipeError(
                f"rigl: with begin={self.begin} and every={self.every} no move falls before end={self.end}: nothing "
                "would ever grow"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Units of each weight, and gradients."""
        return frozenset({"units", "gradients"})

    @property
    def sparse_start(self) -> bool:
        """Yes."""
        return True

    @property
    def last(self) -> int | None:
        """The last time before the end."""
        return self.begin + (self.end - 1 - self.begin) // self.every * self.every

    def due(self, time: int) -> bool:
        """At each interval before the end."""
        return time < self.end and due_every(self.every, time, begin=self.begin)

    def fraction_at(self, time: int) -> float:
        """Return the fraction that is swapped at a time."""
        return cosine(self.fraction, (time - self.begin) / (self.end - self.begin))

    def update(self, turn: Turn) -> Move:
        """Swap."""
        active = swap(turn.units, self.fraction_at(turn.time), lambda name, units: units.gradients)
        return moved(turn, active, turn.final)
