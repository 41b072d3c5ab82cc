"""Statistics of the parameters that a unit owns: of single weights, and sums of weight times gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import MissingStatsError
from secateur.forward import requiring_gradients, undisturbed
from secateur.graph.coupling import Coupling
from secateur.stats._common import refuse_inference
from secateur.stats.gradients import LossFn, loss_of
from secateur.structure.collected import Batches
from secateur.structure.views import names_reached, owned_by, role_of, rows_of
from secateur.types import GroupScore, Source, Statistic

UNIT_STATISTICS = frozenset({"unit_product", "unit_product_square", "unit_product_absolute"})
"""Sums of weight times gradient over what makes a unit, per batch."""

ELEMENT_STATISTICS = frozenset({"gradient", "absolute_gradient"})

_MAKES = ("out", "bias", "norm", "other")


def collect_elements(
    model: nn.Module, coupling: Coupling, need: Statistic, loss_fn: LossFn | None, batches: Batches | None
) -> dict[str, Tensor]:
    """Return a statistic of single weights as rows per unit."""
    parameters = _reached(model, coupling)
    first = coupling.trace.examples[0]
    data = None if batches is None else (lambda: batches() if callable(batches) else batches)
    found = need.collect(Source(model, parameters, loss_fn, data, (first.args, first.kwargs)))
    out = {
        f"{m.name}@{m.dim}": rows_of(found[m.name], m, g.units).double().cpu()
        for g in coupling.groups
        for m in g.members
        if m.name in found
    }
    for own in (own for group in coupling.groups for own in owned_by(model, group)):
        rows = own.rows(found)
        if rows is not None:
            out[own.key] = rows.double().cpu()
    return out


def _reached(model: nn.Module, coupling: Coupling) -> dict[str, nn.Parameter]:
    reached = names_reached(model, coupling.groups)
    return {n: p for n, p in model.named_parameters(remove_duplicate=False) if n in reached}


def collect_unit_gradients(
    model: nn.Module,
    coupling: Coupling,
    score: GroupScore,
    needs: frozenset[str],
    loss_fn: LossFn,
    batches: Callable[[], Iterable[Any]],
) -> dict[str, dict[str, Tensor]]:
    """Average gradients over batches, as rows per unit, and sums of weight times gradient over what makes a unit.

    Args:
        model: The model.
        coupling: Its groups.
        score: The score, for messages.
        needs: Which of these statistics.
        loss_fn: Runs the model on one batch.
        batches: Begins the batches anew.

    Returns:
        By statistic, then by member or by group.

    Raises:
        MissingStatsError: When there are no batches, or the loss has no gradient.
    """
    parameters = _reached(model, coupling)
    sums: dict[str, dict[str, Tensor]] = {need: {} for need in needs}
    count = 0
    refuse_inference(score)
    with requiring_gradients(parameters.values()), undisturbed(model), torch.enable_grad():
        for batch in batches():
            loss = loss_of(loss_fn, model, batch, count)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            found = {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}
            _add(sums, coupling, model, parameters, found)
            count += 1
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
            _add_elements(sums, f"{member.name}@{member.dim}", gradient)
            if UNIT_STATISTICS & sums.keys() and member.dim in _making_dims(model, coupling, member.name):
                weights = rows_of(parameters[member.name], member, group.units).double().cpu()
                product += (gradient * weights).sum(1)
        for own in owned_by(model, group):
            rows, weights_of = own.rows(gradients), own.rows(parameters)
            if rows is not None and weights_of is not None:
                if rows.shape != weights_of.shape:  # some module had no gradient: the widest one, perhaps
                    rows = nn.functional.pad(rows, (0, weights_of.shape[1] - rows.shape[1]))
                _add_elements(sums, own.key, rows.double().cpu())
                product += (rows.double() * weights_of.double()).sum(1).cpu()
        for need, value in (
            ("unit_product", product),
            ("unit_product_square", product.square()),
            ("unit_product_absolute", product.abs()),
        ):
            if need in sums:
                sums[need][group.name] = sums[need].get(group.name, torch.zeros_like(value)) + value


def _add_elements(sums: dict[str, dict[str, Tensor]], key: str, gradient: Tensor) -> None:
    for need, value in (("gradient", gradient), ("absolute_gradient", gradient.abs())):
        if need in sums:
            sums[need][key] = sums[need][key] + value if key in sums[need] else value


def _making_dims(model: nn.Module, coupling: Coupling, name: str) -> tuple[int, ...]:
    shape = next(leaf.axes.shape for leaf in coupling.trace.leaves if leaf.name == name)
    return tuple(d for d in range(len(shape)) if role_of(model, name, d, shape) in _MAKES)
