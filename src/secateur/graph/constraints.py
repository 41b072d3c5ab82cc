"""What trial and error has added to a trace: dimensions that are fixed, and dimensions that keep one size."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from secateur.graph.axes import Axes, Labels
from secateur.graph.components import reshape_cells
from secateur.graph.labels import Ledger
from secateur.graph.record import Op

SPLITS = frozenset({"aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias"})


@dataclass
class Constraints:
    """What trial and error has added to a trace: modules whose splits, or all of whose tensors, are fixed.

    Attributes:
        splits: Modules (by name) where no split dimension may be pruned.
        whole: Modules where nothing may be pruned, with the reason.
        equal: Modules where dimensions of one size must keep one size: heads × head size = width.
    """

    splits: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    equal: dict[str, str] = field(default_factory=dict)


@dataclass
class SameSize:
    """Dimensions of one size in one module.

    Attributes:
        module: The module.
        size: The size.
        plain: Labels of the dimensions of that size.
        split: Labels of those that a reshape there splits or joins (channels into heads).
    """

    module: str
    size: int
    plain: list[Labels] = field(default_factory=list)
    split: list[Labels] = field(default_factory=list)


def constrain(ledger: Ledger, ops: Iterable[Op], constraints: Constraints) -> None:
    """Fix the split dimensions, or all tensors, of the modules that were in the way.

    Args:
        ledger: Where labels are fixed.
        ops: The recorded operators.
        constraints: The modules.
    """
    if constraints.splits:
        for block, place in ledger.blocks:
            module = place.split(": ")[0]
            if module in constraints.splits:
                ledger.freeze(block, constraints.splits[module])
    if constraints.whole:
        for op in ops:
            where = around(op.module, constraints.whole)
            if where is not None:
                for axes in (*op.inputs, *op.outputs):
                    for part in axes.parts:
                        ledger.freeze(part.labels, constraints.whole[where])


def same_sizes(ledger: Ledger, ops: Iterable[Op], modules: Mapping[str, str]) -> list[SameSize]:
    """Return, module by module, the dimensions of each size, and which of them are split or joined there.

    Args:
        ledger: Knows which labels are made.
        ops: The recorded operators.
        modules: Where to look, with what is within.

    Returns:
        Sizes that some reshape in their module splits or joins.
    """
    found: dict[tuple[str, int], SameSize] = {}
    for op in ops:
        where = around(op.module, modules)
        if where is None:
            continue
        for axes in (*op.inputs, *op.outputs):
            for part in axes.parts:
                if len(part.dims) == 1 and part.labels.size > 1 and not ledger.is_made(part.labels):
                    entry = found.setdefault((where, part.labels.size), SameSize(where, part.labels.size))
                    entry.plain.append(part.labels)
        if op.name in SPLITS and len(op.inputs) == len(op.outputs) == 1:
            for size, labels in split_sizes(op.inputs[0], op.outputs[0]):
                if not ledger.is_made(labels):
                    found.setdefault((where, size), SameSize(where, size)).split.append(labels)
    return [entry for entry in found.values() if entry.split]


def settle(
    ledger: Ledger, roots: Labels, frozen: NDArray[np.bool_], sizes: Sequence[SameSize], modules: Mapping[str, str]
) -> None:
    """Fix dimensions that have the size of a split dimension that is fixed.

    Args:
        ledger: Where labels are fixed.
        roots: The component of each label.
        frozen: Whether a component is fixed; what is fixed here is added.
        sizes: Dimensions of one size.
        modules: Why dimensions of one size must keep it, by module.
    """
    changed = True
    while changed:
        changed = False
        for entry in sizes:
            if any(frozen[roots[labels]].any() for labels in entry.split):
                for labels in (*entry.plain, *entry.split):
                    if not frozen[roots[labels]].all():
                        ledger.freeze(labels, modules[entry.module])
                        frozen[roots[labels]] = True
                        changed = True


def around(module: str, modules: Container[str]) -> str | None:
    """Return the innermost of some modules that is a module or contains it.

    Example:
        >>> around("encoder.0.attention", {"encoder", "encoder.0"}), around("head", {"encoder"})
        ('encoder.0', None)
    """
    while module and module not in modules:
        module = module.rpartition(".")[0]
    return module if module in modules else None


def split_sizes(before: Axes, after: Axes) -> Iterator[tuple[int, Labels]]:
    """Yield the flat size of every labelled dimension that a reshape splits or joins, with its labels.

    One that is split into a leading count, such as (3, heads, head size), also counts without it.
    """
    for old, new in reshape_cells(before.shape, after.shape):
        if len(old) == len(new) == 1:
            continue
        for flat, flat_dims, many, dims in ((before, old, after, new), (after, new, before, old)):
            for dim in flat_dims:
                labels = flat.labels(dim)
                if labels is not None:
                    yield flat.shape[dim], labels
                    for start in range(1, len(dims) - 1) if len(flat_dims) == 1 else ():
                        yield math.prod(many.shape[d] for d in dims[start:]), labels
