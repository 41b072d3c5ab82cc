"""Views, permutations, splits and joins."""

from __future__ import annotations

import numpy as np

from secateur.graph.axes import FIXED, Axes, Labels, Part
from secateur.graph.calls import Call
from secateur.graph.rules._registry import rule


def _without(axes: Axes, dim: int) -> list[Part]:
    """Parts after a dimension has gone."""
    return [Part([d - (d > dim) for d in p.dims], p.labels) for p in axes.parts if dim not in p.dims]


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten", "unflatten",
      "_reshape_copy", "view_copy", "reshape_as", "view_as", "ravel", "unsafe_view")  # fmt: skip
def reshape(call: Call) -> None:
    """Labels follow their elements. Bits read as another dtype are not followed."""
    if call.result.dtype != call.first.dtype:
        call.freeze()
        return
    call.put(call.result, call.ledger.reshape(call.axes(call.first), call.result.shape))


@rule("as_strided")
def as_strided(call: Call) -> None:
    """Understood where every element stays in its place."""
    axes, x = call.axes(call.first), call.first
    offset = x.storage_offset() if call["storage_offset"] is None else call["storage_offset"]
    if (axes.shape, x.stride(), x.storage_offset()) == (tuple(call["size"]), tuple(call["stride"]), offset):
        call.put(call.result, axes)
    else:
        call.freeze()


@rule("t", "mT", "adjoint")
def t(call: Call) -> None:
    """Reverse the last two dimensions."""
    order = list(range(call.first.dim()))
    order[-2:] = order[-2:][::-1]
    call.put(call.result, call.ledger.permute(call.axes(call.first), order))


@rule("transpose", "swapaxes", "swapdims")
def transpose(call: Call) -> None:
    """Swap two dimensions."""
    order = list(range(call.first.dim()))
    if order:
        a, b = call["dim0"] % len(order), call["dim1"] % len(order)
        order[a], order[b] = order[b], order[a]
    call.put(call.result, call.ledger.permute(call.axes(call.first), order))


@rule("permute", "permute_copy")
def permute(call: Call) -> None:
    """Reorder all dimensions."""
    rank = call.first.dim()
    call.put(call.result, call.ledger.permute(call.axes(call.first), [d % rank for d in call["dims"]]))


@rule("expand", "expand_copy", "broadcast_to", "expand_as")
def expand(call: Call) -> None:
    """Copies of one slice are alike: any number of them would do."""
    axes, out = call.axes(call.first), call.result
    offset = out.dim() - call.first.dim()
    grown = [d for d in range(out.dim()) if d < offset or axes.shape[d - offset] != out.shape[d]]
    made = call.ledger.made(out.shape, grown)
    call.put(out, Axes(out.shape, made.parts + [p.moved(offset) for p in axes.parts]))


@rule("repeat", "tile")
def repeat(call: Call) -> None:
    """Labels are tiled with their values."""
    axes, out = call.axes(call.first), call.result
    offset = out.dim() - call.first.dim()
    times = [out.shape[d] // (axes.shape[d - offset] if d >= offset else 1) if out.shape[d] else 1
             for d in range(out.dim())]  # fmt: skip
    parts = []
    for part in axes.parts:
        dims = part.moved(offset).dims
        parts.append(Part(dims, np.tile(part.labels, [times[d] for d in dims])))
    grown = [d for d in range(out.dim()) if times[d] > 1 and (d < offset or axes.shape[d - offset] == 1)]
    call.put(out, Axes(out.shape, call.ledger.made(out.shape, grown).parts + parts))


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> None:
    """Every index several times in a row."""
    repeats, dim = call["repeats"], call["dim"]
    if not isinstance(repeats, int) or dim is None:
        call.freeze()
        return
    axes = call.axes(call.first)
    dim %= len(axes.shape)
    parts = []
    for part in axes.parts:
        labels = np.repeat(part.labels, repeats, part.dims.index(dim)) if dim in part.dims else part.labels
        parts.append(Part(part.dims, labels))
    call.put(call.result, Axes(call.result.shape, parts))


