"""Which weights matter, and which coupled units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Generator, Tensor

from secateur.types.stats import Need, Stats
from secateur.types.values import Tensors


@runtime_checkable
class Score(Protocol):
    """Importance of every element of every weight: higher means keep. A pure function."""

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics that must be collected first."""
        ...

    def __call__(self, weights: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return one float score per element, of each weight's shape."""
        ...


@dataclass(frozen=True)
class MemberView:
    """What a group of coupled units owns of one tensor.

    Attributes:
        name: Qualified name of the tensor.
        role: ``"out"`` (rows that make the units), ``"in"`` (columns that read them), ``"norm"`` (scale of a
            normalisation), ``"bias"`` or ``"other"``.
        values: Shape (units, elements per unit).
    """

    name: str
    role: str
    values: Tensor


@dataclass(frozen=True)
class GroupView:
    """A group of coupled units, as a score sees it.

    Attributes:
        name: Name of the group.
        units: How many there are.
        members: What they own, tensor by tensor.
    """

    name: str
    units: int
    members: tuple[MemberView, ...]

    def of(self, *roles: str) -> tuple[MemberView, ...]:
        """Return the members of some roles."""
        return tuple(m for m in self.members if m.role in roles)


@runtime_checkable
class GroupScore(Protocol):
    """Importance of every unit of a coupled group: higher means keep. A pure function."""

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics that must be collected first."""
        ...

    def units(self, group: GroupView, stats: Stats) -> Tensor | None:
        """Return one float score per unit, or ``None`` where the score says nothing about such a group."""
        ...


@runtime_checkable
class OutputScore(GroupScore, Protocol):
    """A group score without labels: it says itself in which directions a change of the outputs matters."""

    @property
    def seed(self) -> int:
        """Seed of the directions."""
        ...

    def directions(self, outputs: Tensor, generator: Generator) -> Tensor:
        """Return one random direction per sample, of the outputs' shape."""
        ...
