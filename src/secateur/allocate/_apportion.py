"""Whole units in given proportions, within a budget: what the allocations that ignore scores have in common."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np

from secateur.select import cost_of_best, live
from secateur.types import Units


def apportion(
    units: Mapping[str, Units],
    kept: float,
    claims: Mapping[str, Fraction],
    slowness: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Keep ``round(t**slowness * claim)`` units of every layer, at the largest ``t`` that the budget pays for.

    No layer gets more than it has left, or less than its floor; the others then share what that frees or costs.
    Rounding by one common ``t`` (Webster's method) never gives a layer more when the budget shrinks. Layers whose next
    unit falls due at the same ``t`` get it in the order of their names. Claims of zero come last.

    Args:
        units: Scored and priced units per name.
        kept: Total cost that may stay.
        claims: What each layer claims, in units, up to a common factor; exact, so that ties are ties.
        slowness: Positive exponents of ``t``; 1 by default.

    Returns:
        Units that stay, per name.
    """
    names = sorted(units)  # sums of floats depend on their order, and the answer must not
    most = {name: live(units[name]) for name in names}
    least = {name: min(units[name].floor, most[name]) for name in names}
    price = {name: cost_of_best(units[name]) for name in names}
    fewest, largest = (np.array([table[n] for n in names]) for table in (least, most))
    shares = np.array([float(claims[n]) for n in names])
    prices = list(price.values())
    slow = slowness or dict.fromkeys(names, 1.0)
    powers = np.array([slow[n] for n in names])

    def counts_at(factor: float) -> list[int]:
        rounded = np.clip(np.floor(factor**powers * shares + 0.5), fewest, largest)
        return rounded.astype(np.int64).tolist()  # type: ignore[no-any-return]

    def cost(counts: Sequence[int]) -> float:
        return math.fsum(price_of(count) for price_of, count in zip(prices, counts, strict=True))

    slack = kept + 1e-9 * max(abs(kept), 1.0)
    low = 0.0
    high = max((float(units[n].scores.numel() / claims[n]) ** (1 / slow[n]) for n in names if claims[n]), default=0.0)
    if cost(counts_at(high)) <= slack:
        low = high
    below, above = counts_at(low), counts_at(high)
    for _ in range(64):
        if below == above or high - low <= 1e-11 * high:
            break  # every factor in between says the same, or is nearer than the margin below
        middle = (low + high) / 2
        between = counts_at(middle)
        if cost(between) <= slack:
            low, below = middle, between
        else:
            high, above = middle, between
    # A little less, so that no layer got in by a rounding error: what is left falls due at the very same factor.
    counts = dict(zip(names, counts_at(low * (1 - 1e-9)), strict=True))
    due_of = {n: _due(claims[n] or units[n].scores.numel(), slow[n], last=not claims[n]) for n in names}
    _hand_out(counts, most, price, due_of, slack)
    return {name: counts[name] for name in units}


def _due(claim: Fraction | int, slowness: float, *, last: bool) -> Callable[[int], tuple[bool, Fraction | float]]:
    """Return at which ``t`` a layer's next unit falls due, by the number it has; exact where it can be."""

    def due(count: int) -> tuple[bool, Fraction | float]:
        share = Fraction(2 * count + 1) / (2 * claim)
        return last, share if slowness == 1 else float(share) ** (1 / slowness)

    return due


def _hand_out(
    counts: dict[str, int],
    most: Mapping[str, int],
    price: Mapping[str, Callable[[int], float]],
    due_of: Mapping[str, Callable[[int], tuple[bool, Fraction | float]]],
    slack: float,
) -> None:
    """Give one unit after the other to the layer at which it falls due, until the next one is too dear."""
    due = [(due_of[name](counts[name]), name) for name in counts if counts[name] < most[name]]
    heapq.heapify(due)
    spent = math.fsum(price[name](count) for name, count in counts.items())
    while due:
        _, name = heapq.heappop(due)
        more = price[name](counts[name] + 1) - price[name](counts[name])
        if spent + more > slack:
            break
        spent += more
        counts[name] += 1
        if counts[name] < most[name]:
            heapq.heappush(due, (due_of[name](counts[name]), name))
