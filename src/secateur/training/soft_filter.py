"""Soft filter pruning: zero the weakest, let them train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from secateur.errors import RecipeError, check_choice, check_whole
from secateur.training._swap import due_every
from secateur.types import Move, Turn

Unit = Literal["steps", "epochs"]


@dataclass(frozen=True)
class SoftFilter:
    """Set the weakest filters to zero after each epoch without masking them; mask at the end.

    Which they are is the method's business: in the paper a filter's L2 norm and one fraction of every layer,
    ``Method(target=target, pattern=Channel(reduce_by="l2"), allocate=Layerwise())``. In between nothing is masked, and
    a filter that the loss asks for grows back. The last time masks them for good, and ``secateur.shrink_`` with these
    masks cuts them out. Momentum stays, as in the paper.

    Until the end only the filter itself goes to zero. With its bias and its norm at zero too, a ReLU behind it would
    pass no gradient, and nothing could grow back; masks cover them.

    Pitfalls:
        Until the end nothing stays pruned: accuracies on the way are those of a dense network, and the last pruning is
        followed by no training unless there is retraining. Statistics of norms behind filters shift at each pruning.

    Args:
        end: Time of the last pruning, the end of training.
        every: Time between two prunings.
        unit: What the times count.

    Raises:
        RecipeError: When a number is below 1, or there is nothing before the end.

    References:
        Yang He, Guoliang Kang, Xuanyi Dong, Yanwei Fu, Yi Yang, Soft Filter Pruning for Accelerating Deep Convolutional
        Neural Networks, 2018.
    """

    end: int
    every: int = 1
    unit: Unit = "epochs"

    def __post_init__(self) -> None:
        check_choice("soft_filter: unit", self.unit, get_args(Unit))
        check_whole("soft_filter: end", self.end)
        check_whole("soft_filter: every", self.every)
        if self.every >= self.end:
            raise RecipeError(
                f"soft_filter: no interval of every={self.every} ends before end={self.end}, so nothing could grow "
                "back; to prune once, use a Pruner"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Units of each weight."""
        return frozenset({"units"})

    @property
    def sparse_start(self) -> bool:
        """No."""
        return False

    @property
    def last(self) -> int | None:
        """The end."""
        return self.end

    def due(self, time: int) -> bool:
        """After each interval, and at the end."""
        return time == self.end or (time < self.end and due_every(self.every, time))

    def update(self, turn: Turn) -> Move:
        """Zero, or mask."""
        masks = turn.select(turn.final)
        if turn.time == self.end:
            return Move(masks, turn.final)
        return Move({}, 0.0, zero={name: ~masks[name] for name in turn.units})
