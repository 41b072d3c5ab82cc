"""What group scores need beyond the weights: gradients, what layers get as input, and what a unit costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.errors import MissingStatsError
from secateur.forward import call_model, undisturbed
from secateur.graph.choose import Removed
from secateur.graph.coupling import Coupling
from secateur.stats._common import call_loss, check_data, refuse_inference
from secateur.stats.activations import INPUT_STATISTICS, collect_inputs, collect_products
from secateur.stats.gradients import LossFn, loss_of
from secateur.stats.trajectory import HOW
from secateur.structure.readers import Reader, readers_of
from secateur.structure.views import names_reached, owned_by, role_of, rows_of
from secateur.types import GroupScore, Need, OutputScore, Source, Statistic, Stats, Tensors

Batches = Iterable[Any] | Callable[[], Iterable[Any]]

UNIT_STATISTICS = frozenset({"unit_product", "unit_product_square", "unit_product_absolute"})
"""Sums of weight times gradient over what makes a unit, per batch."""

ELEMENT_STATISTICS = frozenset({"gradient", "absolute_gradient"})

PRODUCT_STATISTICS = frozenset(
    {"activation_product", "activation_product_square", "activation_product_absolute", "activation_product_recent"}
)
"""Sums of activation times gradient over what reads a unit, per sample; the recent one favours the latest batches."""

RECENT = "activation_product_recent"

CENTRED = "centred_product_square"
"""The same, squared, with activations counted from their mean."""

COST = "unit_macs"
"""Multiply-accumulates that the removal of one unit saves."""

_UNREACHED = "no batch reaches a layer that reads it"
_MAKES = ("out", "bias", "norm", "other")


@dataclass
class Collected:
    """Statistics, and groups about which they say nothing.

    Attributes:
        stats: By statistic, then by member or by group.
        silent: Why there are none, by group.
    """

    stats: dict[Need, dict[str, Tensor]] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)


def collect(
    model: nn.Module,
    coupling: Coupling,
    score: GroupScore,
    loss_fn: LossFn | None,
    batches: Batches | None,
    removed: Removed | None = None,
) -> Collected:
    """Collect what a score needs.

    Args:
        model: The model.
        coupling: Its groups.
        score: The score.
        loss_fn: Runs the model on one batch; see :func:`~secateur.structure.make_plan`.
        batches: The batches.
        removed: Units that are masked already.

    Returns:
        The statistics.

    Raises:
        MissingStatsError: When the score needs what nobody supplied, or the data gives none.
    """
    needs, out = score.needs, Collected()
    _check_known(score)
    if COST in needs:
        out.stats[COST] = unit_costs(coupling, removed)
    for need in sorted((n for n in needs if isinstance(n, Statistic)), key=repr):
        out.stats[need] = _elements(model, coupling, need, loss_fn, batches)
    gradients = frozenset(str(n) for n in needs & (UNIT_STATISTICS | ELEMENT_STATISTICS))
    if gradients:
        out.stats.update(_gradients(model, coupling, score, gradients, _needed(score, loss_fn), _given(score, batches)))
    inputs = frozenset(str(n) for n in needs & INPUT_STATISTICS)
    products = needs & (PRODUCT_STATISTICS | {CENTRED})
    if not inputs and not products:
        return out
    data = _given(score, batches)
    readers, out.silent = readers_of(model, coupling)
    layers = sorted({reader.module for own in readers.values() for reader in own})
    if inputs:
        found = collect_inputs(model, layers, _forward(loss_fn), data(), needs=inputs)
        _by_member(out, coupling, readers, found)
    if products:
        _products(out, _Products(model, coupling, score, readers, layers), loss_fn, data)
    return out


def check_needs(score: GroupScore, loss_fn: LossFn | None, batches: Batches | None) -> None:
    """Refuse, before anything is trained or collected, a score that needs what nobody supplied.

    Args:
        score: The score.
        loss_fn: Runs the model on one batch.
        batches: The batches.

    Raises:
        MissingStatsError: Says what is missing.
    """
    _check_known(score)
    uses = {use for n in score.needs if isinstance(n, Statistic) for use in n.uses}
    if "batches" in uses or any(isinstance(n, str) for n in score.needs - {COST}):
        _given(score, batches)
    if "loss" in uses:
        _needed(score, loss_fn)
    if "trajectory" in uses:
        raise MissingStatsError(f"{score} looks at what training did: {HOW}")
    by_loss = UNIT_STATISTICS | ELEMENT_STATISTICS
    if not isinstance(score, OutputScore):
        by_loss |= PRODUCT_STATISTICS | {CENTRED}
    if score.needs & by_loss:
        _needed(score, loss_fn)


def _check_known(score: GroupScore) -> None:
    known = UNIT_STATISTICS | ELEMENT_STATISTICS | INPUT_STATISTICS | PRODUCT_STATISTICS | {CENTRED, COST}
    for need in score.needs - known:
        if not isinstance(need, Statistic):
            raise MissingStatsError(f"{score} needs {need!r}, which nothing here collects")
        if not need.elementwise:
            raise MissingStatsError(
                f"{score} needs {need}, which rates weights jointly and cannot be added up over coupled units; use an "
                "element score, or a pattern of single weights"
            )


def _needed(score: GroupScore, loss_fn: LossFn | None) -> LossFn:
    if loss_fn is None:
        raise MissingStatsError(f"{score} needs gradients: pass loss_fn=lambda model, batch: ... and batches=[...]")
    return loss_fn


def _given(score: GroupScore, batches: Batches | None) -> Callable[[], Iterable[Any]]:
    if batches is None:
        raise MissingStatsError(f"{score} needs data: pass batches=[...]")
    check_data(None, batches)
    return batches if callable(batches) else lambda: batches


def _forward(loss_fn: LossFn | None) -> Callable[[nn.Module, Any, int], Any]:
    if loss_fn is None:
        return lambda model, batch, number: call_loss(call_model, model, batch, number)
    return lambda model, batch, number: call_loss(loss_fn, model, batch, number)


# -- costs


def unit_costs(coupling: Coupling, removed: Removed | None = None) -> dict[str, Tensor]:
    """Return the multiply-accumulates that the removal of one unit saves, by group; all units of a group are alike.

    Args:
        coupling: The groups.
        removed: Units that have gone already.
    """
    before = np.zeros(coupling.units, dtype=bool) if removed is None else removed
    dense = coupling.macs(coupling.alive(before))
    out = {}
    for group in coupling.groups:
        without = before.copy()
        without[group.ids[~before[group.ids]][0]] = True
        saved = dense - coupling.macs(coupling.alive(without))
        out[group.name] = torch.full((group.units,), float(saved), dtype=torch.float64)
    return out


# -- inputs and products


def _by_member(
    out: Collected, coupling: Coupling, readers: Mapping[str, tuple[Reader, ...]], found: Mapping[str, Tensors]
) -> None:
    """Lay channels out as (units, channels per unit), by the columns that read them."""
    units = {group.name: group.units for group in coupling.groups}
    for need, by_layer in found.items():
        table = out.stats.setdefault(need, {})
        for group, own in readers.items():
            reached = [reader for reader in own if reader.module in by_layer]
            if not reached:
                out.silent[group] = _UNREACHED
            for reader in reached:
                if len(by_layer[reader.module]) != len(reader.unit):
                    out.silent[group] = _misfit(reader, len(by_layer[reader.module]))
                    continue
                rows = _rows(by_layer[reader.module], reader, units[group])
                table[reader.member] = torch.cat([table[reader.member], rows], 1) if reader.member in table else rows


def _misfit(reader: Reader, channels: int) -> str:
    return f"{reader.module} gets {channels} channels for {len(reader.unit)} columns, so which is which is not known"


def _rows(values: Tensor, reader: Reader, units: int) -> Tensor:
    owned = np.flatnonzero(reader.unit >= 0)
    order = owned[np.argsort(reader.unit[owned], kind="stable")]
    return values[torch.from_numpy(order)].reshape(units, -1)


@dataclass
class _Products:
    """Sums of per-sample products over everything that reads a unit."""

    model: nn.Module
    coupling: Coupling
    score: GroupScore
    readers: dict[str, tuple[Reader, ...]]
    layers: list[str]
    reached: set[str] = field(default_factory=set)

    def of_batch(
        self, samples: int, products: Mapping[str, Tensor | str], silent: dict[str, str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (samples, units) for every group; zero where the batch reaches no layer that reads it."""
        for group in self.coupling.groups:
            if group.name in silent:
                continue
            total = torch.zeros(samples, group.units, dtype=torch.float64)
            for reader in self.readers.get(group.name, ()):
                product = products.get(reader.module)
                if isinstance(product, str):
                    silent[group.name] = product
                elif product is not None and product.shape[1] != len(reader.unit):
                    silent[group.name] = _misfit(reader, product.shape[1])
                elif product is not None:
                    self.reached.add(group.name)
                    rows = product.T[torch.from_numpy(np.flatnonzero(reader.unit >= 0))]
                    unit = torch.from_numpy(reader.unit[reader.unit >= 0])
                    total += rows.new_zeros(group.units, rows.shape[1]).index_add_(0, unit, rows).T
            if group.name not in silent:
                yield group.name, total