@rule("cat", "concat", "concatenate", "_cat")
def cat(call: Call) -> None:
    """Labels are joined along one dimension and tied along the others."""
    out = call.result
    tensors = [t for t in call["tensors"] if t.dim() == out.dim()]  # an old form allows empty ones of any rank
    dim = (call["dim"] or 0) % out.dim()
    sources = [call.axes(t) for t in tensors]
    runs: list[Labels] = []
    for axes in sources:
        labels = call.ledger.plain(axes, dim)
        runs.append(np.full(axes.shape[dim], FIXED) if labels is None else labels)
    rest = _combine_without(call, sources, dim)
    joined = np.concatenate(runs)
    parts = [Part([d + (d >= dim) for d in p.dims], p.labels) for p in rest.parts]
    if joined.any():
        parts.append(Part([dim], joined))
    call.put(out, Axes(out.shape, parts))


def _combine_without(call: Call, sources: list[Axes], dim: int) -> Axes:
    """Tie tensors along all dimensions but one."""
    reduced = []
    for axes in sources:
        shape = [s for d, s in enumerate(axes.shape) if d != dim]
        reduced.append(Axes(shape, _without(axes, dim)))
    return call.ledger.combine(reduced, reduced[0].shape)


@rule("stack")
def stack(call: Call) -> None:
    """A new dimension that is fixed; the others are tied."""
    out = call.result
    dim = (call["dim"] or 0) % out.dim()
    same = call.ledger.combine([call.axes(t) for t in call["tensors"]], call["tensors"][0].shape)
    call.put(out, Axes(out.shape, [Part([d + (d >= dim) for d in p.dims], p.labels) for p in same.parts]))


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk", "tensor_split",
      "split_copy", "split_with_sizes_copy")  # fmt: skip
def split(call: Call) -> None:
    """Equal pieces stay equal: they are tied to one another. Unequal ones are free."""
    axes = call.axes(call.first)
    dim = (call["dim"] or 0) % len(axes.shape)
    pieces = call.outputs()
    labels = call.ledger.plain(axes, dim)
    sizes = [p.shape[dim] for p in pieces]
    rest = [p for p in axes.parts if dim not in p.dims]
    if labels is not None and len(sizes) > 1 and len(set(sizes)) == 1:
        call.ledger.equal_parts(labels, len(sizes))
    start = 0
    for piece, size in zip(pieces, sizes, strict=True):
        own = [] if labels is None else [Part([dim], labels[start : start + size])]
        call.put(piece, Axes(piece.shape, [*rest, *_live(own)]))
        start += size


def _live(parts: list[Part]) -> list[Part]:
    """Without parts that are fixed altogether."""
    return [p for p in parts if p.labels.any()]


@rule("unbind")
def unbind(call: Call) -> None:
    """Every index by itself: the dimension is fixed, unless it counts experts."""
    axes = call.axes(call.first)
    dim = call["dim"] % len(axes.shape)
    labels = call.ledger.contest(axes, dim)
    if labels is not None:
        call.mention(labels, None)
    for piece in call.outputs():
        call.put(piece, Axes(piece.shape, _without(axes, dim)))


@rule("select", "select_copy")
def select(call: Call) -> None:
    """One index: the dimension is fixed."""
    axes = call.axes(call.first)
    dim = call["dim"] % len(axes.shape)
    part = axes.part(dim)
    if part is not None and len(part.dims) > 1:
        # Which of several (q, k or v): they stay alike, and the chosen one keeps its own labels.
        axis = part.dims.index(dim)
        call.ledger.tie(part.labels.take([0], axis), part.labels)
        chosen = Part([d - (d > dim) for d in part.dims if d != dim], part.labels.take(call["index"], axis))
        call.put(call.result, Axes(call.result.shape, [*_without(axes, dim), chosen]))
        return
    out = Axes(call.result.shape, _without(axes, dim))
    if part is not None:  # the values may never be used: code takes an index for its shape
        out.owed.append((part.labels, call.ledger.where))
        call.mention(part.labels, call["index"] % part.labels.size)
        if call.number_read is not None and call.number_read[0] == call["index"]:
            numbers = call.number_read[1]
            if part.labels.size <= numbers.size:
                call.ledger.tie(part.labels, numbers[: part.labels.size])
    call.put(call.result, out)


