"""The laws of allocations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.testing._common import random_tensor, require
from secateur.testing.oracles import select_k
from secateur.types import Allocation, Edge, FlooredAllocation, Units


def check_allocation(allocation: Allocation) -> None:
    """Check that an allocation stays within its budget, keeps the floors, and depends on the problem alone.

    With unit costs the whole budget must be used. Units already pruned (score ``-inf``) must not be counted as kept
    while the budget can be spent on live ones: pruned stays pruned, so the total would fall short.

    Args:
        allocation: The allocation.

    Raises:
        AssertionError: When a law is broken.
    """
    for label, units, unit_costs in _problems():
        floors = {name: min(_floor(allocation, u), u.scores.numel()) for name, u in units.items()}
        lowest = sum(_best_cost(u, floors[name]) for name, u in units.items())
        total = sum(float(_costs(u).sum()) for u in units.values())
        steps = range(int(lowest), int(total) + 1) if unit_costs else range(12)
        for step in steps:
            kept = float(step) if unit_costs else lowest + (total - lowest) * step / 11
            _check_counts(allocation, units, kept, f"{label}, {kept:g} of {total:g}", exact=unit_costs)


_EDGES: dict[str, Edge] = {"fc1": "first", "head": "last"}


def _floor(allocation: Allocation, units: Units) -> int:
    """Return the fewest units that stay: the layer's own floor, or the allocation's."""
    own = allocation.floor(units.scores.numel(), units.edge) if isinstance(allocation, FlooredAllocation) else 0
    return max(units.floor, own)


def _problems() -> list[tuple[str, dict[str, Units], bool]]:
    tied = {"b": torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]), "a": torch.tensor([1.0, 1.0, 0.0]), "c": torch.zeros(7)}
    free = {name: random_tensor((n,), n) for name, n in {"fc2": 6, "fc1": 6, "head": 2, "one": 1}.items()}
    signed = {"x": random_tensor((9,), 1) - 3.0, "y": random_tensor((4,), 2) * 100, "z": random_tensor((1,), 3)}
    pruned = {name: values.clone() for name, values in free.items()}
    for name, gone in {"fc1": 1, "fc2": 2, "head": 1}.items():
        pruned[name][pruned[name].argsort()[:gone]] = -torch.inf
    edge = torch.tensor([4, 4, 4, 1])
    return [
        ("ties", {n: Units(s, 1.0, 0) for n, s in tied.items()}, True),
        ("floors", {n: Units(s, 1, 1) for n, s in tied.items()}, True),
        ("small layers", {n: Units(s, 1.0, 1) for n, s in free.items()}, True),
        ("negative scores", {n: Units(s.double(), 1.0, 2) for n, s in signed.items()}, True),
        ("pruned units", {n: Units(s, 1.0, 1) for n, s in pruned.items()}, True),
        ("first and last", {n: Units(s, 1.0, 1, edge=_EDGES.get(n, "")) for n, s in free.items()}, True),
        ("one layer", {"w": Units(random_tensor((8,), 4), 1.0, 1)}, True),
        ("uneven costs", {n: Units(s, 3.0 + len(s), 1) for n, s in free.items()}, False),
        ("fractional costs", {n: Units(s, 0.1 * len(s), 0) for n, s in tied.items()}, False),
        ("smaller edge blocks", {n: Units(random_tensor((4,), i), edge * 1.0, 1) for i, n in enumerate("pq")}, False),
    ]


def _costs(units: Units) -> Tensor:
    if isinstance(units.cost, Tensor):
        return units.cost.double()
    return torch.full((units.scores.numel(),), float(units.cost), dtype=torch.float64)


def _best_cost(units: Units, count: int) -> float:
    """Cost of the ``count`` units that selection would keep."""
    keep = select_k({"": units.scores.tolist()}, count)[""]
    return float(_costs(units)[torch.tensor(keep)].sum())


def _check_counts(allocation: Allocation, units: Mapping[str, Units], kept: float, at: str, *, exact: bool) -> None:
    before = {name: u.scores.clone() for name, u in units.items()}
    counts = allocation(units, kept)
    require(set(counts) == set(units), allocation, f"{at}: counts for {sorted(counts)}")
    for name, u in units.items():
        n, floor = u.scores.numel(), min(_floor(allocation, u), u.scores.numel())
        require(floor <= counts[name] <= n, allocation, f"{at}: {name} keeps {counts[name]}, not in {floor}..{n}")
        require(torch.equal(u.scores, before[name]), allocation, f"{at}: changed the scores of {name}")
    spent = sum(_best_cost(u, counts[name]) for name, u in units.items())
    require(spent <= kept + 1e-9 * max(kept, 1.0), allocation, f"{at}: keeps {counts}, which costs {spent:g}")
    living = sum(_best_cost(u, int((~torch.isneginf(u.scores)).sum())) for u in units.values())
    if exact and kept <= living:
        require(spent == kept, allocation, f"{at}: keeps {counts}, {spent:g} in total; unit costs can meet it exactly")
    alive = {name: int((~torch.isneginf(u.scores)).sum()) for name, u in units.items()}
    if kept <= sum(_best_cost(u, alive[name]) for name, u in units.items()):
        revived = {name: (counts[name], alive[name]) for name in units if counts[name] > alive[name]}
        require(not revived, allocation, f"{at}: counts pruned units as kept (kept, alive): {revived}")
    turned = allocation(dict(reversed(list(units.items()))), kept)
    require(dict(turned) == dict(counts), allocation, f"{at}: another order of the dict gives {turned}, not {counts}")
