"""What every room speaks of: tensors and masks by parameter name, a weight and its layout, one pruning step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

Tensors = Mapping[str, Tensor]
"""Tensors keyed by the qualified name of the parameter they belong to."""


Masks = dict[str, Tensor]
"""Bool tensors of the parameters' shapes, keyed by qualified parameter name; ``True`` = keep."""


@dataclass(frozen=True)
class Weight:
    """A prunable parameter and the meaning of its dimensions.

    Attributes:
        name: Qualified name of the parameter, ``"layer1.0.conv1.weight"``.
        shape: Shape of the parameter.
        out_dim: Dimension that indexes output units.
        in_dim: Dimension that indexes input units; all others are kernel positions.
        groups: Groups of a grouped convolution.
        transposed: ``True`` where ``out_dim`` counts per group (transposed convolutions).
        bias: Name of the parameter with one entry per output unit that dies with it, if any.
        companions: Further parameters with one entry per output unit that die with it: scale and shift of its norm.
        kind: Class name of the owning module.
    """

    name: str
    shape: tuple[int, ...]
    out_dim: int = 0
    in_dim: int = 1
    groups: int = 1
    transposed: bool = False
    bias: str | None = None
    companions: tuple[str, ...] = ()
    kind: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def sizes(self) -> tuple[int, ...]:
        """Outputs, inputs of one group, kernel positions: the shape in one order for every layout."""
        kernel = (n for i, n in enumerate(self.shape) if i not in (self.out_dim, self.in_dim))
        return (self.shape[self.out_dim], self.shape[self.in_dim], *kernel)


@dataclass(frozen=True)
class Update:
    """One pruning step.

    Attributes:
        masks: The new masks.
        values: New values of weights that survive, where something makes up for those that go.
    """

    masks: Masks
    values: Tensors = field(default_factory=dict)
