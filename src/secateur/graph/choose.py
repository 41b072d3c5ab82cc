"""Which units go: by score, in aligned steps, until the real count of the pruned model meets the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.errors import TargetError
from secateur.graph.components import join
from secateur.graph.coupling import Coupling
from secateur.graph.groups import Group
from secateur.types import Allocation, Units

Removed = NDArray[np.bool_]
"""One flag per unit of a coupling: whether it goes."""

Measure = Callable[[NDArray[np.bool_]], float]
"""A size of the pruned model, given which labels stay: never larger when more units go."""


@dataclass(frozen=True)
class Bundle:
    """Groups that are decided together because some code multiplies their sizes; most groups are alone.

    Attributes:
        groups: The groups.
        steps: Units that one step takes from each of them.
    """

    groups: tuple[Group, ...]
    steps: tuple[int, ...]

    @property
    def parts(self) -> int:
        """How many steps there are; 1 where nothing can go."""
        return max(self.groups[0].units // self.steps[0], 1)


def bundles(
    coupling: Coupling, align: int, closed: frozenset[str] = frozenset(), *, uniform: bool = False
) -> list[Bundle]:
    """Return what can be decided, with the step of each decision.

    Linked groups (heads × head size = width) shrink by common fractions. They give up the alignment rather than
    staying whole.

    Args:
        coupling: The groups.
        align: Channel counts stay multiples of it.
        closed: Names of groups that must stay whole; so do those decided together with them.
        uniform: Decide all groups of one size together, so that dimensions that were equal stay equal.
    """
    sets = [set(members) for members in coupling.linked]
    if uniform:
        sizes: dict[int, set[int]] = {}
        for i, group in enumerate(coupling.groups):
            sizes.setdefault(group.size, set()).add(i)
        for alike in sizes.values():
            join(sets, alike)
    sets += [{i} for i in range(len(coupling.groups)) if not any(i in s for s in sets)]
    out = []
    for members in sets:
        groups = tuple(coupling.groups[i] for i in sorted(members))
        if any(g.name in closed for g in groups):
            continue
        if len(groups) == 1:
            out.append(Bundle(groups, (groups[0].step(align),)))
            continue
        parts = _common_parts(groups, align)
        if parts == 1:
            parts = _common_parts(groups, 1)
        out.append(Bundle(groups, tuple(g.units // parts for g in groups)))
    return sorted(out, key=lambda bundle: int(bundle.groups[0].ids[0]))


def _common_parts(groups: Sequence[Group], align: int) -> int:
    """Return the largest number of equal parts that every group splits into, in whole aligned steps."""
    least = math.gcd(*(g.units for g in groups))
    fits = (p for p in range(least, 0, -1) if least % p == 0 and all(g.units // p % g.step(align) == 0 for g in groups))
    return next(fits, 1)


def choose(
    coupling: Coupling, scores: NDArray[np.float64], decisions: Sequence[Bundle], counts: Mapping[str, int]
) -> Removed:
    """Remove the lowest scores of every group, down to the aligned count nearest to the one allotted.

    Args:
        coupling: The groups.
        scores: One score per unit; ties lose the lowest index first.
        decisions: What may shrink, in which steps.
        counts: Units allotted to each group.
    """
    removed = np.zeros(coupling.units, dtype=bool)
    for bundle in decisions:
        if bundle.parts == 1:
            continue
        shares = [counts[g.name] / g.units for g in bundle.groups]
        share = shares[0] if len(shares) == 1 else float(np.mean(shares))
        for group, step in zip(bundle.groups, bundle.steps, strict=True):
            # Whole steps, the remainder of a count that is no multiple goes first.
            steps = max(1, math.floor(group.units * share / step + 0.5))
            keep = min(steps * step, group.units)
            if keep < group.units:
                order = np.argsort(scores[group.ids], kind="stable")
                removed[group.ids[order[: group.units - keep]]] = True
    return removed


def meet(
    coupling: Coupling,
    scores: NDArray[np.float64],
    decisions: Sequence[Bundle],
    allocation: Allocation,
    measure: Measure,
    goal: float,
    gone: Removed | None = None,
) -> Removed:
    """Remove as few units as bring a size of the pruned model down to a goal.

    The allocation shares out a number of units; that number is found by bisection on the real size of the model that
    results, alignment included.

    Args:
        coupling: The groups.
        scores: One score per unit.
        decisions: What may shrink.
        allocation: How many units stay where.
        measure: The size.
        goal: Largest size allowed.
        gone: Units that have gone before and stay so; their scores are ``-inf``.

    Raises:
        TargetError: When the goal is out of reach; gives the smallest size that is not.
    """
    open_groups = [g for b in decisions if b.parts > 1 for g in b.groups]
    kinds = isomorphisms(coupling)
    floors = {  # one step, and no fewer than a group's own floor
        g.name: step * -(-g.floor // step) for b in decisions for g, step in zip(b.groups, b.steps, strict=True)
    }
    units = {
        g.name: Units(torch.from_numpy(scores[g.ids]), 1.0, max(1, floors[g.name]), kinds[g.name]) for g in open_groups
    }
    total = sum(g.units for g in open_groups)

    def at(kept: int) -> Removed:
        before = np.zeros(coupling.units, dtype=bool) if gone is None else gone
        return before | choose(coupling, scores, decisions, allocation(units, kept)) if open_groups else before

    low = sum(u.floor for u in units.values())
    smallest = at(low)
    least = measure(coupling.alive(smallest))
    if least > goal:
        raise Unreachable(least)
    if measure(coupling.alive(at(total))) <= goal:
        return at(total)
    high = total
    best = smallest
    while high - low > 1:
        middle = (low + high) // 2
        removed = at(middle)
        if measure(coupling.alive(removed)) <= goal:
            low, best = middle, removed
        else:
            high = middle
    return best


class Unreachable(TargetError):
    """The smallest model that the groups allow is larger than the goal. Carries its size."""

    def __init__(self, least: float) -> None:
        super().__init__(f"the smallest size that the groups allow is {least:g}")
        self.least = least


def isomorphisms(coupling: Coupling) -> dict[str, str]:
    """Return, per group, a word that is the same for groups of one structure: units, and shapes of what they reach."""
    shapes = {leaf.name: leaf.axes.shape for leaf in coupling.trace.leaves}
    return {
        group.name: f"{group.units}:" + ",".join(sorted(f"{shapes[m.name]}@{m.dim}x{m.width}" for m in group.members))
        for group in coupling.groups
    }
