"""What is removed together."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from secateur.types.values import Masks, Weight


@runtime_checkable
class Pattern(Protocol):
    """What is removed together. Axis order and padding are the pattern's business alone."""

    @property
    def density(self) -> float | None:
        """The density this pattern always has, or ``None`` when it is free."""
        ...

    def check(self, weight: Weight) -> None:
        """Raise :class:`~secateur.errors.PatternError` where the pattern cannot be laid over the weight."""
        ...

    def reduce(self, weight: Weight, values: Tensor) -> Tensor:
        """Turn element scores into unit scores, 1-D."""
        ...

    def sizes(self, weight: Weight) -> int | Tensor:
        """Elements per unit: one number, or one per unit where they differ."""
        ...

    def select(self, weight: Weight, scores: Tensor, keep: int) -> Tensor:
        """Choose exactly ``keep`` units; ties lose the lowest index first."""
        ...

    def expand(self, weight: Weight, kept: Tensor) -> Masks:
        """Turn kept units into element masks, of the weight and of what dies with its units."""
        ...


@runtime_checkable
class UnitPattern(Protocol):
    """Units that no mask over one weight can express: they can only be cut out, with everything that is theirs."""

    @property
    def unit(self) -> Literal["expert", "layer"]:
        """What a unit is."""
        ...