def _products(out: Collected, products: _Products, loss_fn: LossFn | None, data: Callable[[], Iterable[Any]]) -> None:
    score, needs = products.score, {str(n) for n in products.score.needs & (PRODUCT_STATISTICS | {CENTRED})}
    scalar, per_sample = _scalar(score, loss_fn)
    means = None
    if CENTRED in needs:
        run = _outputs_of(loss_fn) if isinstance(score, OutputScore) else _forward(loss_fn)
        means = collect_inputs(products.model, products.layers, run, data(), needs=["input_mean"])["input_mean"]
    sums: dict[str, dict[str, Tensor]] = {need: {} for need in needs}
    count = 0
    for samples, found in collect_products(products.model, products.layers, scalar, data(), means=means):
        count += samples
        for name, product in products.of_batch(samples, found, out.silent):
            p = product * (samples if per_sample else 1)
            if RECENT in needs:
                old = sums[RECENT].get(name, torch.zeros_like(p[0]))
                sums[RECENT][name] = 0.8 * old + 0.2 * p.mean(0)
            for need, total in (
                ("activation_product", p.sum(0)),
                ("activation_product_absolute", p.abs().sum(0)),
                ("activation_product_square", p.square().sum(0)),
                (CENTRED, p.square().sum(0)),
            ):
                if need in needs:
                    sums[need][name] = sums[need].get(name, torch.zeros_like(total)) + total
    for group in products.coupling.groups:
        if group.name not in products.reached:
            out.silent.setdefault(group.name, _UNREACHED)
    for need, table in sums.items():
        share = 1 if need == RECENT else count
        out.stats[need] = {n: v / share for n, v in table.items() if n not in out.silent}


