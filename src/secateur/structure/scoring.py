"""One score per unit: what the score needs is collected, element scores are aggregated, group scores asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.errors import MissingStatsError, SelectionError
from secateur.forward import evaluation_mode_of
from secateur.graph.coupling import Coupling, Group
from secateur.method import check_finite
from secateur.patterns import Channel
from secateur.scores import Coupled
from secateur.select import check_scores
from secateur.stats.gradients import LossFn, loss_of
from secateur.structure.views import group_view, role_of, rows_of
from secateur.types import GroupScore, Pattern, Score, Stats, UnitPattern

Batches = Iterable[Any] | Callable[[], Iterable[Any]]

_UNIT_STATISTICS = frozenset({"unit_product", "unit_product_square", "unit_product_absolute"})
_ELEMENT_STATISTICS = frozenset({"gradient", "absolute_gradient"})
_MAKES = ("out", "bias", "norm", "other")


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
        loss_fn: For scores that need gradients.
        batches: For scores that need gradients.

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
    if any(v.device.type == "meta" for v in values.values()):
        return np.zeros(coupling.units), {}  # no values to score: the lowest indices go
    for name, value in values.items():
        check_finite(name, value)
    stats = _collect(model, coupling, score, values, loss_fn, batches)
    rate = _Coupled(model, coupling, score, values) if isinstance(score, Coupled) and not score.needs else None
    out = np.zeros(coupling.units)
    silent = {}
    for group in coupling.groups:
        scored = rate(group) if rate else score.units(group_view(model, coupling, group, values), stats)
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


def _collect(
    model: nn.Module,
    coupling: Coupling,
    score: GroupScore,
    values: Mapping[str, Tensor],
    loss_fn: LossFn | None,
    batches: Batches | None,
) -> Stats:
    if not score.needs:
        return {}
    unknown = score.needs - _UNIT_STATISTICS - _ELEMENT_STATISTICS
    if unknown:
        raise MissingStatsError(f"{score} needs {sorted(unknown)}, which nothing here collects")
    if loss_fn is None or batches is None:
        raise MissingStatsError(f"{score} needs gradients: pass loss_fn=lambda model, batch: ... and batches=[...]")
    reached = {m.name for g in coupling.groups for m in g.members}
    parameters = {n: p for n, p in model.named_parameters() if n in reached}
    sums: dict[str, dict[str, Tensor]] = {need: {} for need in score.needs}
    count = 0
    frozen = [p for p in parameters.values() if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        with evaluation_mode_of(model), torch.enable_grad():
            for batch in batches() if callable(batches) else batches:
                loss = loss_of(loss_fn, model, batch, count)
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                found = {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}
                _add(sums, coupling, model, parameters, found)
                count += 1
    finally:
        for p in frozen:
            p.requires_grad_(False)
    if not count:
        raise MissingStatsError(f"{score} needs gradients, but there were no batches to compute them from")
    return {need: {name: total / count for name, total in table.items()} for need, table in sums.items()}


def _add(
    sums: dict[str, dict[str, Tensor]],
    coupling: Coupling,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    gradients: Mapping[str, Tensor],
) -> None:
    """Add one batch: element statistics as rows per unit, unit statistics as sums over what makes the unit."""
    for group in coupling.groups:
        product = torch.zeros(group.units, dtype=torch.float64, device="cpu")
        for member in group.members:
            if member.name not in gradients:
                continue
            gradient = rows_of(gradients[member.name], member, group.units).double().cpu()
            key = f"{member.name}@{member.dim}"
            for need, value in (("gradient", gradient), ("absolute_gradient", gradient.abs())):
                if need in sums:
                    sums[need][key] = sums[need][key] + value if key in sums[need] else value
            if _UNIT_STATISTICS & sums.keys() and member.dim in _making_dims(model, coupling, member.name):
                weights = rows_of(parameters[member.name], member, group.units).double().cpu()
                product += (gradient * weights).sum(1)
        for need, value in (
            ("unit_product", product),
            ("unit_product_square", product.square()),
            ("unit_product_absolute", product.abs()),
        ):
            if need in sums:
                sums[need][group.name] = sums[need].get(group.name, torch.zeros_like(value)) + value


def _making_dims(model: nn.Module, coupling: Coupling, name: str) -> tuple[int, ...]:
    shape = next(leaf.axes.shape for leaf in coupling.trace.leaves if leaf.name == name)
    return tuple(d for d in range(len(shape)) if role_of(model, name, d, shape) in _MAKES)
