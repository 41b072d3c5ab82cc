"""Fused attention: heads pass, the size of a head is read as a value and stays."""

from __future__ import annotations

import numpy as np

from secateur.graph.axes import Axes, Part
from secateur.graph.calls import Call
from secateur.graph.rules._registry import rule


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
      "_scaled_dot_product_fused_attention_overrideable", "scaled_dot_product_attention",
      "_scaled_dot_product_attention_math", "_scaled_dot_product_attention_math_for_mps")  # fmt: skip
def attention(call: Call) -> None:
    """(B, H, T, D) queries, keys and values: heads are tied, tokens and head dimensions are fixed.

    Without a given scale the kernel divides by the root of the head dimension that it sees, so pruning that
    dimension would change the scale.
    """
    query, key, value = (call.axes(call[n]) for n in ("query", "key", "value"))
    rank = len(query.shape)
    for axes in (query, key, value):
        for dim in (rank - 2, rank - 1):
            call.ledger.drop(axes, dim)
    heads = query.shape[rank - 3]
    batch = [_repeated(Axes(a.shape[: rank - 2], a.parts), heads) for a in (query, key, value)]
    mask = call["attn_mask"] if call["attn_mask"] is not None else call["attn_bias"]
    if mask is not None:
        axes = call.axes(mask)
        for dim in range(max(len(axes.shape) - 2, 0), len(axes.shape)):
            call.ledger.drop(axes, dim)
        batch.append(Axes(axes.shape[:-2], axes.parts))
    shared = call.ledger.combine(batch, query.shape[: rank - 2])
    out = call.result
    call.put(out, Axes(out.shape, shared.parts))
    call.put_aside(call.outputs()[1:])
    queries = [(query, d) for d in range(rank - 1)]
    call.macs = [[*queries, (query, rank - 1), (key, rank - 2)], [*queries, (key, rank - 2), (value, rank - 1)]]


def _repeated(axes: Axes, heads: int) -> Axes:
    """Return the axes of keys or values after each of their heads was repeated for a group of query heads."""
    last = len(axes.shape) - 1
    if last < 0 or axes.shape[last] in (1, heads):
        return axes
    times = heads // axes.shape[last]
    parts = []
    for part in axes.parts:
        labels = np.repeat(part.labels, times, part.dims.index(last)) if last in part.dims else part.labels
        parts.append(Part(part.dims, labels))
    return Axes((*axes.shape[:last], heads), parts)
