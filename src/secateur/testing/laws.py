"""Laws that every part of an axis obeys, as functions that raise ``AssertionError`` with a readable message."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from secateur.errors import PatternError
from secateur.schedules import Schedule
from secateur.stats.inverse_fisher import InverseFisher
from secateur.testing.fisher import synthetic_fisher
from secateur.testing.oracles import select_k
from secateur.types import (
    Allocation,
    FlooredAllocation,
    GroupScore,
    GroupView,
    MemberView,
    Need,
    Pattern,
    Score,
    Stats,
    Tensors,
    Units,
    Weight,
)

MakeStats = Callable[[frozenset[Need], Tensors], Stats]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

LAYOUTS: Mapping[str, Weight] = {
    "linear": Weight("fc.weight", (6, 8), bias="fc.bias"),
    "linear of odd sizes": Weight("fc.weight", (5, 7)),
    "one unit": Weight("fc.weight", (1, 1), bias="fc.bias"),
    "one row": Weight("fc.weight", (1, 8)),
    "one column": Weight("fc.weight", (5, 1)),
    "conv1d": Weight("conv.weight", (5, 4, 3), bias="conv.bias"),
    "conv2d": Weight("conv.weight", (4, 8, 3, 2)),
    "conv3d": Weight("conv.weight", (3, 4, 2, 1, 2)),
    "grouped conv": Weight("conv.weight", (6, 4, 3, 3), groups=3, bias="conv.bias"),
    "depthwise conv": Weight("conv.weight", (6, 1, 3, 3), groups=6),
    "transposed conv": Weight("up.weight", (4, 5, 2, 3), 1, 0, transposed=True, bias="up.bias"),
    "grouped transposed conv": Weight("up.weight", (8, 3, 3), 1, 0, groups=2, transposed=True, bias="up.bias"),
    "input first": Weight("c_fc.weight", (4, 6), 1, 0),
}
"""Shapes that a pattern must either accept or refuse with ``PatternError``."""


def _require(holds: bool, part: object, law: str) -> None:
    if not holds:
        raise AssertionError(f"{part}: {law}")


def _random(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


# --- scores ----------------------------------------------------------------------------------------------------------


def synthetic_stats(needs: frozenset[Need], weights: Tensors) -> Stats:
    """Make up statistics of the weights' shapes, in float32 or better: signed for ``gradient``, else positive."""
    stats: dict[Need, Mapping[str, Tensor]] = {}
    for i, need in enumerate(sorted(needs, key=repr)):
        if isinstance(need, InverseFisher):
            stats[need] = synthetic_fisher(need, weights)
            continue
        values = {name: _random(w.shape, 100 * i + j) for j, (name, w) in enumerate(sorted(weights.items()))}
        values = {n: v.to(torch.promote_types(weights[n].dtype, torch.float32)) for n, v in values.items()}
        stats[need] = values if need == "gradient" else {name: v.abs() for name, v in values.items()}
    return stats


