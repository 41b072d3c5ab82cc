"""Sizes of a pruned model as polynomials: which products of dimension sizes add up to it, found out once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from secateur.graph.axes import Axes, Labels, Part

Factors = Sequence[tuple[Axes, int]]
"""Dimensions, each given by (axes, dim), whose sizes are multiplied."""


class Total:
    r"""A sum of products of dimension sizes, as a function of which labels stay.

    With :math:`n_d` the size of dimension :math:`d` after pruning, the sum is collected to one coefficient per set of
    dimensions that can shrink:

    .. math:: \sum_i \prod_{d \in P_i} n_d = \sum_S c_S \prod_{d \in S} n_d

    Every size is then counted once, however many operators have the dimension.

    Args:
        products: The products.

    Example:
        >>> from secateur.graph.labels import Ledger
        >>> ledger = Ledger()
        >>> weight = ledger.leaf((4, 3))
        >>> total = Total([[(weight, 0), (weight, 1)], [(weight, 0)]])
        >>> alive = np.ones(ledger.count, dtype=bool)
        >>> alive[weight.parts[0].labels[:2]] = False
        >>> total(alive)
        8
    """

    def __init__(self, products: Iterable[Factors]) -> None:
        self._places: dict[tuple[int, int], int] = {}
        self._plain: list[Labels] = []
        self._joint: list[tuple[Part, int]] = []
        self._terms: Counter[tuple[tuple[bool, int], ...]] = Counter()
        for factors in products:
            coefficient, variables = 1, []
            for axes, dim in factors:
                part = axes.part(dim)
                if part is None or not part.labels.size:
                    coefficient *= axes.shape[dim]
                else:
                    variables.append(self._variable(part, dim))
            self._terms[tuple(sorted(variables))] += coefficient
        self._flat = np.concatenate(self._plain) if self._plain else np.zeros(0, dtype=np.int64)
        self._starts = np.cumsum([0, *(labels.size for labels in self._plain)])[:-1]

    def _variable(self, part: Part, dim: int) -> tuple[bool, int]:
        """Return the number of a dimension: of those with labels of their own, or of those that share them."""
        joint = len(part.dims) > 1
        axis = part.dims.index(dim)
        key = id(part.labels), axis  # kept alive below
        if key not in self._places:
            self._places[key] = len(self._joint) if joint else len(self._plain)
            if joint:
                self._joint.append((part, axis))
            else:
                self._plain.append(part.labels)
        return joint, self._places[key]

    def __call__(self, alive: NDArray[np.bool_]) -> int:
        """Return the sum.

        Args:
            alive: Per label, whether it stays.
        """
        plain = np.add.reduceat(alive[self._flat], self._starts, dtype=np.int64).tolist() if self._plain else []
        joint = [size_along(part, axis, alive) for part, axis in self._joint]
        return sum(
            coefficient * math.prod((joint if shared else plain)[place] for shared, place in variables)
            for variables, coefficient in self._terms.items()
        )


def size_along(part: Part, axis: int, alive: NDArray[np.bool_]) -> int:
    """Return how many indices stay along one of the dimensions that a part spans."""
    kept = alive[part.labels]
    other = tuple(i for i in range(kept.ndim) if i != axis)
    return int((kept.any(axis=other) if other else kept).sum())
