"""Products: what is contracted is tied, what is not passes on."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from secateur.graph.axes import Axes, Labels, Part
from secateur.graph.calls import Call
from secateur.graph.labels import Ledger
from secateur.graph.rules._registry import rule


def _part(dim: int, labels: Labels | None) -> list[Part]:
    return [] if labels is None else [Part([dim], labels)]


def contract(ledger: Ledger, a: Axes, b: Axes) -> list[Part]:
    """Return the parts of ``a @ b`` for a (..., n, k) and b (..., k, m) with equal batch dimensions."""
    rank = len(a.shape)
    row, inner = rank - 2, rank - 1
    ledger.same(a, inner, b, row)
    for axes, own in ((a, row), (b, inner)):
        part = axes.part(own)
        if part is not None and len(part.dims) > 1:
            ledger.drop(axes, own)
    batch = [Axes(x.shape[:row], [p for p in x.parts if p.dims[-1] < row]) for x in (a, b)]
    shared = ledger.combine(batch, batch[0].shape)
    rows, columns = a.labels(row), b.labels(inner)
    return [*shared.parts, *_part(row, rows), *_part(inner, columns)]


def _product(call: Call, left: Tensor, right: Tensor, out: Tensor, added: Tensor | None = None) -> None:
    a, b = call.axes(left), call.axes(right)
    call.macs = [[*((a, d) for d in range(len(a.shape))), (b, len(b.shape) - 1)]]
    parts = contract(call.ledger, a, b)
    axes = Axes(out.shape, parts)
    if added is not None:
        axes = call.ledger.combine([axes, call.axes(added)], out.shape)
    call.put(out, axes)


@rule("mm", "bmm", "_int_mm")
def mm(call: Call) -> None:
    """Matrix product, batched or not."""
    _product(call, call["self"], call["mat2"], call.result)


@rule("addmm", "_addmm_activation")
def addmm(call: Call) -> None:
    """Matrix product plus a broadcast term."""
    _product(call, call["mat1"], call["mat2"], call.result, call["self"])


@rule("baddbmm")
def baddbmm(call: Call) -> None:
    """Batched matrix product plus a broadcast term."""
    _product(call, call["batch1"], call["batch2"], call.result, call["self"])


@rule("mv", "addmv")
def mv(call: Call) -> None:
    """Matrix times vector."""
    matrix, vector = call["mat"] if "mat" in call.args else call["self"], call["vec"]
    m, v = call.axes(matrix), call.axes(vector)
    call.macs = [[(m, 0), (m, 1)]]
    call.ledger.same(m, 1, v, 0)
    axes = Axes(call.result.shape, _part(0, call.ledger.only(m, 0)))
    if "mat" in call.args:
        axes = call.ledger.combine([axes, call.axes(call["self"])], call.result.shape)
    call.put(call.result, axes)


@rule("dot", "vdot")
def dot(call: Call) -> None:
    """Vector times vector."""
    tensors = call.tensors()
    call.ledger.same(call.axes(tensors[0]), 0, call.axes(tensors[1]), 0)
    call.put_fixed(call.outputs())


@rule("linear", "mkldnn_linear")
def linear(call: Call) -> None:
    """Input times transposed weight, plus bias."""
    x, w = call.axes(call["input"] if "input" in call.args else call["self"]), call.axes(call["weight"])
    last = len(x.shape) - 1
    call.macs = [[*((x, d) for d in range(last + 1)), (w, 0)]]
    call.ledger.same(x, last, w, 1)
    out = call.result
    parts = [p for p in x.parts if last not in p.dims] + _part(last, call.ledger.only(w, 0))
    axes = Axes(out.shape, parts)
    if call["bias"] is not None:
        axes = call.ledger.combine([axes, call.axes(call["bias"])], out.shape)
    call.put(out, axes)


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
def convolution(call: Call) -> None:
    """Channels are contracted within groups; kernel positions are fixed."""
    ledger = call.ledger
    tensor = call["input"] if "input" in call.args else call["self"]
    x, w, groups, transposed = call.axes(tensor), call.axes(call["weight"]), call["groups"], call["transposed"]
    passed = {0, *_pointwise(call)}
    for dim in range(2, len(w.shape)):
        ledger.drop(w, dim)
        if dim not in passed:
            ledger.drop(x, dim)
    channels = ledger.plain(x, 1)
    if not transposed:
        if groups == 1:
            ledger.same(x, 1, w, 1)
            made = ledger.only(w, 0)
        else:
            made = _grouped(ledger, x, channels, w, 1, ledger.only(w, 0), groups)
    elif groups == 1:
        ledger.same(x, 1, w, 0)
        made = ledger.only(w, 1)
    else:
        made = _grouped_transposed(ledger, x, channels, w, groups)
    out = call.result
    positions = [p for p in x.parts if set(p.dims) <= passed]
    axes = Axes(out.shape, positions + _part(1, made))
    if call["bias"] is not None:
        bias = call.axes(call["bias"])
        ledger.same(axes, 1, bias, 0)
    call.put(out, axes)
    # positions × kernel × inputs per group × outputs
    site = axes if not transposed else x
    kernel = [(w, d) for d in range(2, len(w.shape))]
    call.macs = [[*((site, d) for d in range(len(site.shape)) if d != 1), *kernel, (w, 0), (w, 1)]]


def _pointwise(call: Call) -> set[int]:
    """Return the dimensions along which a convolution treats every position alike."""
    kernel = call["weight"].shape[2:]
    one = [list(call[name]) * (len(kernel) if len(call[name]) == 1 else 1) for name in ("stride", "padding")]
    if call["transposed"]:
        return set()
    return {d + 2 for d, size in enumerate(kernel) if size == 1 and one[0][d] == 1 and one[1][d] == 0}


def _grouped(
    ledger: Ledger, x: Axes, channels: Labels | None, w: Axes, inner: int, outputs: Labels | None, groups: int
) -> Labels | None:
    """Tie a grouped convolution. Whole groups go, or the same places in every group.

    Both the input (groups, I) and the output (groups, O) stay products of their two dimensions; which one is
    pruned is left open until something else, or the larger choice, decides.
    """
    weight_in = ledger.plain(w, inner)
    if weight_in is None:  # one input per group (depthwise): only whole groups can go
        ledger.drop(w, inner)
        if channels is None or outputs is None:
            _freeze_both(ledger, x, channels, outputs)
            return None
        rows = outputs.reshape(groups, -1)
        ledger.tie(rows, channels.reshape(groups, -1)[:, :1])
        ledger.tie(channels.reshape(groups, -1)[:, :1], channels.reshape(groups, -1))
        return outputs
    if channels is None or outputs is None:
        ledger.freeze(weight_in)
        _freeze_both(ledger, x, channels, outputs)
        return None
    # The same places in every group, for inputs and for outputs.
    ledger.tie(channels.reshape(groups, -1), weight_in[None, :])
    rows = outputs.reshape(groups, -1)
    ledger.tie(rows[:1], rows)
    return outputs


def _freeze_both(ledger: Ledger, x: Axes, channels: Labels | None, outputs: Labels | None) -> None:
    if channels is not None:
        ledger.drop(x, 1)
    if outputs is not None:
        ledger.freeze(outputs)


def _grouped_transposed(ledger: Ledger, x: Axes, channels: Labels | None, w: Axes, groups: int) -> Labels | None:
    """Tie a grouped transposed convolution: weight (groups·I, O, ...), output (groups·O)."""
    inputs, outputs = ledger.only(w, 0), ledger.only(w, 1)
    if channels is not None and inputs is not None:
        ledger.tie(channels, inputs)
    else:
        for labels in (channels, inputs):
            if labels is not None:
                ledger.freeze(labels)
    if outputs is not None:  # the same places in every group
        if inputs is not None:
            rows = inputs.reshape(groups, -1)
            if rows.shape[1] > 1:
                ledger.tie(rows[:1], rows)
            else:
                ledger.freeze(inputs)
        return np.tile(outputs, groups)
    if inputs is None or channels is None:
        return None
    rows = inputs.reshape(groups, -1)  # one output per group: whole groups
    ledger.tie(rows[:, :1], rows)
    return np.repeat(rows[:, 0], 1)


@rule("_trilinear", "bilinear", "cdist", "_cdist_forward", "_euclidean_dist", "kron", "cross", "linalg_cross")
def not_followed(call: Call) -> None:
    """Products that are not followed."""
    call.freeze()


@rule("_grouped_mm")
def grouped_mm(call: Call) -> None:
    """Tokens sorted by expert, each run times its expert's matrix: (N, K) with (E, K, M); ends of runs name experts."""
    ledger, a, b = call.ledger, call.axes(call["self"]), call.axes(call["mat2"])
    if len(a.shape) != 2 or len(b.shape) != 3:
        call.freeze()
        return
    call.macs = [[(a, 0), (a, 1), (b, 2)]]
    ends = call.axes(call["offs"]).labels(0)
    if ends is None:
        ledger.drop(b, 0)
    else:
        matrices = ledger.contest(b, 0)
        if matrices is not None:
            ledger.tie(matrices, ends)
    ledger.same(a, 1, b, 1)
    axes = Axes(call.result.shape, [p for p in a.parts if p.dims == (0,)] + _part(1, ledger.only(b, 2)))
    if call["bias"] is not None:
        axes = ledger.combine([axes, call.axes(call["bias"])], call.result.shape)
    call.put(call.result, axes)


@rule("outer", "ger")
def outer(call: Call) -> None:
    """Every pair of indices."""
    a, b = call.tensors()
    parts = _part(0, call.ledger.only(call.axes(a), 0)) + _part(1, call.ledger.only(call.axes(b), 0))
    call.put(call.result, Axes(call.result.shape, parts))
