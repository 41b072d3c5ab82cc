"""How much to keep where: units with scores and prices, and the budget they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

Edge = Literal["", "first", "last"]
"""Whether a layer is the first convolution or the last layer of its network."""


@dataclass(frozen=True)
class Units:
    """One weight's units, scored and priced, as the allocation sees them.

    Attributes:
        scores: One score per unit, 1-D, float32 or float64; ``-inf`` marks a unit already pruned.
        cost: Cost of one unit, in the budget's currency: the same for all, or one per unit.
        floor: Fewest units that must stay.
        kind: The same word for sets of units of one structure (the attention heads of all blocks), for allocations
            that compare only like with like.
        shape: The weight's dimensions: outputs, inputs (of one group), kernel positions; empty for units of several
            tensors, which have none in common.
        edge: ``"first"`` for the network's first convolution and ``"last"`` for its last layer, where that is known.
    """

    scores: Tensor
    cost: float | Tensor
    floor: int = 1
    kind: str = ""
    shape: tuple[int, ...] = ()
    edge: Edge = ""


@dataclass(frozen=True)
class Budget:
    """What may stay.

    Attributes:
        kept: Total cost that may stay over all prunable weights.
        total: Total cost of the prunable weights when dense.
        cost: Cost of one element of each weight (1 for parameters, output positions for MACs).
        currency: ``"weights"`` or ``"macs"``.
    """

    kept: float
    total: float
    cost: Mapping[str, float]
    currency: str = "weights"


@runtime_checkable
class Allocation(Protocol):
    """How much to keep where."""

    def __call__(self, units: Mapping[str, Units], kept: float) -> dict[str, int]:
        """Return the number of units that stay in each weight, at a total cost of at most ``kept``."""
        ...


@runtime_checkable
class FlooredAllocation(Allocation, Protocol):
    """An allocation that never takes all of some layers, so that targets out of its reach are refused early."""

    def floor(self, units: int, edge: Edge) -> int:
        """Return the fewest of a layer's units that stay, by the layer's place in the network."""
        ...
