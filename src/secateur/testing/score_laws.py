"""The laws of scores, of single weights and of coupled units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from secateur.stats.inverse_fisher import InverseFisher
from secateur.testing._common import random_tensor, require
from secateur.testing.fisher import synthetic_fisher
from secateur.types import GroupScore, GroupView, MemberView, Need, Score, Stats, Tensors

MakeStats = Callable[[frozenset[Need], Tensors], Stats]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def synthetic_stats(needs: frozenset[Need], weights: Tensors) -> Stats:
    """Make up statistics of the weights' shapes, in float32 or better: signed for ``gradient``, else positive."""
    stats: dict[Need, Mapping[str, Tensor]] = {}
    for i, need in enumerate(sorted(needs, key=repr)):
        if isinstance(need, InverseFisher):
            stats[need] = synthetic_fisher(need, weights)
            continue
        values = {name: random_tensor(w.shape, 100 * i + j) for j, (name, w) in enumerate(sorted(weights.items()))}
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
    require(isinstance(score.needs, frozenset), score, f"needs must be a frozenset, got {score.needs!r}")
    for dtype in dtypes:
        weights = {
            "b.weight": random_tensor((3, 5), 0),
            "a.weight": random_tensor((4, 3, 3, 2), 1),
            "zero.weight": torch.zeros(2, 3),
            "one.weight": random_tensor((1, 1), 2),
            "strided.weight": random_tensor((4, 6), 3).t(),
            "tiny.weight": random_tensor((3, 3), 4) * 2.0**-20,  # float16 subnormals: a product in it would be zero
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
    require(isinstance(score.needs, frozenset), score, f"needs must be a frozenset, got {score.needs!r}")
    for units in (1, 2, 7):
        group, stats = _synthetic_group(units, score.needs)
        out = score.units(group, stats)
        require(out is not None, score, "says nothing about a group with makers, readers, biases and norms")
        if out is None:
            return
        require(tuple(out.shape) == (units,), score, f"returned {tuple(out.shape)} for {units} units")
        require(bool(torch.isfinite(out).all()), score, "not finite on finite input")
        again = score.units(group, stats)
        require(again is not None and torch.equal(out, again), score, "differs from call to call")
        turn = torch.arange(units - 1, -1, -1)
        members = tuple(MemberView(m.name, m.role, m.values[turn]) for m in group.members)
        turned_stats = {need: {n: t[turn] for n, t in table.items()} for need, table in stats.items()}
        turned = score.units(GroupView(group.name, units, members), turned_stats)
        same = turned is not None and torch.allclose(turned, out[turn], rtol=1e-9)
        require(same, score, "permuting the units does not permute their scores")
        empty = score.units(GroupView(group.name, units, ()), {need: {} for need in score.needs})
        require(empty is None, score, "scores a group that owns nothing")


def _synthetic_group(units: int, needs: frozenset[Need]) -> tuple[GroupView, dict[Need, dict[str, Tensor]]]:
    """Make a group of a layer, its bias, its norm and two readers; statistics by member and by group."""
    members = tuple(
        MemberView(f"{role}{i}@0", role, random_tensor((units, width), i))
        for i, (role, width) in enumerate([("out", 9), ("bias", 1), ("norm", 1), ("bias", 1), ("in", 6), ("in", 4)])
    )
    stats: dict[Need, dict[str, Tensor]] = {}
    for i, need in enumerate(sorted(needs, key=repr)):
        table = {m.name: random_tensor(tuple(m.values.shape), 50 + i).abs() for m in members}
        stats[need] = {**table, "group": random_tensor((units,), 90 + i).abs().double()}
    return GroupView("group", units, members), stats


def _check_scores_of(score: Score, weights: Tensors, stats: Stats, where: str) -> None:
    before = {name: w.clone() for name, w in weights.items()}
    kept = {need: {name: t.clone() for name, t in values.items()} for need, values in stats.items()}
    out = score(weights, stats)
    require(set(out) == set(weights), score, f"{where}: scored {sorted(out)}, was given {sorted(weights)}")
    for name, w in weights.items():
        at = f"{where}, {name}"
        require(out[name].shape == w.shape, score, f"{at}: shape {tuple(out[name].shape)}, weight {tuple(w.shape)}")
        wide = out[name].dtype in (torch.float32, torch.float64)
        require(wide, score, f"{at}: dtype {out[name].dtype}; scores are float32 or float64")
        require(bool(torch.isfinite(out[name]).all()), score, f"{at}: not finite on finite input")
        require(torch.equal(w, before[name]), score, f"{at}: changed the weight")
    for need, values in kept.items():
        same = all(torch.equal(stats[need][name], t) for name, t in values.items())
        require(same, score, f"{where}: changed the statistic {need!r}")
    again = score(weights, stats)
    turned = score(dict(reversed(list(weights.items()))), stats)
    in_float = score({name: w.to(torch.promote_types(w.dtype, torch.float32)) for name, w in weights.items()}, stats)
    for name, own in out.items():
        require(torch.equal(own, again[name]), score, f"{where}, {name}: a second call gives other scores")
        require(torch.equal(own, turned[name]), score, f"{where}, {name}: depends on the order of the dict")
        require(torch.equal(own, in_float[name]), score, f"{where}, {name}: is not computed in float32 or better")


def _check_equivariant(score: Score, weight: Tensor, make_stats: MakeStats) -> None:
    flat = {"w": weight.reshape(1, -1)}
    stats = make_stats(score.needs, flat)
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(5))
    shuffled = {need: {"w": values["w"][:, order]} for need, values in stats.items()}
    straight = score(flat, stats)["w"][:, order]
    permuted = score({"w": flat["w"][:, order]}, shuffled)["w"]
    require(torch.equal(straight, permuted), score, "permuting the elements does not permute the scores")
