"""One score per unit: what the score needs is collected, element scores are aggregated, group scores asked."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.errors import SelectionError
from secateur.graph.choose import Removed
from secateur.graph.coupling import Coupling
from secateur.graph.groups import Group
from secateur.graph.valueless import all_have_values
from secateur.method import check_finite
from secateur.patterns import Channel
from secateur.scores import Coupled
from secateur.select import check_scores
from secateur.stats._common import refuse_zeros
from secateur.stats.gradients import LossFn
from secateur.structure.collect import COST, Batches, Collected, collect
from secateur.structure.cut import Cut
from secateur.structure.views import Owned, group_view, names_reached, owned_by, role_of
from secateur.types import GroupScore, Pattern, Score, Stats, UnitPattern


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
    removed: Removed | None = None,
) -> tuple[NDArray[np.float64], dict[str, str]]:
    """Score every unit of every group.

    Args:
        model: The model.
        coupling: Its groups.
        score: The score.
        loss_fn: Runs the model on one batch, for scores that need gradients.
        batches: For scores that need data.
        removed: Units that are masked already: they score ``-inf``, and the others as if these had been cut out.

    Returns:
        One score per unit, in the order of ``Group.ids``; groups that the score says nothing about, with the reason.

    Raises:
        MissingStatsError: When the score needs what nobody supplied, or what it needs is zero for every unit.
        WeightError: When a weight is not finite.
        SelectionError: When a score is not finite.
    """
    known = dict(model.named_parameters(remove_duplicate=False))  # afresh: training may have replaced a tensor
    values = {name: known[name].detach() for name in names_reached(model, coupling.groups) if name in known}
    removed = np.zeros(coupling.units, dtype=bool) if removed is None else removed
    if not all_have_values(values.values()):
        return np.zeros(coupling.units), {}  # no values to score: the lowest indices go
    for name, value in values.items():
        check_finite(name, value)
    found = collect(model, coupling, score, loss_fn, batches, removed) if score.needs else Collected()
    refuse_silence(score, found.stats)
    cut = Cut(coupling, removed)
    rate = _Coupled(model, coupling, score, values, cut) if isinstance(score, Coupled) and not score.needs else None
    out = np.where(removed, -np.inf, 0.0)
    silent = {}
    for group in coupling.groups:
        if group.name in found.silent:
            silent[group.name] = f"{score} says nothing about it: {found.silent[group.name]}"
            continue
        left = group.ids[~removed[group.ids]]
        if rate:
            scored = rate(group)
        else:
            view, stats = group_view(model, coupling, group, values), found.stats
            scored = score.units(*(cut.seen(group, view, stats) if removed.any() else (view, stats)))
        if scored is None:
            silent[group.name] = f"{score} says nothing about it"
            continue
        if tuple(scored.shape) != (len(left),):
            raise SelectionError(f"{group.name}: {score} returned {tuple(scored.shape)} for {len(left)} units")
        out[left] = check_scores(group.name, scored.detach().double().cpu()).numpy()
    return out, silent


def refuse_silence(score: GroupScore, stats: Stats) -> None:
    """Refuse statistics that are zero for every unit of every group; one dead unit or group is as good as any.

    Args:
        score: The score that needs them.
        stats: By need, then by member or group. What a unit costs is no statement about its worth.

    Raises:
        MissingStatsError: When nothing else than zeros was found.
    """
    values = [value for need in score.needs - {COST} for value in stats[need].values()]
    if values:
        refuse_zeros(f"all that {score} looks at", values, _WHY, each="unit")


_WHY = (
    "the network or its inputs are zero, the loss is at a minimum, or nothing of it reaches the units; where only the "
    "spread over samples counts, batches of one sample have none"
)


class _Coupled:
    """``Coupled.units`` without laying out every unit's elements: a tensor is scored once and summed per dimension."""

    def __init__(
        self, model: nn.Module, coupling: Coupling, score: Coupled, values: Mapping[str, Tensor], cut: Cut
    ) -> None:
        self._model, self._score, self._values, self._cut = model, score, values, cut
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
                kept = elements
                for place, left in cut.left(name).items():
                    kept = kept if place == dim else kept.index_select(place, left.to(kept.device))
                other = [d for d in range(kept.dim()) if d != dim]
                self._rows[name, dim] = score.partial(kept, other).cpu()

    def __call__(self, group: Group) -> Tensor | None:
        """Score one group."""
        partials = []
        live = self._cut.live(group)
        for member in group.members:
            shape = self._shapes[member.name]
            if member.name not in self._values or (
                self._score.over != "all" and self._score.over != role_of(self._model, member.name, member.dim, shape)
            ):
                continue
            picked = self._rows[member.name, member.dim][torch.from_numpy(member.places.by_unit)].reshape(
                group.units, -1
            )[live]
            merged = picked.amax(1) if self._score.reduce_by == "max" else picked.sum(1)
            left = self._cut.left(member.name)
            beside = math.prod(len(left.get(d, range(n))) for d, n in enumerate(shape) if d != member.dim)
            partials.append((merged, picked.shape[1] * beside))
        partials += [part for own in owned_by(self._model, group) if (part := self._of_modules(own, live)) is not None]
        return self._score.combined(partials)

    def _of_modules(self, own: Owned, live: Tensor) -> tuple[Tensor, int] | None:
        """Score one parameter of the modules that go with units, module by module."""
        names = [name for name in own.names if name is not None and name in self._values]
        if not names or (self._score.over != "all" and self._score.over != own.role):
            return None
        out = torch.zeros(len(own.names), dtype=torch.float64, device="cpu")
        for unit, name in enumerate(own.names):
            if name is not None and name in self._values:
                elements = self._score.score({name: self._values[name]}, {})[name].flatten()
                out[unit] = self._score.partial(elements, [0]).cpu()
        return out[live], max(self._values[name].numel() for name in names)
