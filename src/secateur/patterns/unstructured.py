"""Single weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.select import keep_top_k
from secateur.types import Masks, Weight


@dataclass(frozen=True)
class Unstructured:
    """Every weight is a unit of its own.

    The finest pattern: the highest accuracy at a given size, and no speed on hardware that computes densely. Its
    zeros pay in a sparse runtime and in a compressed file.

    Example:
        >>> import torch
        >>> w = Weight("fc.weight", (1, 4))
        >>> Unstructured().select(w, torch.tensor([3.0, 1.0, 2.0, 0.5]), 2).tolist()
        [True, False, True, False]

    References:
        Song Han, Jeff Pool, John Tran, William J. Dally, Learning both Weights and Connections for Efficient Neural
        Networks, 2015.
    """

    @property
    def density(self) -> float | None:
        """Free: any number may stay."""
        return None

    def check(self, weight: Weight) -> None:
        """Accept every shape."""

    def reduce(self, weight: Weight, values: Tensor) -> Tensor:
        """Flatten."""
        return values.reshape(-1)

    def sizes(self, weight: Weight) -> int | Tensor:
        """One element per unit."""
        return 1

    def select(self, weight: Weight, scores: Tensor, keep: int) -> Tensor:
        """Keep the ``keep`` highest."""
        return keep_top_k(scores, keep)

    def expand(self, weight: Weight, kept: Tensor) -> Masks:
        """Give the flags the weight's shape."""
        return {weight.name: kept.reshape(weight.shape)}
