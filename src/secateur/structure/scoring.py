"""One score per unit: what the score needs is collected, element scores are aggregated, group scores asked."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.errors import SelectionError
from secateur.graph.coupling import Coupling, Group
from secateur.graph.valueless import all_have_values
from secateur.method import check_finite
from secateur.patterns import Channel
from secateur.scores import Coupled
from secateur.select import check_scores
from secateur.stats.gradients import LossFn
from secateur.structure.collect import Batches, Collected, collect
from secateur.structure.views import group_view, role_of
from secateur.types import GroupScore, Pattern, Score, UnitPattern


def as_group_score(score: Score | GroupScore, pattern: Pattern | UnitPattern) -> GroupScore:
    """Take an element score for its aggregate over everything coupled to a unit."""
    if isinstance(score, GroupScore):
        return score
    return Coupled(score, pattern.reduce_by if isinstance(pattern, Channel) else "mean")


def unit_scores(
    model: nn.Module,
    coupling: Coupling,
    score: GroupScore,
    *,
    loss_fn: LossFn | None,
    batches: Batches | None,
) -> tuple[NDArray[np.float64], dict[str, str]]:
    """Score every unit of every group.

    Args:
        model: The model.
        coupling: Its groups.
        score: The score.
        loss_fn: Runs the model on one batch, for scores that need gradients.
        batches: For scores that need data.

    Returns:
        One score per unit, in the order of ``Group.ids``; groups that the score says nothing about, with the reason.

    Raises:
        MissingStatsError: When the score needs what nobody supplied.
        WeightError: When a weight is not finite.
        SelectionError: When a score is not finite.
    """
    values = {leaf.name: leaf.tensor.detach() for leaf in coupling.trace.leaves if leaf.kind == "parameter"}
    reached = {m.name for g in coupling.groups for m in g.members if m.name in values}
    values = {name: values[name] for name in reached}
    if not all_have_values(values.values()):
        return np.zeros(coupling.units), {}  # no values to score: the lowest indices go
    for name, value in values.items():
        check_finite(name, value)
    found = collect(model, coupling, score, loss_fn, batches) if score.needs else Collected()
    rate = _Coupled(model, coupling, score, values) if isinstance(score, Coupled) and not score.needs else None
    out = np.zeros(coupling.units)
    silent = {}
    for group in coupling.groups:
        if group.name in found.silent:
            silent[group.name] = f"{score} says nothing about it: {found.silent[group.name]}"
            continue
        scored = rate(group) if rate else score.units(group_view(model, coupling, group, values), found.stats)
        if scored is None:
            silent[group.name] = f"{score} says nothing about it"
            continue
        if tuple(scored.shape) != (group.units,):
            raise SelectionError(f"{group.name}: {score} returned {tuple(scored.shape)} for {group.units} units")
        out[group.ids] = check_scores(group.name, scored.detach().double().cpu()).numpy()
    return out, silent


class _Coupled:
    """``Coupled.units`` without laying out every unit's elements: a tensor is scored once and summed per dimension."""

    def __init__(self, model: nn.Module, coupling: Coupling, score: Coupled, values: Mapping[str, Tensor]) -> None:
        self._model, self._score, self._values = model, score, values
        self._shapes = {leaf.name: leaf.axes.shape for leaf in coupling.trace.leaves}
        dims: dict[str, set[int]] = {}
        for group in coupling.groups:
            for member in group.members:
                if member.name in values:
                    dims.setdefault(member.name, set()).add(member.dim)
        self._rows: dict[tuple[str, int], Tensor] = {}
        for name, wanted in dims.items():
            elements = score.score({name: values[name]}, {})[name]
            for dim in wanted:
                other = [d for d in range(elements.dim()) if d != dim]
                self._rows[name, dim] = score.partial(elements, other).cpu()

    def __call__(self, group: Group) -> Tensor | None:
        """Score one group."""
        partials = []
        for member in group.members:
            shape = self._shapes[member.name]
            if member.name not in self._values or (
                self._score.over != "all" and self._score.over != role_of(self._model, member.name, member.dim, shape)
            ):
                continue
            picked = self._rows[member.name, member.dim][torch.from_numpy(member.places.by_unit)].reshape(
                group.units, -1
            )
            merged = picked.amax(1) if self._score.reduce_by == "max" else picked.sum(1)
            partials.append((merged, picked.shape[1] * (math.prod(shape) // shape[member.dim])))
        return self._score.combined(partials)