@rule("slice", "slice_copy", "narrow")
def slice_(call: Call) -> None:
    """A run of indices keeps its labels; one index that is not the first or the last fixes the dimension."""
    axes, out = call.axes(call.first), call.result
    dim = (call["dim"] or 0) % len(axes.shape)
    if tuple(out.shape) == axes.shape:
        call.put(out, axes)
        return
    labels = call.ledger.plain(axes, dim)
    result = Axes(out.shape, [p for p in axes.parts if dim not in p.dims])
    if labels is not None:
        size, given = axes.shape[dim], call["start"] or 0
        start = min(max(given + size if given < 0 else given, 0), size)
        step = call["step"] or 1
        run = call.ledger.slice(labels, start, min(start + out.shape[dim] * step, size), step)
        if out.shape[dim] == 1:
            call.mention(labels, start)
        if out.shape[dim] == 1 and given not in (0, -1):  # its place changes with what goes before it
            result.owed.append((labels, call.ledger.where))
        result.parts += _live([Part([dim], run)])
    call.put(out, result)


@rule("slice_scatter", "select_scatter", "diagonal", "diag_embed", "diag", "diagonal_copy")
def scattered(call: Call) -> None:
    """Not followed."""
    call.freeze()


@rule("constant_pad_nd", "pad")
def constant_pad(call: Call) -> None:
    """Padding adds fixed indices at the ends of a dimension."""
    axes, out = call.axes(call.first), call.result
    pad = list(call["pad"])
    parts = []
    ends = {len(axes.shape) - 1 - i // 2: (pad[i], pad[i + 1]) for i in range(0, len(pad), 2)}
    for dim, (low, high) in ends.items():
        part = axes.part(dim)
        if (low or high) and part is not None and (len(part.dims) > 1 or low < 0 or high < 0):
            call.ledger.drop(axes, dim)
    for part in axes.parts:
        labels = part.labels
        if len(part.dims) == 1 and any(ends.get(part.dims[0], (0, 0))):
            labels = np.pad(labels, ends[part.dims[0]], constant_values=FIXED)
        parts.append(Part(part.dims, labels))
    call.put(out, Axes(out.shape, parts))


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> None:
    """(C·r², H, W) to (C, H·r, W·r): the r² channels of one output live and die together."""
    axes, out = call.axes(call.first), call.result
    dim = len(axes.shape) - 3
    labels = call.ledger.only(axes, dim)
    parts = [p for p in axes.parts if p.dims[0] < dim]
    if labels is not None:
        rows = labels.reshape(out.shape[dim], -1)
        call.ledger.tie(rows[:, :1], rows)
        parts.append(Part([dim], rows[:, 0]))
    _fix_from(call, axes, dim + 1)
    call.put(out, Axes(out.shape, parts))


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> None:
    """(C, H·r, W·r) to (C·r², H, W)."""
    axes, out = call.axes(call.first), call.result
    dim = len(axes.shape) - 3
    labels = call.ledger.only(axes, dim)
    parts = [p for p in axes.parts if p.dims[0] < dim]
    if labels is not None:
        parts.append(Part([dim], np.repeat(labels, out.shape[dim] // axes.shape[dim])))
    _fix_from(call, axes, dim + 1)
    call.put(out, Axes(out.shape, parts))


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> None:
    """View as (groups, C/groups), transpose, flatten."""
    axes = call.axes(call.first)
    shape, groups = axes.shape, call["groups"]
    split_shape = (shape[0], groups, shape[1] // groups, *shape[2:])
    apart = call.ledger.reshape(axes, split_shape)
    turned = call.ledger.permute(apart, [0, 2, 1, *range(3, len(split_shape))])
    call.put(call.result, call.ledger.reshape(turned, shape))


def _fix_from(call: Call, axes: Axes, dim: int) -> None:
    for d in range(dim, len(axes.shape)):
        call.ledger.drop(axes, d)
