"""Units that must go together, and where they are in each tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Places:
    """Where the units of a group are in a dimension: shared by all tensors that have them in the same places.

    Attributes:
        size: Size of the dimension.
        indices: Indices that belong to the group's units, ascending.
        owners: The unit of each of them.
    """

    size: int
    indices: NDArray[np.int32]
    owners: NDArray[np.int32]

    @cached_property
    def width(self) -> int:
        """Most indices that one unit takes."""
        return int(np.bincount(self.owners).max()) if self.owners.size else 0

    @cached_property
    def by_unit(self) -> NDArray[np.int64]:
        """The indices, those of the first unit first."""
        return self.indices[np.argsort(self.owners, kind="stable")].astype(np.int64)


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor that a group reaches.

    Attributes:
        name: Qualified name of the parameter or buffer.
        dim: The dimension.
        places: Where the group's units are in it.
    """

    name: str
    dim: int
    places: Places

    @property
    def width(self) -> int:
        """Most indices that one unit takes."""
        return self.places.width

    @property
    def unit(self) -> NDArray[np.int64]:
        """For every index of the dimension, the group's unit that it belongs to, or -1."""
        out = np.full(self.places.size, -1)
        out[self.places.indices] = self.places.owners
        return out


Unit = Literal["channel", "expert"]


@dataclass(frozen=True)
class Group:
    """Units that are alike: removing one means removing its indices from every member.

    Attributes:
        name: The first module whose outputs the units are.
        units: How many there are.
        members: Every dimension of every tensor that shrinks with them.
        ids: Global number of each unit.
        floor: Fewest that must stay: as many experts as a router chooses at a time.
        owned: Modules that go with the units: for every list of modules, the entry of each unit.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    ids: NDArray[np.int64]
    floor: int = 1
    owned: tuple[tuple[str, ...], ...] = ()

    @property
    def size(self) -> int:
        """Indices that all units take where they are made."""
        made = [m for m in self.members if m.dim == 0] or self.members
        return self.units * max(m.width for m in made)

    def step(self, align: int) -> int:
        """Fewest units that may go at a time so that channel counts stay multiples of ``align``.

        Counted where the channels are made: the input side of a grouped convolution counts per group.
        """
        made = [m for m in self.members if m.dim == 0] or self.members
        made = [m for m in made if m.places.size > 2 * align] or made  # not where heads are mixed, say
        step = 1
        for member in made:
            step = math.lcm(step, align // math.gcd(align, max(member.width, 1)))
        return step


def places_by_group(
    unit: NDArray[np.int64], group_of: NDArray[np.int64], bounds: Sequence[int]
) -> Iterator[tuple[int, Places]]:
    """Yield the groups whose units are in a dimension, by position, and where these are.

    Args:
        unit: The unit of every index, or -1.
        group_of: The group of every unit, the last one for none.
        bounds: The first unit of every group.
    """
    owner = group_of[unit]
    order = np.argsort(owner, kind="stable")
    starts = np.flatnonzero(np.diff(owner[order], prepend=-2))
    for low, high in pairwise([*starts.tolist(), len(order)]):
        g, run = int(owner[order[low]]), order[low:high]
        if g >= 0:
            yield g, Places(len(unit), run.astype(np.int32), (unit[run] - bounds[g]).astype(np.int32))


def group_name(members: Iterable[Member], taken: set[str]) -> str:
    """Return a name after the module that makes a group's units, and add it to those that are taken."""
    ranked = sorted(members, key=lambda m: (m.dim != 0, not m.name.endswith("weight")))
    base = next((m.name.removesuffix(".weight") for m in ranked), "group")
    name, n = base, 2
    while name in taken:
        name, n = f"{base}#{n}", n + 1
    taken.add(name)
    return name