def _scalar(score: GroupScore, loss_fn: LossFn | None) -> tuple[Callable[[nn.Module, Any, int], Tensor], bool]:
    """Return what is differentiated, and whether it is a mean over samples (or a sum)."""
    if not isinstance(score, OutputScore):
        loss = _needed(score, loss_fn)
        return lambda model, batch, number: loss_of(loss, model, batch, number), True
    run, generator = _outputs_of(loss_fn), Generator().manual_seed(score.seed)

    def along(model: nn.Module, batch: Any, number: int) -> Tensor:
        outputs = run(model, batch, number)
        direction = score.directions(outputs.detach(), generator)
        wide = torch.promote_types(outputs.dtype, torch.float32)  # a sum over many outputs overflows float16
        return (outputs.to(wide) * direction.to(outputs.device, wide)).sum()

    return along, False


def _outputs_of(loss_fn: LossFn | None) -> Callable[[nn.Module, Any, int], Tensor]:
    """Return a function that gives the one tensor of outputs that a score without labels protects."""

    def outputs(model: nn.Module, batch: Any, number: int) -> Tensor:
        out: Any = call_loss(loss_fn or call_model, model, batch, number)
        out = out["logits"] if isinstance(out, Mapping) and "logits" in out else out
        found = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
        if len(found) != 1 or not found[0].dim():
            shapes = ", ".join(str(tuple(t.shape)) for t in found) or "no tensor"
            raise MissingStatsError(
                f"a score without labels protects one tensor of outputs, (samples, ...), and the model gave {shapes} "
                f"on batch {number}; pass loss_fn=lambda model, batch: ... that returns the one that matters"
            )
        return found[0]

    return outputs


# -- of parameters


def _elements(
    model: nn.Module, coupling: Coupling, need: Statistic, loss_fn: LossFn | None, batches: Batches | None
) -> dict[str, Tensor]:
    """Return a statistic of single weights as rows per unit."""
    parameters = _reached(model, coupling)
    first = coupling.trace.examples[0]
    data = None if batches is None else (lambda: batches() if callable(batches) else batches)
    found = need.collect(Source(model, parameters, loss_fn, data, first.args))
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


def _gradients(
    model: nn.Module,
    coupling: Coupling,
    score: GroupScore,
    needs: frozenset[str],
    loss_fn: LossFn,
    batches: Callable[[], Iterable[Any]],
) -> dict[str, dict[str, Tensor]]:
    parameters = _reached(model, coupling)
    sums: dict[str, dict[str, Tensor]] = {need: {} for need in needs}
    count = 0
    frozen = [p for p in parameters.values() if not p.requires_grad]
    refuse_inference(score)
    try:
        for p in frozen:
            p.requires_grad_(True)
        with undisturbed(model), torch.enable_grad():
            for batch in batches():
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


__all__ = ["Batches", "Collected", "Stats", "check_needs", "collect", "unit_costs"]
