"""The same density in every layer."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from secateur.select import cost_of_best, live
from secateur.types import Units


@dataclass(frozen=True)
class Layerwise:
    r"""Give every layer the density of the whole, rounded to units.

    .. math:: k_l = \mathrm{round}(d\,n_l), \qquad \text{the largest } d \text{ with } \sum_l c_l(k_l) \le K

    where :math:`c_l(k)` is the cost of the layer's :math:`k` best units. Layers whose next unit falls due at the same
    :math:`d` get it in the order of their names, as long as the budget reaches; with unit costs the total is exactly
    :math:`K`. Each layer keeps at least its floor.

    Rounding by one common :math:`d` (Webster's method of apportionment) never gives a layer more units when the
    budget shrinks. Handing out the largest remainders can, and a schedule would then ask for units already pruned.

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
        return apportion(units, kept, dict.fromkeys(units, 1.0))


def apportion(units: Mapping[str, Units], kept: float, slowness: Mapping[str, float]) -> dict[str, int]:
    """Give every layer the density d^slowness of one common d, rounded to units: the largest d that the budget pays.

    Args:
        units: Scored and priced units per layer.
        kept: Total cost that may stay.
        slowness: Exponent per layer; positive, 1 for the common density itself.

    Returns:
        Units that stay, per layer.
    """
    names = sorted(units)  # sums of floats depend on their order, and the answer must not
    size = {name: units[name].scores.numel() for name in names}
    most = {name: live(units[name]) for name in names}
    least = {name: min(units[name].floor, most[name]) for name in names}
    price = {name: cost_of_best(units[name]) for name in names}

    sizes, fewest, largest = (np.array([table[n] for n in names]) for table in (size, least, most))
    prices, powers = list(price.values()), np.array([slowness[n] for n in names])

    def counts_at(density: float) -> list[int]:
        rounded = np.clip(np.floor(density**powers * sizes + 0.5), fewest, largest)
        return rounded.astype(np.int64).tolist()  # type: ignore[no-any-return]

    def cost(counts: Sequence[int]) -> float:
        return math.fsum(price_of(count) for price_of, count in zip(prices, counts, strict=True))

    slack = kept + 1e-9 * max(abs(kept), 1.0)
    low, high = 0.0, 1.0
    if cost(counts_at(high)) <= slack:
        low = high
    below, above = counts_at(low), counts_at(high)
    for _ in range(40):  # finer than the margin below
        if below == above:
            break  # every density in between says the same
        middle = (low + high) / 2
        between = counts_at(middle)
        if cost(between) <= slack:
            low, below = middle, between
        else:
            high, above = middle, between
    # A little less, so that no layer got in by a rounding error: what is left falls due at the very same density.
    found = counts_at(low * (1 - 1e-9))
    counts = dict(zip(names, found, strict=True))
    _hand_out(counts, slack - cost(found), units, price, slowness)
    return {name: counts[name] for name in units}


def _hand_out(
    counts: dict[str, int],
    left: float,
    units: Mapping[str, Units],
    price: Mapping[str, Callable[[int], float]],
    slowness: Mapping[str, float],
) -> None:
    """Give one unit more to each layer whose next one falls due at the same density, as long as the budget reaches."""
    size = {name: units[name].scores.numel() for name in counts}
    most = {name: live(units[name]) for name in counts}

    def falls_due(name: str) -> Fraction | float:
        share = Fraction(2 * counts[name] + 1, 2 * size[name])
        return share if slowness[name] == 1 else float(share) ** (1 / slowness[name])

    due = [(falls_due(n), n) for n in counts if counts[n] < most[n]]
    heapq.heapify(due)
    while due:
        _, name = heapq.heappop(due)
        more = price[name](counts[name] + 1) - price[name](counts[name])
        if more > left:
            break
        left -= more
        counts[name] += 1
        if counts[name] < most[name]:
            heapq.heappush(due, (falls_due(name), name))
