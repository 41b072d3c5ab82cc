"""Look-ups: the dimension that is looked up in is fixed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.graph.axes import FIXED, Axes, Labels, Part
from secateur.graph.calls import Call
from secateur.graph.rules._registry import rule


@rule("embedding")
def embedding(call: Call) -> None:
    """Rows are fixed, columns pass."""
    weight, index = call.axes(call["weight"]), call.axes(call["indices"])
    call.ledger.drop(weight, 0)
    last = len(index.shape)
    parts = list(index.parts) + [Part([last], p.labels) for p in weight.parts if p.dims == (1,)]
    call.put(call.result, Axes(call.result.shape, parts))


@rule("_embedding_bag", "_embedding_bag_forward_only", "embedding_bag")
def embedding_bag(call: Call) -> None:
    """Rows are fixed, columns pass."""
    weight = call.axes(call["weight"])
    call.ledger.drop(weight, 0)
    labels = weight.labels(1)
    call.put(call.result, Axes(call.result.shape, [] if labels is None else [Part([1], labels)]))
    call.put_fixed(call.outputs()[1:])


@rule("index_select")
def index_select(call: Call) -> None:
    """The indexed dimension is fixed."""
    axes = call.axes(call["self"])
    call.ledger.freeze_all(call.axes(call["index"]))
    call.ledger.drop(axes, call["dim"] % len(axes.shape))
    call.put(call.result, Axes(call.result.shape, axes.parts))


@rule("index", "_unsafe_index")
def index(call: Call) -> None:
    """Indexed dimensions are fixed, those that are not keep their labels, the index's own come in."""
    axes, out = call.axes(call["self"]), call.result
    indices = list(call["indices"])
    used = [d for d, i in enumerate(indices) if i is not None]
    if any(indices[d].dtype in _MASKS for d in used):
        _masked(call, axes, indices, used)
        return
    for dim in used:
        look_up(call, axes, dim, indices[dim])
    parts_left = [p for p in axes.parts if not set(p.dims) & set(used)]
    looked = call.ledger.combine([call.axes(indices[d]) for d in used], _broadcast(indices, used))
    # The result of adjacent indices takes their place; otherwise it comes first.
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    rank = len(looked.shape)
    place = {}
    for dim in range(len(axes.shape)):
        if dim not in used:
            before = sum(d not in used for d in range(dim))
            place[dim] = before if before < at else before + rank
    parts = [Part([place[d] for d in p.dims], p.labels) for p in parts_left]
    parts += [p.moved(at) for p in looked.parts]
    call.put(out, Axes(out.shape, parts))


def look_up(call: Call, axes: Axes, dim: int, index: Tensor) -> None:
    """Fix a dimension that is indexed; where the index holds numbers of experts, the dimension counts these."""
    numbers, labels = call.axes(index).numbers, axes.labels(dim)
    if numbers is None or labels is None or labels.size > numbers.size:
        call.ledger.drop(axes, dim)
    else:
        call.ledger.tie(labels, numbers[: labels.size])
        call.ledger.contested.append((labels, call.ledger.where))


_MASKS = (torch.bool, torch.uint8)


def _masked(call: Call, axes: Axes, indices: list[Any], used: list[int]) -> None:
    """Look up by a mask over the first dimensions: the picked ones become one, which is fixed."""
    if used != [0] or len(indices) > 1:
        call.freeze()
        return
    mask = call.axes(indices[0])
    call.ledger.freeze_all(mask)
    covered = len(mask.shape)
    for dim in range(covered):
        call.ledger.drop(axes, dim)
    call.put(call.result, Axes(call.result.shape, [p.moved(1 - covered) for p in axes.parts]))


def _broadcast(indices: list[Tensor | None], used: list[int]) -> tuple[int, ...]:
    shapes = [index.shape for d in used if (index := indices[d]) is not None]
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


@rule("gather", "take_along_dim")
def gather(call: Call) -> None:
    """The gathered dimension is fixed; along the others the index counts too."""
    axes, dim = call.axes(call["self"]), call["dim"] % max(call["self"].dim(), 1)
    picked = call.axes(call["index"])
    look_up(call, axes, dim, call["index"])
    axes = Axes(axes.shape, [p for p in axes.parts if dim not in p.dims])
    out = call.result
    for d in range(len(axes.shape)):
        if d != dim and axes.shape[d] != picked.shape[d]:
            call.ledger.drop(axes, d)
            call.ledger.drop(picked, d)
    rest = [Axes(out.shape, [p for p in a.parts if dim not in p.dims]) for a in (axes, picked)]
    combined = call.ledger.combine(rest, out.shape)
    extra = [p for p in picked.parts if p.dims == (dim,)]
    call.put(out, Axes(out.shape, combined.parts + extra))


