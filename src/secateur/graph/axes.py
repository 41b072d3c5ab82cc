"""The labels of one tensor: which label every index of every dimension carries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


FIXED = 0
"""The label of an index that can never be removed."""


class Part:
    """Labels over one or more dimensions of a tensor.

    Attributes:
        dims: The dimensions, ascending.
        labels: One label per joint index; shape = the sizes of ``dims``.
    """

    __slots__ = ("dims", "labels")

    def __init__(self, dims: Sequence[int], labels: Labels) -> None:
        self.dims = tuple(dims)
        self.labels = labels

    def moved(self, offset: int) -> Part:
        """Return the same labels, ``offset`` dimensions further right."""
        return self if offset == 0 else Part([d + offset for d in self.dims], self.labels)


class Axes:
    """The labels of one tensor. A dimension that is in no part is fixed; so is one of size 1.

    Attributes:
        shape: Sizes of all dimensions.
        parts: Disjoint parts.
        known: Whether the shape after pruning follows from the parts; not so for by-products such as statistics.
        owed: Labels to fix as soon as the values are used: those of a dimension that one index was taken from.
        numbers: Where the elements are positions along a dimension (the experts that a router chose), its labels.
    """

    __slots__ = ("known", "numbers", "owed", "parts", "shape")

    def __init__(self, shape: Iterable[int], parts: Iterable[Part] = (), *, known: bool = True) -> None:
        self.shape = tuple(int(s) for s in shape)
        self.parts = [p for p in parts if p.dims]
        self.known = known
        self.owed: list[tuple[Labels, str]] = []
        self.numbers: Labels | None = None

    def part(self, dim: int) -> Part | None:
        """Return the part that holds a dimension; ``None`` where it is fixed."""
        for part in self.parts:
            if dim in part.dims:
                return part
        return None

    def labels(self, dim: int) -> Labels | None:
        """Return the labels of a dimension that no other dimension shares a part with."""
        part = self.part(dim)
        return part.labels if part is not None and len(part.dims) == 1 else None
