"""The same density in every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from secateur.types import Units


@dataclass(frozen=True)
class Layerwise:
    r"""Give every layer the density of the whole, rounded so that the total is met.

    .. math:: k_l = \lfloor d\, n_l \rfloor \text{ or } \lceil d\, n_l \rceil, \qquad \sum_l c_l k_l \le K

    where :math:`d = K / \sum_l c_l n_l`. The layers with the largest fractions round up (ties by name), as far as the
    budget reaches; with unit costs the total is exactly :math:`K`. A layer under its floor is raised to it at the cost
    of the largest others.

    Example:
        >>> import torch
        >>> units = {"a": Units(torch.zeros(6), 1), "b": Units(torch.zeros(4), 1)}
        >>> Layerwise()(units, 5)
        {'a': 3, 'b': 2}

    References:
        Song Han, Jeff Pool, John Tran, William J. Dally, Learning both Weights and Connections for Efficient Neural
        Networks, 2015 (per-layer thresholds).
    """

    def __call__(self, units: Mapping[str, Units], kept: float) -> dict[str, int]:
        """Return the number of units that stay in each layer."""
        sizes = {name: u.scores.numel() for name, u in units.items()}
        costs = {name: _unit_cost(u) for name, u in units.items()}
        free = set(units)
        counts: dict[str, int] = {}
        density = 0.0
        # A layer whose share is under its floor is set to the floor, and the others share what remains; each pass
        # settles at least one layer, so this ends.
        while free:
            spare = kept - sum(counts[name] * costs[name] for name in counts)
            whole = sum(sizes[name] * costs[name] for name in free)
            density = min(max(spare / whole, 0.0), 1.0) if whole else 0.0
            low = {n for n in free if density * sizes[n] < min(units[n].floor, sizes[n])}
            if not low:
                break
            counts |= {name: min(units[name].floor, sizes[name]) for name in low}
            free -= low
        shares = {name: density * sizes[name] for name in free}
        # 0.29 * 100 is 28.999999999999996: the tolerance keeps such a share from losing its last unit.
        counts |= {name: math.floor(share + 1e-6) for name, share in shares.items()}
        spare = kept - sum(counts[name] * costs[name] for name in counts)
        for name in sorted(free, key=lambda n: (-(shares[n] - counts[n]), n)):
            if counts[name] < sizes[name] and costs[name] <= spare + 1e-9 * max(kept, 1.0):
                counts[name] += 1
                spare -= costs[name]
        return {name: counts[name] for name in units}


def _unit_cost(units: Units) -> float:
    if isinstance(units.cost, Tensor):
        return float(units.cost.double().mean()) if units.cost.numel() else 0.0
    return float(units.cost)
