"""Masks that stay where they are: the control of every other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from secateur.types import Move, Turn


@dataclass(frozen=True)
class Static:
    """Train under the masks of the start.

    What training finds beyond them is what moving masks can claim. With ``score=Random(seed)`` and ``erk`` it is the
    usual control; with a score it is pruning before training.

    Pitfalls:
        Initialisations are made for dense layers: under masks signals shrink with the density, and training starts
        slowly. Random masks of high sparsity may cut a small layer off.

    References:
        Decebal Constantin Mocanu, Elena Mocanu, Phuong H. Nguyen, Madeleine Gibescu, Antonio Liotta, A topological
        insight into restricted Boltzmann machines, 2016 (fixed random connectivity); Utku Evci, Trevor Gale, Jacob
        Menick, Pablo Samuel Castro, Erich Elsen, Rigging the Lottery: Making All Tickets Winners, 2020 (as control).
    """

    @property
    def unit(self) -> Literal["steps", "epochs"]:
        """No time matters."""
        return "steps"

    @property
    def needs(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    @property
    def sparse_start(self) -> bool:
        """Yes."""
        return True

    @property
    def last(self) -> int | None:
        """The start."""
        return 0

    def due(self, time: int) -> bool:
        """Never."""
        return False

    def update(self, turn: Turn) -> Move:
        """Stay."""
        return Move(turn.select(turn.final), turn.final)
