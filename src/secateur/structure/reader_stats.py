"""Statistics of the layers that read a unit: what they get, and activation times gradient, over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.errors import MissingStatsError
from secateur.forward import call_model
from secateur.graph.coupling import Coupling
from secateur.stats._common import call_loss
from secateur.stats.activations import INPUT_STATISTICS, collect_inputs, collect_products
from secateur.stats.gradients import LossFn, loss_of
from secateur.structure.collected import Collected, needed
from secateur.structure.readers import Reader, readers_of
from secateur.types import GroupScore, OutputScore, Tensors

RECENT = "activation_product_recent"

CENTRED = "centred_product_square"
"""The square of activation times gradient, with activations counted from their mean."""

PRODUCT_STATISTICS = frozenset(
    {"activation_product", "activation_product_square", "activation_product_absolute", RECENT, CENTRED}
)
"""Sums of activation times gradient over what reads a unit, per sample; the recent one favours the latest batches."""

READER_STATISTICS = INPUT_STATISTICS | PRODUCT_STATISTICS
"""All that is collected of the layers that read a unit."""

_UNREACHED = "no batch reaches a layer that reads it"


def collect_of_readers(
    model: nn.Module,
    coupling: Coupling,
    score: GroupScore,
    loss_fn: LossFn | None,
    batches: Callable[[], Iterable[Any]],
) -> Collected:
    """Collect what a score needs of the layers that read its units.

    Args:
        model: The model.
        coupling: Its groups.
        score: The score.
        loss_fn: Runs the model on one batch, if somebody supplied it.
        batches: Begins the batches anew.

    Returns:
        The statistics, and groups about which they say nothing.

    Raises:
        MissingStatsError: When the score needs a loss that nobody supplied, or the data gives none.
    """
    out = Collected()
    readers, out.silent = readers_of(model, coupling)
    layers = sorted({reader.module for own in readers.values() for reader in own})
    inputs = frozenset(str(n) for n in score.needs & INPUT_STATISTICS)
    if inputs:
        found = collect_inputs(model, layers, _forward(loss_fn), batches(), needs=inputs)
        _by_member(out, coupling, readers, found)
    if score.needs & PRODUCT_STATISTICS:
        _products(out, _Products(model, coupling, score, readers, layers), loss_fn, batches)
    return out


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
    score, needs = products.score, {str(n) for n in products.score.needs & PRODUCT_STATISTICS}
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
        loss = needed(score, loss_fn)
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


def _forward(loss_fn: LossFn | None) -> Callable[[nn.Module, Any, int], Any]:
    return lambda model, batch, number: call_loss(loss_fn or call_model, model, batch, number)
