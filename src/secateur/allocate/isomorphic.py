"""One ranking per kind of structure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from secateur.select import cost_of_best, global_counts
from secateur.types import Units


@dataclass(frozen=True)
class Isomorphic:
    """Rank like with like: attention heads with attention heads, hidden neurons with hidden neurons.

    Groups of the same structure (``Units.kind``) share one ranking, and every ranking keeps the same fraction. Scores
    of different structures need not be comparable, and within a structure depth decides freely.

    Cost:
        One ranking for each kind of structure: a few passes over the scores.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([9.0, 8.0]), torch.tensor([1.0, 7.0])
        >>> units = {"h1": Units(a, 1, kind="head"), "h2": Units(b, 1, kind="head"), "n": Units(a, 1, kind="mlp")}
        >>> Isomorphic()(units, 3)
        {'h1': 1, 'h2': 1, 'n': 1}

    References:
        Gongfan Fang, Xinyin Ma, Michael Bi Mi, Xinchao Wang, Isomorphic Pruning for Vision Models, 2024.
    """

    def __call__(self, units: Mapping[str, Units], kept: float) -> dict[str, int]:
        """Return the number of units that stay in each layer."""
        kinds = {u.kind: {n: v for n, v in units.items() if v.kind == u.kind} for u in units.values()}
        price = {kind: [cost_of_best(u) for u in members.values()] for kind, members in kinds.items()}
        whole, least = dict[str, float](), dict[str, float]()
        for kind, members in kinds.items():
            sizes = [u.scores.numel() for u in members.values()]
            floors = [min(u.floor, size) for u, size in zip(members.values(), sizes, strict=True)]
            whole[kind] = math.fsum(cost(n) for cost, n in zip(price[kind], sizes, strict=True))
            least[kind] = math.fsum(cost(n) for cost, n in zip(price[kind], floors, strict=True))
        # The common density, lowered where the floors of some kinds cost more than their share.
        low, high = 0.0, 1.0
        for _ in range(64):
            middle = (low + high) / 2
            cost = math.fsum(max(middle * whole[kind], least[kind]) for kind in kinds)
            low, high = (middle, high) if cost <= kept else (low, middle)
        out: dict[str, int] = {}
        left = kept
        for kind in sorted(kinds):
            share = max(high * whole[kind], least[kind]) + 1e-9 * max(whole[kind], 1.0)
            counts = global_counts(kinds[kind], min(share, left))
            left -= math.fsum(c(counts[n]) for c, n in zip(price[kind], kinds[kind], strict=True))
            out |= counts
        return {name: out[name] for name in units}
