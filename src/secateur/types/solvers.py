"""What the surviving weights become."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from secateur.types.stats import Need, Stats
from secateur.types.values import Tensors


@runtime_checkable
class Solver(Protocol):
    """What the surviving weights become when others go. A pure function."""

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics that must be collected first, of the network before this step's weights go."""
        ...

    def solve(self, weights: Tensors, masks: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return new values of the weights, of their shapes and types, zero where a mask is ``False``.

        Args:
            weights: The prunable weights before the step.
            masks: What stays of each, earlier steps included.
            stats: What it needs.
        """
        ...