def check_score(
    score: Score,
    *,
    equivariant: bool = True,
    make_stats: MakeStats = synthetic_stats,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    """Check the laws of scores: total, wide, finite, deterministic, pure, and blind to the order of the dict.

    Args:
        score: The score.
        equivariant: Whether each element's score depends on that element alone, so that permuting a weight permutes
            its scores.
        make_stats: Makes the statistics that the score needs.
        dtypes: Dtypes of the weights to try.

    Raises:
        AssertionError: When a law is broken.
    """
    _require(isinstance(score.needs, frozenset), score, f"needs must be a frozenset, got {score.needs!r}")
    for dtype in dtypes:
        weights = {
            "b.weight": _random((3, 5), 0),
            "a.weight": _random((4, 3, 3, 2), 1),
            "zero.weight": torch.zeros(2, 3),
            "one.weight": _random((1, 1), 2),
            "strided.weight": _random((4, 6), 3).t(),
            "tiny.weight": _random((3, 3), 4) * 2.0**-20,  # float16 subnormals: a product in float16 would be zero
        }
        weights = {name: w.to(dtype) for name, w in weights.items()}
        stats = make_stats(score.needs, weights)
        _check_scores_of(score, weights, stats, str(dtype))
        if equivariant:
            _check_equivariant(score, weights["a.weight"], make_stats)


def check_group_score(score: GroupScore) -> None:
    """Check the laws of group scores: one finite number per unit, pure, and blind to the order of the units.

    Args:
        score: The score.

    Raises:
        AssertionError: When a law is broken.
    """
    _require(isinstance(score.needs, frozenset), score, f"needs must be a frozenset, got {score.needs!r}")
    for units in (1, 2, 7):
        group, stats = _synthetic_group(units, score.needs)
        out = score.units(group, stats)
        _require(out is not None, score, "says nothing about a group with makers, readers, biases and norms")
        if out is None:
            return
        _require(tuple(out.shape) == (units,), score, f"returned {tuple(out.shape)} for {units} units")
        _require(bool(torch.isfinite(out).all()), score, "not finite on finite input")
        again = score.units(group, stats)
        _require(again is not None and torch.equal(out, again), score, "differs from call to call")
        turn = torch.arange(units - 1, -1, -1)
        members = tuple(MemberView(m.name, m.role, m.values[turn]) for m in group.members)
        turned_stats = {need: {n: t[turn] for n, t in table.items()} for need, table in stats.items()}
        turned = score.units(GroupView(group.name, units, members), turned_stats)
        same = turned is not None and torch.allclose(turned, out[turn], rtol=1e-9)
        _require(same, score, "permuting the units does not permute their scores")
        empty = score.units(GroupView(group.name, units, ()), {need: {} for need in score.needs})
        _require(empty is None, score, "scores a group that owns nothing")


def _synthetic_group(units: int, needs: frozenset[Need]) -> tuple[GroupView, dict[Need, dict[str, Tensor]]]:
    """Make a group of a layer, its bias, its norm and two readers; statistics by member and by group."""
    members = tuple(
        MemberView(f"{role}{i}@0", role, _random((units, width), i))
        for i, (role, width) in enumerate([("out", 9), ("bias", 1), ("norm", 1), ("bias", 1), ("in", 6), ("in", 4)])
    )
    stats: dict[Need, dict[str, Tensor]] = {}
    for i, need in enumerate(sorted(needs, key=repr)):
        table = {m.name: _random(tuple(m.values.shape), 50 + i).abs() for m in members}
        stats[need] = {**table, "group": _random((units,), 90 + i).abs().double()}
    return GroupView("group", units, members), stats


def _check_scores_of(score: Score, weights: Tensors, stats: Stats, where: str) -> None:
    before = {name: w.clone() for name, w in weights.items()}
    kept = {need: {name: t.clone() for name, t in values.items()} for need, values in stats.items()}
    out = score(weights, stats)
    _require(set(out) == set(weights), score, f"{where}: scored {sorted(out)}, was given {sorted(weights)}")
    for name, w in weights.items():
        at = f"{where}, {name}"
        _require(out[name].shape == w.shape, score, f"{at}: shape {tuple(out[name].shape)}, weight {tuple(w.shape)}")
        wide = out[name].dtype in (torch.float32, torch.float64)
        _require(wide, score, f"{at}: dtype {out[name].dtype}; scores are float32 or float64")
        _require(bool(torch.isfinite(out[name]).all()), score, f"{at}: not finite on finite input")
        _require(torch.equal(w, before[name]), score, f"{at}: changed the weight")
    for need, values in kept.items():
        same = all(torch.equal(stats[need][name], t) for name, t in values.items())
        _require(same, score, f"{where}: changed the statistic {need!r}")
    again = score(weights, stats)
    turned = score(dict(reversed(list(weights.items()))), stats)
    in_float = score({name: w.to(torch.promote_types(w.dtype, torch.float32)) for name, w in weights.items()}, stats)
    for name, own in out.items():
        _require(torch.equal(own, again[name]), score, f"{where}, {name}: a second call gives other scores")
        _require(torch.equal(own, turned[name]), score, f"{where}, {name}: depends on the order of the dict")
        _require(torch.equal(own, in_float[name]), score, f"{where}, {name}: is not computed in float32 or better")


def _check_equivariant(score: Score, weight: Tensor, make_stats: MakeStats) -> None:
    flat = {"w": weight.reshape(1, -1)}
    stats = make_stats(score.needs, flat)
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(5))
    shuffled = {need: {"w": values["w"][:, order]} for need, values in stats.items()}
    straight = score(flat, stats)["w"][:, order]
    permuted = score({"w": flat["w"][:, order]}, shuffled)["w"]
    _require(torch.equal(straight, permuted), score, "permuting the elements does not permute the scores")


# --- patterns --------------------------------------------------------------------------------------------------------


def check_pattern(pattern: Pattern, layouts: Mapping[str, Weight] = LAYOUTS) -> None:
    """Check that reduce, sizes, select and expand agree with each other on every layout that the pattern accepts.

    Args:
        pattern: The pattern.
        layouts: Weights to try; those that ``check`` refuses with ``PatternError`` are left out.

    Raises:
        AssertionError: When a law is broken, or no layout is accepted.
    """
    accepted = 0
    for label, weight in layouts.items():
        try:
            pattern.check(weight)
        except PatternError:
            continue
        accepted += 1
        count = _check_units(pattern, weight, label)
        _check_reduce_is_local(pattern, weight, label, count)
        for keep in _keeps(pattern, count):
            _check_selection(pattern, weight, f"{label}, keep {keep}", keep)
    _require(accepted > 0, pattern, f"refuses every layout: {', '.join(layouts)}")


