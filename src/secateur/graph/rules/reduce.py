"""Reductions: sums and statistics run over what is kept; what depends on which index it was is fixed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from secateur.graph.axes import Axes, Part
from secateur.graph.calls import Call
from secateur.graph.rules._registry import rule
from secateur.graph.rules.norm import normalise
from secateur.graph.spread import CHOICES


def _dims(call: Call, rank: int) -> list[int]:
    dim = call["dim"]
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(rank))
    return sorted({d % max(rank, 1) for d in (dim if isinstance(dim, list | tuple) else [dim])})


def _reduced(call: Call, axes: Axes, dims: Sequence[int], *, keep: bool) -> None:
    parts = [p for p in axes.parts if not set(p.dims) & set(dims)]
    if not keep:
        parts = [Part([d - sum(r < d for r in dims) for d in p.dims], p.labels) for p in parts]
    for out in call.outputs():
        call.put(out, Axes(out.shape, parts))


def _keepdim(call: Call, rank: int) -> bool:
    return bool(call["keepdim"]) and call.result.dim() == rank


@rule("sum", "mean", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", "nansum", "frobenius_norm",
      "amax", "amin")  # fmt: skip
def statistic(call: Call) -> None:
    """A sum, or a mean, variance, norm or extreme value, which over pruned dimensions is that of what is kept."""
    axes = call.axes(call.first)
    dims = _dims(call, len(axes.shape))
    for part in list(axes.parts):
        inside = set(part.dims) & set(dims)
        if inside and not set(part.dims) <= set(dims):
            for dim in inside:
                call.ledger.drop(axes, dim)
    normalise(call, axes, dims)
    _reduced(call, axes, dims, keep=_keepdim(call, len(axes.shape)))


@rule("max", "min", "argmax", "argmin", "prod", "logsumexp", "any", "all", "median", "nanmedian",
      "mode", "kthvalue", "aminmax", "count_nonzero")  # fmt: skip
def choice(call: Call) -> None:
    """An extreme or a position: the reduced dimensions are fixed, unless the highest is an expert."""
    axes = call.axes(call.first)
    rank = len(axes.shape)
    if isinstance(call["other"], Tensor):  # the binary forms of max and min
        for out in call.outputs():
            call.put(out, call.ledger.combine([call.axes(t) for t in call.tensors()], out.shape))
        return
    dims = _dims(call, rank)
    labels = None
    for dim in dims:
        if call.name in CHOICES and call["dim"] is not None:
            labels = call.ledger.contest(axes, dim)
        else:
            call.ledger.drop(axes, dim)
    _reduced(call, axes, dims, keep=call.result.dim() == rank)
    if labels is not None:
        call.ledger.chosen.append((labels, 1, call.ledger.where))
        call.axes(call.outputs()[-1]).numbers = labels


@rule("topk")
def topk(call: Call) -> None:
    """The highest of one dimension, and their numbers: where these look things up, the dimension counts experts."""
    axes = call.axes(call.first)
    dim = call["dim"] % max(len(axes.shape), 1)
    labels = call.ledger.contest(axes, dim)
    parts = [p for p in axes.parts if dim not in p.dims]
    for out in call.outputs():
        call.put(out, Axes(out.shape, parts))
    if labels is not None:
        call.ledger.chosen.append((labels, int(call["k"]), call.ledger.where))
        call.axes(call.outputs()[1]).numbers = labels