@rule("histc", "bincount")
def count(call: Call) -> None:
    """How often each value occurs; of numbers of experts, the result counts these."""
    axes, out = call.axes(call.first), call.result
    numbers = axes.numbers
    if numbers is None or out.dim() != 1 or len(out) < numbers.size:
        call.freeze()
        return
    rest = np.full(len(out) - numbers.size, FIXED)
    call.put(out, Axes(out.shape, [Part([0], np.concatenate([numbers, rest]))]))


@rule("nonzero")
def nonzero(call: Call) -> None:
    """Places that are not zero; along one dimension that counts experts, these are their numbers."""
    axes, out = call.axes(call.first), call.result
    labels = axes.labels(0) if len(axes.shape) == 1 else None
    if labels is None:
        call.freeze()
        return
    call.ledger.contested.append((labels, call.ledger.where))
    call.put(out, Axes(out.shape))
    call.axes(out).numbers = labels


@rule("one_hot", "bucketize", "searchsorted", "unique_dim", "_unique2", "masked_select", "unique_consecutive",
      "masked_scatter", "put", "take", "index_fill")  # fmt: skip
def by_value(call: Call) -> None:
    """What comes out depends on values."""
    call.freeze()


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(call: Call) -> None:
    """Written dimensions are fixed; where whole rows are written, the row's labels are tied to the target's."""
    axes, values = call.axes(call["self"]), call.axes(call["values"])
    indices = list(call["indices"])
    used = [d for d, i in enumerate(indices) if i is not None]
    tensors = [indices[d] for d in used]
    masks = [t for t in tensors if t.dtype in _MASKS]
    if used != list(range(len(used))) or (masks and len(tensors) > 1):
        call.freeze()
        return
    written = masks[0].dim() if masks else len(used)
    for dim in range(written):
        call.ledger.drop(axes, dim)
    for t in tensors:
        call.ledger.freeze_all(call.axes(t))
    rest = Axes(axes.shape[written:], [p.moved(-written) for p in axes.parts])
    keep = len(rest.shape)
    for dim in range(max(len(values.shape) - keep, 0)):
        call.ledger.drop(values, dim)
    lead = max(len(values.shape) - keep, 0)
    tail = Axes(values.shape[lead:], [Part([d - lead for d in p.dims], p.labels) for p in values.parts])
    joined = call.ledger.combine([rest, tail], rest.shape)
    call.put(call.result, Axes(axes.shape, [p.moved(written) for p in joined.parts]))


@rule("index_add", "index_copy")
def index_add(call: Call) -> None:
    """The indexed dimension is fixed; the others are tied."""
    axes, source = call.axes(call["self"]), call.axes(call["source"])
    dim = call["dim"] % len(axes.shape)
    call.ledger.drop(axes, dim)
    call.ledger.drop(source, dim)
    call.ledger.freeze_all(call.axes(call["index"]))
    shape = [1 if d == dim else s for d, s in enumerate(axes.shape)]
    joined = call.ledger.combine([Axes(shape, axes.parts), Axes(shape, source.parts)], shape)
    call.put(call.result, Axes(axes.shape, joined.parts))


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(call: Call) -> None:
    """The scattered dimension is fixed, or counts experts; the others are tied where the sizes agree."""
    operands = [call.axes(t) for t in call.tensors()]
    dim = call["dim"] % max(len(operands[0].shape), 1)
    chosen = _scattered_numbers(call, operands, dim)
    for axes in operands:
        for d in range(len(axes.shape)):
            if d == dim or any(o.shape[d] != axes.shape[d] for o in operands):
                for other in operands:
                    call.ledger.drop(other, d)
    shape = [1 if d == dim else s for d, s in enumerate(operands[0].shape)]
    joined = call.ledger.combine([Axes(shape, a.parts) for a in operands], shape)
    parts = joined.parts if chosen is None else [*joined.parts, Part([dim], chosen)]
    call.put(call.result, Axes(operands[0].shape, parts))


def _scattered_numbers(call: Call, operands: list[Axes], dim: int) -> Labels | None:
    """Return the labels of a dimension that numbers of experts are scattered over; the first operand loses it."""
    axes, numbers = operands[0], call.axes(call["index"]).numbers
    labels = axes.labels(dim)
    if numbers is None or labels is None or labels.size < numbers.size:
        return None
    call.ledger.tie(labels[: numbers.size], numbers)
    call.ledger.freeze(labels[numbers.size :])
    operands[0] = Axes(axes.shape, [p for p in axes.parts if p.dims != (dim,)])
    return np.concatenate([numbers, np.full(labels.size - numbers.size, FIXED)])