def _keeps(pattern: Pattern, count: int) -> list[int]:
    if pattern.density is not None:
        return [round(count * pattern.density)]
    return sorted({0, 1, count // 3, count // 2, count - 1, count} & set(range(count + 1)))


def _sizes(pattern: Pattern, weight: Weight, count: int) -> Tensor:
    sizes = pattern.sizes(weight)
    return sizes if isinstance(sizes, Tensor) else torch.full((count,), sizes)


def _check_units(pattern: Pattern, weight: Weight, label: str) -> int:
    """Every element belongs to exactly one unit; returns the number of units."""
    values = _random(weight.shape, 6)
    before = values.clone()
    scores = pattern.reduce(weight, values)
    count = scores.numel()
    _require(scores.dim() == 1, pattern, f"{label}: reduce gave shape {tuple(scores.shape)}, expected 1-D")
    _require(torch.equal(values, before), pattern, f"{label}: reduce changed its input")
    sizes = _sizes(pattern, weight, count)
    _require(sizes.shape == (count,), pattern, f"{label}: {tuple(sizes.shape)} sizes for {count} units")
    covered = torch.zeros(weight.shape, dtype=torch.int64)
    for unit in range(count):
        one = torch.zeros(count, dtype=torch.bool)
        one[unit] = True
        mask = pattern.expand(weight, one)[weight.name]
        got, size = int(mask.sum()), int(sizes[unit])
        _require(got == size, pattern, f"{label}: unit {unit} has {got} elements, sizes says {size}")
        covered += mask
    _require(bool((covered == 1).all()), pattern, f"{label}: an element lies in no unit, or in two")
    return count


def _check_reduce_is_local(pattern: Pattern, weight: Weight, label: str, count: int) -> None:
    """A unit's score depends on the unit's own elements only."""
    values = _random(weight.shape, 7)
    other = _random(weight.shape, 8)
    scores = pattern.reduce(weight, values)
    for unit in {0, count // 2, count - 1}:
        one = torch.zeros(count, dtype=torch.bool)
        one[unit] = True
        inside = pattern.expand(weight, one)[weight.name]
        mixed = pattern.reduce(weight, torch.where(inside, values, other))
        same = torch.equal(mixed[unit], scores[unit])
        _require(same, pattern, f"{label}: the score of unit {unit} depends on elements outside it")


def _check_selection(pattern: Pattern, weight: Weight, label: str, keep: int) -> None:
    """Exactly ``keep`` units, ties included, and the masks keep exactly their elements."""
    distinct = pattern.reduce(weight, _random(weight.shape, 9))
    count = distinct.numel()
    coarse = (torch.arange(count) * 7 % 3).float()
    marked = distinct.clone()
    if pattern.density is None:
        marked[: (count - keep) // 2] = -torch.inf
    for kind, scores in {"distinct": distinct, "tied": coarse, "equal": torch.zeros(count), "marked": marked}.items():
        at = f"{label}, {kind} scores"
        before = scores.clone()
        kept = pattern.select(weight, scores, keep)
        _require(kept.dtype == torch.bool and kept.shape == (count,), pattern, f"{at}: select gave {kept.dtype}")
        _require(int(kept.sum()) == keep, pattern, f"{at}: select kept {int(kept.sum())} units")
        _require(torch.equal(scores, before), pattern, f"{at}: select changed the scores")
        if pattern.density is None:
            expected = select_k({"": scores.tolist()}, keep)[""]
            _require(kept.tolist() == expected, pattern, f"{at}: not the {keep} last in the order (score, index)")
        _check_expand(pattern, weight, at, kept)


def _check_expand(pattern: Pattern, weight: Weight, at: str, kept: Tensor) -> None:
    masks = pattern.expand(weight, kept.clone())
    mask = masks[weight.name]
    _require(mask.dtype == torch.bool, pattern, f"{at}: expand gave a mask of {mask.dtype}")
    _require(mask.shape == weight.shape, pattern, f"{at}: mask of shape {tuple(mask.shape)} for {weight.shape}")
    expected = int(_sizes(pattern, weight, kept.numel())[kept].sum())
    _require(int(mask.sum()) == expected, pattern, f"{at}: the mask keeps {int(mask.sum())} elements, not {expected}")
    alive = pattern.reduce(weight, mask)
    _require(alive.dtype == torch.bool, pattern, f"{at}: reduce of a mask gave {alive.dtype}")
    _require(torch.equal(alive, kept), pattern, f"{at}: reduce(expand(kept)) is not kept")
    others = [m for name, m in masks.items() if name != weight.name]
    _require(all(m.dtype == torch.bool for m in others), pattern, f"{at}: a mask beside the weight's is not bool")
    if bool(kept.all()):
        _require(all(bool(m.all()) for m in others), pattern, f"{at}: something dies though every unit stays")


# --- schedules -------------------------------------------------------------------------------------------------------


def check_schedule(schedule: Schedule, *, updates: int | None = None, last: float | None = None) -> None:
    """Check that a schedule rises to exactly its final level, at increasing times, and never beyond it.

    Args:
        schedule: The schedule.
        updates: Number of updates expected, if known.
        last: Time of the last update expected, if known.

    Raises:
        AssertionError: When a law is broken.
    """
    n = schedule.updates
    _require(updates is None or n == updates, schedule, f"has {n} updates, expected {updates}")
    times = [schedule.time(i) for i in range(n)]
    _require(all(a < b for a, b in pairwise(times)), schedule, f"times do not increase: {times}")
    _require(times[0] >= 0, schedule, f"starts at {times[0]}, before the clock")
    at_end = last is None or math.isclose(times[-1], last, rel_tol=1e-9, abs_tol=1e-9)
    _require(at_end, schedule, f"the last update is at {times[-1]}, expected {last}")
    if schedule.unit != "rounds":
        steps = [schedule.step(i, 1000) for i in range(n)]
        _require(steps == sorted(steps), schedule, f"steps go back: {steps}")
    for final in (0.0, 0.1, 0.3, 0.5, 2 / 3, 0.9, 0.999, 1.0):
        levels = [schedule.level(i, final) for i in range(n)]
        _require(levels[-1] == final, schedule, f"ends at {levels[-1]}, asked for {final}")
        rising = all(b >= a - 1e-12 for a, b in pairwise(levels))
        _require(rising, schedule, f"sparsity falls on the way to {final}: {levels}")
        _require(levels[0] >= 0.0, schedule, f"starts below zero on the way to {final}: {levels[0]}")
        _require(max(levels) <= final, schedule, f"goes beyond {final}: {max(levels)!r}")


# --- allocations -----------------------------------------------------------------------------------------------------


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


_EDGES: dict[str, Literal["", "first", "last"]] = {"fc1": "first", "head": "last"}


def _floor(allocation: Allocation, units: Units) -> int:
    """Return the fewest units that stay: the layer's own floor, or the allocation's."""
    own = allocation.floor(units.scores.numel(), units.edge) if isinstance(allocation, FlooredAllocation) else 0
    return max(units.floor, own)


def _problems() -> list[tuple[str, dict[str, Units], bool]]:
    tied = {"b": torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]), "a": torch.tensor([1.0, 1.0, 0.0]), "c": torch.zeros(7)}
    free = {name: _random((n,), n) for name, n in {"fc2": 6, "fc1": 6, "head": 2, "one": 1}.items()}
    signed = {"x": _random((9,), 1) - 3.0, "y": _random((4,), 2) * 100, "z": _random((1,), 3)}
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
        ("one layer", {"w": Units(_random((8,), 4), 1.0, 1)}, True),
        ("uneven costs", {n: Units(s, 3.0 + len(s), 1) for n, s in free.items()}, False),
        ("fractional costs", {n: Units(s, 0.1 * len(s), 0) for n, s in tied.items()}, False),
        ("smaller edge blocks", {n: Units(_random((4,), i), edge * 1.0, 1) for i, n in enumerate("pq")}, False),
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
    _require(set(counts) == set(units), allocation, f"{at}: counts for {sorted(counts)}")
    for name, u in units.items():
        n, floor = u.scores.numel(), min(_floor(allocation, u), u.scores.numel())
        _require(floor <= counts[name] <= n, allocation, f"{at}: {name} keeps {counts[name]}, not in {floor}..{n}")
        _require(torch.equal(u.scores, before[name]), allocation, f"{at}: changed the scores of {name}")
    spent = sum(_best_cost(u, counts[name]) for name, u in units.items())
    _require(spent <= kept + 1e-9 * max(kept, 1.0), allocation, f"{at}: keeps {counts}, which costs {spent:g}")
    living = sum(_best_cost(u, int((~torch.isneginf(u.scores)).sum())) for u in units.values())
    if exact and kept <= living:
        _require(spent == kept, allocation, f"{at}: keeps {counts}, {spent:g} in total; unit costs can meet it exactly")
    alive = {name: int((~torch.isneginf(u.scores)).sum()) for name, u in units.items()}
    if kept <= sum(_best_cost(u, alive[name]) for name, u in units.items()):
        revived = {name: (counts[name], alive[name]) for name in units if counts[name] > alive[name]}
        _require(not revived, allocation, f"{at}: counts pruned units as kept (kept, alive): {revived}")
    turned = allocation(dict(reversed(list(units.items()))), kept)
    _require(dict(turned) == dict(counts), allocation, f"{at}: another order of the dict gives {turned}, not {counts}")
